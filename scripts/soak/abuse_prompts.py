"""Prompts for a chat model, of any length: questions, notes and code, from a few words' choices."""

from __future__ import annotations

import random
from pathlib import Path

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
TURN, REPLY = "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
"""What the model's chat template puts around a question."""
QUESTIONS = (
    "Explain {topic} to a {reader} in {count} sentences.",
    "Write a letter to the {place} that asks them to {errand} before {day}.",
    "What should I think of before I {errand}? Give me {count} points, the main one first.",
    "Compare {topic} with {other}. Which one would you choose for a {place}, and why?",
    "I have {count} hours on {day} and want to {errand}. Make me a plan, hour by hour.",
    "Tell a short story about a {reader} who learns about {topic} in a {place}.",
    "Summarize the notes below in {count} lines and leave out the names.",
    "Translate the last note into plain English, as you would for a {reader}.",
    "Which questions would a {reader} ask about {topic}? Answer the first {count}.",
    "Give me a recipe for {count} people with {food} and {dish}, and how long it takes.",
)
NOTES = (
    "On {day} the {place} called about {topic}; somebody has to {errand}.",
    "{name} wrote that {topic} took {count} weeks and cost more than {other} did.",
    "The {reader} from the {place} would rather hear about {other} next {day}.",
    "{name} and {friend} will {errand} once the {food} has come, not before {day}.",
    "There were {count} complaints about {topic} and none about {other}.",
    "Remember: {food} on {day}, {dish} for {count}, and call {name} back.",
)
CODE = (
    "Write a Python function {verb}_{noun}(values, limit={count}) that {does}.\n",
    "Find the mistake in this function and explain it:\n\n"
    "def {verb}_{noun}(values):\n    total = {count}\n    for value in values:\n"
    "        if value > total:\n            total += value\n    return values\n",
    "Add a docstring and tests to this class:\n\n"
    "class {title}:\n    def __init__(self, {noun}):\n        self.{noun} = {noun}\n\n"
    "    def {verb}(self):\n        return sorted(self.{noun})[:{count}]\n",
    "What does this SQL query do?\n\nSELECT {noun}, COUNT(*) FROM {verb}_log\n"
    "WHERE {noun} IS NOT NULL\nGROUP BY {noun}\nHAVING COUNT(*) > {count};\n",
    "Rewrite this loop with a comprehension:\n\n{noun} = []\nfor i in range({count}):\n"
    "    if i % 2:\n        {noun}.append({verb}(i))\n",
)
WORDS = {
    "topic": ("tides", "compound interest", "bicycle gears", "sourdough", "the water cycle",
              "version control", "solar panels", "chess openings", "rail freight"),
    "other": ("wind turbines", "paper maps", "fixed prices", "night trains", "rain barrels",
              "spreadsheets", "herb gardens", "public libraries"),
    "reader": ("child of ten", "retired baker", "new colleague", "nurse", "bus driver", "tourist"),
    "place": ("town hall", "bakery", "school", "museum", "harbour", "garage", "clinic"),
    "errand": ("move house", "repair the roof", "book the hall", "sort the archive",
               "plant the hedge", "renew the licence", "invite the neighbours"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "name": ("Mara", "Jonas", "Edith", "Tomas", "Leila", "Pavel"),
    "friend": ("Ana", "Oskar", "Ruth", "Dario", "Mina", "Silas"),
    "food": ("lentils", "potatoes", "tomatoes", "rice", "spinach", "mushrooms"),
    "dish": ("flat bread", "a soup", "a salad", "dumplings", "a pie"),
    "verb": ("merge", "count", "filter", "parse", "rank", "group", "trim"),
    "noun": ("orders", "tokens", "routes", "prices", "labels", "events", "shards"),
    "title": ("Ledger", "Queue", "Catalogue", "Timetable", "Inventory"),
    "does": ("returns the largest of them in order", "drops those that come twice",
             "counts how often each of them comes", "splits them into runs that grow"),
}  # fmt: skip


class ChatPrompts:
    """Prompts in a model's tokens.

    Args:
        model: folder with its tokenizer.

    Attributes:
        vocabulary: size of it.
    """

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.vocabulary = self._tokenizer.get_vocab_size()
        self._head, self._reply = self._ids(SYSTEM + TURN), self._ids(REPLY)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def draw(self, rng: random.Random, tokens: int) -> str | list[int]:
        """A prompt of about so many tokens, as text or as ids."""
        ids = self.exact(rng, tokens)
        if rng.random() < 0.3:
            return ids
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def exact(self, rng: random.Random, tokens: int) -> list[int]:
        """Ids of a prompt of exactly so many tokens; a short one is a piece of a question."""
        room = tokens - len(self._head) - len(self._reply)
        if room < 8:
            return self._body(rng, tokens)
        return [*self._head, *self._body(rng, room), *self._reply]

    def _body(self, rng: random.Random, tokens: int) -> list[int]:
        """A question, and as many notes in front of it as there is room for."""
        ids = self._ids(fill(rng, rng.choice(QUESTIONS if rng.random() < 0.6 else CODE)))
        while len(ids) < tokens:
            ids = self._ids(fill(rng, rng.choice(NOTES)) + "\n") + ids
        return ids[-tokens:]


class Worded:
    """The prompts of one request: words come from a source of their own, not from the caller's.

    Args:
        prompts: to draw from.
        seed: of the words.
    """

    def __init__(self, prompts: ChatPrompts, seed: str) -> None:
        self._prompts, self.vocabulary = prompts, prompts.vocabulary
        self._words = random.Random(f"words:{seed}")

    def draw(self, rng: random.Random, tokens: int) -> str | list[int]:
        """As `ChatPrompts.draw`; the caller's source stays where it is."""
        return self._prompts.draw(self._words, tokens)

    def exact(self, rng: random.Random, tokens: int) -> list[int]:
        """As `ChatPrompts.exact`; the caller's source stays where it is."""
        return self._prompts.exact(self._words, tokens)


def fill(rng: random.Random, template: str) -> str:
    """A template with words in its places."""
    words = {place: rng.choice(choices) for place, choices in WORDS.items()}
    return template.format(**words, count=rng.randint(2, 40))
