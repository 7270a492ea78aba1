"""What users ask of a chat model, made from a few texts and lists: turns of many kinds.

Names, numbers and choices come from the generator that each function is given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese", "Dutch")
NAMES = ("Ana", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas")
SURNAMES = ("Abbott", "Brandt", "Castro", "Dubois", "Eriksen", "Fischer", "Garcia", "Haddad")
THINGS = ("apples", "books", "tickets", "chairs", "stamps", "bottles", "pencils", "bricks")
PLACES = ("the library", "the town hall", "our office", "the sports club", "the school", "a hotel")
GOODS = ("lamp", "kettle", "bicycle", "headset", "desk", "camera", "coffee machine", "tent")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
MONTHS = ("January", "March", "May", "July", "September", "November")

Turn = Callable[[str, Random], str]  # of a text
Question = tuple[str, str]  # and what the target said


def _first(text: str) -> str:
    return text.split(". ")[0]


def _with_mistakes(text: str, rng: Random) -> str:
    words = text.split()
    for at in rng.sample(range(len(words)), k=max(1, len(words) // 12)):
        word = words[at]
        if len(word) > 3:
            cut = rng.randrange(1, len(word) - 1)
            swapped = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
            words[at] = rng.choice((swapped, word[:cut] + word[cut + 1 :]))
    return " ".join(words)


ABOUT_PROSE: tuple[Turn, ...] = (
    lambda text, _: f"Summarize the following text in two sentences.\n\n{text}",
    lambda text, rng: f"Summarize this in {rng.randint(2, 5)} bullet points:\n\n{text}",
    lambda text, rng: f"{text}\n\nGive me the text above in at most {rng.randint(15, 40)} words.",
    lambda text, _: f"What are the main points of this passage?\n\n{text}",
    lambda text, _: f"{text}\n\nList three questions that this text answers, with the answers.",
    lambda text, _: f"Use only the text below to explain what it is about.\n\nText: {text}",
    lambda text, _: f"Rewrite this in simpler words:\n\n{text}",
    lambda text, rng: f"Make this text {rng.choice(('friendlier', 'more formal'))}:\n\n{text}",
)
TO_CORRECT: tuple[Turn, ...] = (
    lambda text, _: f"Correct any mistakes in this text and return all of it:\n\n{text}",
    lambda text, rng: (
        f"Fix spelling and grammar. Reply with the text:\n{_with_mistakes(text, rng)}"
    ),
    lambda text, rng: f"Proofread this for me, please.\n\n{_with_mistakes(text, rng)}",
    lambda text, rng: (
        f'Replace the word "{max(text.split(), key=len)}" by "{rng.choice(THINGS)}" everywhere '
        f"and give back the whole text.\n\n{text}"
    ),
)
TO_TRANSLATE: tuple[Turn, ...] = (
    lambda text, rng: f"Translate into {rng.choice(LANGUAGES)}:\n\n{_first(text)}",
    lambda text, rng: f"How do you say this in {rng.choice(LANGUAGES)}? {_first(text)}",
    lambda text, rng: f"Please translate the text into {rng.choice(LANGUAGES)}.\n\n{text}",
)
TO_ENGLISH: tuple[Turn, ...] = (
    lambda text, _: f"Translate into English:\n\n{text}",
    lambda text, _: f"What does this mean in English?\n\n{text}",
    lambda text, _: f'"{_first(text)}" Put this into natural English.',
)
TO_JSON: tuple[Turn, ...] = (
    lambda text, _: f'Give the topic, the keywords and a title of this text as JSON:\n"{text}"',
    lambda text, _: f"{text}\n\nReply with a JSON object: title, summary, names (list).",
    lambda text, rng: (
        f"Extract {', '.join(rng.sample(('people', 'places', 'dates', 'amounts', 'topics'), 3))} "
        f"as JSON, nothing else.\n\n{text}"
    ),
)
ABOUT_CODE: tuple[Turn, ...] = (
    lambda code, _: f"Explain what this code does:\n```python\n{code}```",
    lambda code, _: f"Add a docstring to this function and show it:\n```python\n{code}```",
    lambda code, _: f"Add type hints and return the whole code:\n```python\n{code}```",
    lambda code, _: f"Rename the variables to clearer ones:\n```python\n{code}```",
    lambda code, _: f"Find possible bugs in this function:\n```python\n{code}```",
    lambda code, rng: (
        f"Change this so that it {rng.choice(('logs what it does', 'checks its arguments'))}, and "
        f"print the complete code.\n\n```python\n{code}```"
    ),
    lambda code, _: f"Write unit tests with pytest for this.\n```python\n{code}```",
    lambda code, _: f"Translate this function to JavaScript.\n```python\n{code}```",
)


def from_sources(found: list[Question], rng: Random) -> str:
    """A question to be answered from numbered texts, one of which does."""
    question = rng.choice(found)[0]
    texts = "\n\n".join(f"[{n}] {answer}" for n, (_, answer) in enumerate(found, 1))
    ask = rng.choice((
        "Answer from the texts below only, and name the one you used.",
        "Use these sources to answer. If they do not tell, say so.",
        "Here are some documents. Answer the question with them.",
    ))  # fmt: skip
    return rng.choice((f"{ask}\n\n{texts}\n\nQuestion: {question}",
                       f"{ask}\n\nQuestion: {question}\n\n{texts}"))  # fmt: skip


def _person(rng: Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"


def record(rng: Random) -> str:
    """A short note full of facts, to be turned into JSON or answered."""
    good, day, person = rng.choice(GOODS), rng.randint(1, 28), _person(rng)
    number = f"{rng.choice('ABKQ')}{rng.randint(1000, 99999)}"
    note = rng.choice((
        f"Hello,\n\non {day} {rng.choice(MONTHS)} I bought a {good} from you for "
        f"{rng.randint(12, 480)} euros, order {number}. It stopped working after "
        f"{rng.randint(2, 9)} days. Please send a new one or give me my money back.\n\n{person}",
        f"{person} called on {rng.choice(DAYS)} at {rng.randint(8, 17)}:{rng.randint(10, 59)} "
        f"about ticket {number}. The {good} arrived damaged. Phone 0{rng.randint(10**8, 10**9)}.",
        f"Meeting at {rng.choice(PLACES)}, {rng.choice(DAYS)} {day} {rng.choice(MONTHS)}. Present: "
        f"{person}, {_person(rng)}, {_person(rng)}. Decided: we order {rng.randint(3, 60)} "
        f"{rng.choice(THINGS)} and {person} asks for the price. Next meeting in two weeks.",
    ))  # fmt: skip
    fields = ("name", "date", "order number", "product", "problem", "wish", "place", "amount")
    keys = ", ".join(rng.sample(fields, rng.randint(3, 5))).replace("order number", "order_number")
    return rng.choice((
        f"Extract {keys} from this message as JSON.\n\n{note}",
        f"Turn the note into a JSON object with the keys {keys}. Use null for what is missing."
        f"\n\n{note}",
        f"Write a polite answer to this:\n\n{note}",
        f"{note}\n\nGive me the above as YAML with {keys}.",
        f"Here is an example: {json.dumps({'name': _person(rng), 'amount': rng.randint(1, 99)})}. "
        f"Make the same of this text:\n{note}",
    ))  # fmt: skip


def writing(rng: Random) -> str:
    """A text to be written."""
    one, two = rng.sample(NAMES, 2)
    good, place, day = rng.choice(GOODS), rng.choice(PLACES), rng.choice(DAYS)
    what = rng.choice((
        f"a mail to my landlord {one} because the {good} in the flat is broken",
        f"an invitation to a party at {place} on {day}",
        f"a mail to my team: the meeting on {day} is cancelled because {one} is ill",
        f"a short story about {one}, who finds a {good} in {place}",
        f"an advertisement for a used {good}, {rng.randint(2, 9)} years old, "
        f"{rng.randint(10, 200)} dollars",
        f"a review of a {good} that I like but which is too loud",
        f"a speech of one minute for the birthday of {one}, who works at {place}",
        f"a thank-you note to {two} for the help with the {good}",
        f"a poem about a {good} and the month of {rng.choice(MONTHS)}",
        f"a complaint to {place} about the noise on {day} nights",
        f"a dialogue between {one} and {two} who both want the last {good}",
        f"a plan for a week of training for {one}, who wants to run {rng.randint(5, 20)} km",
        f"a packing list for {rng.randint(2, 9)} days with a {good} and two children",
    ))  # fmt: skip
    return f"{rng.choice(('Write', 'Please write', 'I need', 'Can you draft'))} {what}."


def programming(rng: Random) -> str:
    """A program to be written."""
    what = rng.choice(
        (
            "reads a CSV file and prints the {n} rows with the largest value in a given column",
            "counts how often each word occurs in a text file and shows the {n} most frequent",
            "renames the files of a folder to lower case, with an option that only shows it",
            "finds duplicate files under a folder by their hash",
            "merges two sorted lists without using sort",
            "checks whether a string is a valid IPv4 address",
            "turns a number between 1 and {n}00 into words",
            "downloads a list of URLs with at most {n} at a time",
            "keeps the last {n} lines of a log file and deletes the rest",
            "solves the towers of Hanoi for {n} disks",
            "converts a nested dictionary into flat keys joined by dots",
            "groups a list of records by a key and adds up the amounts",
            "splits a list into {n} parts of nearly equal size",
            "computes the moving average of the last {n} values",
            "parses dates in three formats and returns them in ISO format",
            "prints a calendar of one month",
        )
    ).format(n=rng.randint(2, 12))
    how = rng.choice((
        "", " Use the standard library only.", " Explain how it works.", " Show an example of use.",
        " Add type hints.", " Keep it short.", " Handle errors.",
    ))  # fmt: skip
    kind = rng.choice((
        "a Python function that", "a Python script that", "a JavaScript function that",
        "a class in Python that", "a Bash script that", "a Go program that",
    ))  # fmt: skip
    return f"{rng.choice(('Write', 'Please write', 'Show me'))} {kind} {what}.{how}"


def comparing(rng: Random, found: list[Question]) -> str:
    """A question of knowledge."""
    one, two = rng.sample((
        "rain", "snow", "a comet", "a planet", "butter", "cheese", "copper", "iron", "a virus",
        "a violin", "a guitar", "the heart", "the lungs", "a river", "a glacier", "bees", "wasps",
        "inflation", "interest", "a novel", "a poem", "granite", "sand", "vinegar", "yeast",
        "a battery", "a magnet", "the Moon", "the Sun", "a lens", "a mirror", "oak", "bamboo",
    ), 2)  # fmt: skip
    return rng.choice((
        f"What is the difference between {one} and {two}?",
        f"How does {one} come about, and what has {two} to do with it?",
        f"Explain {one} to a child of {rng.randint(6, 12)}.",
        f"Why is {one} important? Name {rng.randint(2, 5)} reasons.",
        f"Tell me about the history of {one} in a few sentences.",
        f"Give me {rng.randint(3, 6)} facts about {one} and {two}.",
        found[0][0],
        found[0][0],
    ))  # fmt: skip


def sums(rng: Random) -> str:
    """A word problem."""
    one, two = rng.sample(NAMES, 2)
    thing, a = rng.choice(THINGS), rng.randint(3, 40)
    b, c, d = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 12)
    problem = rng.choice((
        f"{one} has {a} {thing} and buys {b} boxes of {c} more. How many {thing} are there?",
        f"A shop sells {thing} for {b} dollars each. {one} buys {c} and pays with a {a + 80} "
        "dollar bill. How much change is due?",
        f"{one} walks {b} km every day and {two} walks {c} km. How far do they walk together "
        f"in {a} days?",
        f"{a * b} {thing} are shared equally among {b} people. {one} gives {two} half of a "
        f"share. How many {thing} does {two} have then?",
        f"Solve for x: {b}x + {a} = {b * c + a}.",
        f"What is {a}% of {b * 50}?",
        f"A train leaves at {b}:{a + 10} and takes {c} hours and {a} minutes. When does it arrive?",
        f"A recipe for {b} people needs {a * 10} g of flour. How much for {c + b} people?",
        f"{one} earns {a} dollars an hour for {d} hours a day, {two} earns {a + c} dollars for "
        f"{d - 1} hours. Who earns more in {b} days, and by how much?",
        f"A garden is {a} m long and {b + c} m wide. A fence costs {d} dollars a meter. What does "
        "the fence around it cost?",
        f"A tank holds {a * b * 10} liters. A pump takes {d * b} liters a minute. How long until "
        "it is empty?",
        f"{one} reads {b * c} pages a day, then {d} pages more each day. How many pages after "
        f"{b} days?",
        f"A coat costs {a * 10} dollars. It is reduced by {b * 5}% and later by another "
        f"{c * 5}%. What does it cost now?",
        f"The sum of two numbers is {a + d} and their difference is {abs(a - d)}. Which are they?",
    ))  # fmt: skip
    return problem + rng.choice(("", " Show your steps.", " Explain.", " Think step by step."))
