"""User turns for the training of draft heads, about texts that every Python installation holds and
about what the target has written itself.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from head_texts import answered, documentation, paragraphs, purposes, sources
from head_turns import (
    ABOUT_CODE,
    ABOUT_PROSE,
    TO_CORRECT,
    TO_ENGLISH,
    TO_JSON,
    TO_TRANSLATE,
    Question,
    Turn,
    comparing,
    from_sources,
    programming,
    record,
    sums,
    writing,
)

QUESTION_WORDS, SOURCE_WORDS = range(4, 40), range(30, 120)
DOCUMENTATION = 4  # one paragraph of it to so many that the target wrote
SOURCES = range(3, 5)  # documents of a question about documents


class Shuffled:
    """Texts in random order, over and over."""

    def __init__(self, texts: list[str], rng: random.Random) -> None:
        self._texts, self._at = sorted(set(texts)), -1
        rng.shuffle(self._texts)

    def __call__(self) -> str:
        self._at = (self._at + 1) % len(self._texts)
        return self._texts[self._at]


def user_turns(count: int, rng: random.Random, pairs: list[Question]) -> list[str]:
    """So many user turns, as many of one kind as of another.

    Args:
        count: how many, repeats included.
        rng: choices.
        pairs: first user turns and the target's answers; without any there are fewer kinds.
    """
    prose = [*documentation()]
    said = [text for _, answer in pairs for text in paragraphs(answer)]
    if said:  # everyday subjects come first
        prose = [*said, *rng.sample(prose, min(len(prose), len(said) // DOCUMENTATION))]
    passage, code, wanted = (Shuffled([*some], rng) for some in (prose, sources(), purposes()))
    asked = [
        (question, answer) for question, answer in pairs
        if len(question.split()) in QUESTION_WORDS and len(answer.split()) in SOURCE_WORDS
    ]  # fmt: skip
    foreign = [answer for question, answer in pairs if question.startswith("Translate into ")]

    def about(turns: tuple[Turn, ...], text: Callable[[], str]) -> Callable[[], str]:
        return lambda: rng.choice(turns)(text(), rng)

    kinds = [
        about(ABOUT_PROSE, passage), about(TO_CORRECT, passage), about(TO_TRANSLATE, passage),
        about(TO_JSON, passage), about(ABOUT_CODE, code), about(ABOUT_CODE, code),
        lambda: f"Write a Python function for this: {wanted()}.",
        lambda: programming(rng), lambda: record(rng), lambda: writing(rng), lambda: sums(rng),
    ]  # fmt: skip
    if foreign:
        kinds.append(about(TO_ENGLISH, Shuffled(foreign, rng)))
    if len(asked) >= max(SOURCES):
        kinds.append(lambda: from_sources(rng.sample(asked, rng.choice(SOURCES)), rng))
        kinds.append(lambda: comparing(rng, asked))
    turns = [kinds[n % len(kinds)]() for n in range(count)]
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
    conversations: Annotated[
        Path | None, typer.Option(help="Of train_head.py data: turns about what the target wrote.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Folder or hub id of the target.")] = None,
    seed: Annotated[int, typer.Option(help="Of their order and choice.")] = 0,
) -> None:
    """Writes user turns, or with --code texts to be continued."""
    rng = random.Random(seed)
    pairs: list[Question] = []
    if conversations is not None:
        if target is None:
            raise typer.BadParameter("--conversations needs --target, whose tokens they are")
        from transformers import AutoTokenizer

        pairs = [*answered(conversations, AutoTokenizer.from_pretrained(target))]
    found = beginnings(count, rng) if code else user_turns(count, rng, pairs)
    with out.open("w") as file:
        file.writelines(json.dumps({"prompt": text}) + "\n" for text in found)
    print(f"{len(found)} prompts in {out}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
