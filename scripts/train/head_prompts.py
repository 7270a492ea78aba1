"""User turns about texts that every Python installation holds, for the training of draft heads.

Docstrings and sources of the standard library, the language reference and the descriptions of the
installed packages stand in for what users paste: they are to be summarised, asked about, translated
or edited. Numbers of the sums come from a seed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

MODULES = """
    argparse ast asyncio.queues asyncio.tasks base64 bisect calendar cmd code codecs collections
    configparser contextlib copy csv dataclasses datetime decimal difflib email.message enum
    filecmp fileinput fractions ftplib functools getopt gettext glob gzip heapq hmac html.parser
    http.client http.cookies http.server imaplib inspect ipaddress json.decoder json.encoder
    linecache locale logging logging.handlers mailbox mimetypes netrc numbers optparse os
    pathlib pickle pkgutil platform plistlib poplib pprint profile queue quopri random reprlib
    sched secrets selectors shelve shlex shutil smtplib socket socketserver sqlite3 statistics
    string subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback types
    typing unittest.case unittest.mock urllib.parse urllib.request urllib.robotparser uuid
    wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree zipfile
"""
LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese")
NAMES = ("Ana", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas")
THINGS = ("apples", "books", "tickets", "chairs", "stamps", "bottles", "pencils", "bricks")

ABOUT_PROSE: tuple[Callable[[str, random.Random], str], ...] = (
    lambda text, _: f"Summarize the following text in two sentences.\n\n{text}",
    lambda text, _: f"What are the main points of this passage?\n\n{text}",
    lambda text, _: f"{text}\n\nList three questions that this text answers, with the answers.",
    lambda text, _: f"Use only the text below to explain what it is about.\n\nText: {text}",
    lambda text, _: f"Rewrite this in simpler words:\n\n{text}",
    lambda text, _: f"Correct any mistakes in this text and return all of it:\n\n{text}",
    lambda text, rng: f"Translate into {rng.choice(LANGUAGES)}:\n\n{text.split('. ')[0]}",
    lambda text, _: f'Give the topic, the keywords and a title of this text as JSON:\n"{text}"',
)
ABOUT_CODE: tuple[Callable[[str, random.Random], str], ...] = (
    lambda code, _: f"Explain what this code does:\n```python\n{code}```",
    lambda code, _: f"Add a docstring to this function and show it:\n```python\n{code}```",
    lambda code, _: f"Add type hints and return the whole code:\n```python\n{code}```",
    lambda code, _: f"Rename the variables to clearer ones:\n```python\n{code}```",
    lambda code, _: f"Find possible bugs in this function:\n```python\n{code}```",
)


def prose() -> Iterator[str]:
    """Paragraphs of documentation, 30 to 150 words each."""
    from pydoc_data.topics import topics

    texts = [*topics.values()]
    texts += [inspect.getdoc(member) or "" for member in _members()]
    for package in importlib.metadata.distributions():
        texts.append(str(package.metadata.get_payload() or package.metadata["Description"] or ""))
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            words = paragraph.split()
            letters = sum(c.isalpha() or c.isspace() for c in paragraph)
            if 30 <= len(words) <= 150 and letters > 0.9 * len(paragraph):
                yield " ".join(words)


def sources() -> Iterator[str]:
    """Functions of 5 to 25 lines."""
    for member in _members():
        if inspect.isfunction(member):
            with suppress(OSError, TypeError):
                code = inspect.cleandoc("\n" + inspect.getsource(member)) + "\n"
                if 5 <= code.count("\n") <= 25:
                    yield code


def _members() -> Iterator[object]:
    for name in MODULES.split():
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
            for _, member in inspect.getmembers(module):
                if getattr(member, "__module__", None) == name:
                    yield member
                    if inspect.isclass(member):
                        yield from vars(member).values()


def tasks_to_code() -> Iterator[str]:
    """What to write a function for."""
    for member in _members():
        first = (inspect.getdoc(member) or "").partition("\n")[0].rstrip(".")
        if inspect.isfunction(member) and 5 <= len(first.split()) <= 20:
            yield f"Write a Python function for this: {first}."


def sums(rng: random.Random) -> Iterator[str]:
    """Word problems."""
    while True:
        one, two = rng.sample(NAMES, 2)
        thing, a = rng.choice(THINGS), rng.randint(3, 40)
        b, c = rng.randint(2, 9), rng.randint(2, 9)
        yield rng.choice((
            f"{one} has {a} {thing} and buys {b} boxes of {c} more. How many {thing} are there?",
            f"A shop sells {thing} for {b} dollars each. {one} buys {c} and pays with a {a + 80} "
            "dollar bill. How much change is due? Show your steps.",
            f"{one} walks {b} km every day and {two} walks {c} km. How far do they walk together "
            f"in {a} days?",
            f"{a * b} {thing} are shared equally among {b} people. {one} gives {two} half of a "
            f"share. How many {thing} does {two} have then? Explain.",
            f"Solve for x: {b}x + {a} = {b * c + a}.",
            f"What is {a}% of {b * 50}? Explain how you got it.",
        ))  # fmt: skip


def user_turns(count: int, rng: random.Random) -> list[str]:
    """Half of them about prose, the rest about code and sums."""
    pools = [sorted(set(found)) for found in (prose(), sources(), tasks_to_code())]
    for pool in pools:
        rng.shuffle(pool)
    texts, code, wanted = map(iter, pools)
    numbers = sums(rng)
    turns: list[str] = []
    for _ in range(count):
        kind = rng.random()
        found = None
        if kind < 0.5 and (text := next(texts, None)):
            found = rng.choice(ABOUT_PROSE)(text, rng)
        elif kind < 0.75 and (text := next(code, None)):
            found = rng.choice(ABOUT_CODE)(text, rng)
        elif kind < 0.85:
            found = next(wanted, None)
        turns.append(found or next(numbers))
    return [*dict.fromkeys(turns)]


def beginnings(count: int, rng: random.Random) -> list[str]:
    """First lines of functions."""
    found = []
    for code in sorted(set(sources())):
        lines = code.splitlines(keepends=True)
        found.append("".join(lines[: rng.randint(1, len(lines) // 2)]))
    rng.shuffle(found)
    return [*dict.fromkeys(found)][:count]


def main(
    out: Annotated[Path, typer.Option(help='JSON lines {"prompt": text}.')],
    count: Annotated[int, typer.Option(min=1, help="How many, at most.")] = 4000,
    code: Annotated[
        bool, typer.Option("--code", help="Beginnings of functions, for a target that is no chat.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of their order and choice.")] = 0,
) -> None:
    """Writes user turns, or with --code texts to be continued."""
    rng = random.Random(seed)
    found = beginnings(count, rng) if code else user_turns(count, rng)
    with out.open("w") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in found)
    print(f"{len(found)} prompts in {out}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
