"""Prompts for engines, and how their outputs compare with vanilla's."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

MODULES = (
    "argparse", "textwrap", "json.decoder", "json.encoder", "shutil", "tempfile", "random",
    "statistics", "difflib", "heapq", "bisect", "calendar", "configparser", "csv", "dataclasses",
    "fractions", "glob", "gzip", "inspect", "ipaddress", "logging", "mailbox", "mimetypes",
)  # fmt: skip
LENGTHS = range(24, 201)  # tokens of a prompt


def stdlib_prompts(count: int) -> list[list[int]]:
    """Token ids of functions' signatures and docstrings in Python's standard library."""
    from tokenizers import Tokenizer

    import vllm_ouroboros

    pair = Path(vllm_ouroboros.__file__).parent / "assets" / "tiny-code"
    tokenizer = Tokenizer.from_file(str(pair / "target" / "tokenizer.json"))
    found = (tokenizer.encode(text, add_special_tokens=False).ids for text in stdlib_texts())
    # after the token that begins a text
    return list(islice(([0, *ids] for ids in found if len(ids) + 1 in LENGTHS), count))


def stdlib_texts() -> Iterator[str]:
    """Functions' signatures and docstrings, one of each module in turn."""
    texts = [signatures(name) for name in MODULES]
    for turn in range(max(map(len, texts))):
        yield from (found[turn] for found in texts if turn < len(found))


def signatures(module: str) -> list[str]:
    """Signature and docstring of each documented function, in the order of the file."""
    source = inspect.getsource(importlib.import_module(module))
    lines = source.split("\n")
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            end = node.body[0].end_lineno or node.lineno
            found.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).rstrip())
    return found


def compare(
    ours: list[list[int]],
    vanilla: list[list[int]],
    best: list[list[dict[str, float]]],
    near: float,
) -> dict:
    """How many outputs are equal, differ from a near-tie on, or are different.

    Args:
        ours: token ids of each output.
        vanilla: the same of vanilla; as many.
        best: log-probabilities of vanilla's best tokens at each place, by token id; at least as
            many outputs. They come from a run of their own, which must agree up to the place.
        near: the greatest difference of log-probabilities of a near-tie; 0: there are none.

    Returns:
        ``equal``, ``near_ties``, ``different`` and ``gaps``, the differences at those places (None
        where it is not known).
    """
    result: dict = {"equal": 0, "near_ties": 0, "different": 0, "gaps": []}
    for own, other, places in zip(ours, vanilla, best, strict=False):
        if own == other:
            result["equal"] += 1
            continue
        shorter = min(len(own), len(other))
        place = next((i for i in range(shorter) if own[i] != other[i]), shorter)
        gap = None
        if place < min(shorter, len(places)):
            known = places[place]
            if str(own[place]) in known and str(other[place]) in known:
                gap = abs(known[str(other[place])] - known[str(own[place])])
        result["gaps"].append(None if gap is None else round(gap, 4))
        result["near_ties" if gap is not None and near and gap <= near else "different"] += 1
    return result
