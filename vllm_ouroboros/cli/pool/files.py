"""Building, describing and merging the files of phrase pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from vllm_ouroboros.cli.inputs import InputError
from vllm_ouroboros.phrases import file_rows
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import CONTEXTS, FIRST_HASH
from vllm_ouroboros.phrases.insertion import insert_text
from vllm_ouroboros.phrases.merging import union
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_file import PoolFile, tokenizer_hash

LONGEST = 2**16
"""Tokens of a text that are encoded and inserted at once."""


def file_for(path: Path, model: str) -> tuple[PoolFile, Callable[[str], list[int]]]:
    """The file of a model's phrases, and what makes tokens of a text.

    Raises:
        InputError: there is no such model, or it has no tokenizer.
    """
    from vllm.config import ModelConfig
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        config = ModelConfig(model=model)
        tokenizer = cached_tokenizer_from_config(config)
    except Exception as error:
        why = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise InputError(f"--tokenizer {model}: cannot be loaded ({why:.200})") from None
    size, known = config.get_vocab_size(), tokenizer_hash(tokenizer.get_vocab())
    file = PoolFile(path, vocab_size=size, tokenizer_hash=known)
    return file, lambda text: tokenizer.encode(text, add_special_tokens=False)


def insert_texts(pool: PhrasePool, texts: Iterable[str], encode: Callable[[str], list[int]]) -> int:
    """Feed texts to a pool as requests feed it what they wrote; returns their tokens."""
    total = 0
    for number, text in enumerate(texts, 1):
        ids = np.asarray(encode(text), np.int32)
        total += len(ids)
        for first in range(0, len(ids), LONGEST):
            part = ids[first : first + LONGEST]
            insert_text(
                pool.arrays, np.int64(0), part, 0, len(part), int(PhraseSource.HISTORY),
                np.int32(number % 2**31), len(CONTEXTS),
            )  # fmt: skip
    return total


def opened(path: Path) -> PoolFile:
    """The pool file at a path, whatever tokenizer it is for.

    Raises:
        InputError: there is none, or it is something else.
    """
    try:
        return PoolFile.at(path)
    except ValueError as error:
        raise InputError(str(error)) from None


def describe(path: Path) -> dict[str, object]:
    """What a pool's file holds."""
    file = opened(path)
    rows = file.rows()
    keys = rows["keys"].astype(np.uint32).astype(np.int64)
    lengths, sources = rows["lengths"], rows["sources"]
    return {
        "file": str(file.path),
        "bytes": file.path.stat().st_size,
        "phrases": len(keys),
        "keys": len(np.unique(keys)),
        "keys of one token": len(np.unique(keys[keys < FIRST_HASH])),
        "tokens of a phrase": round(float(lengths.mean()), 2) if len(lengths) else 0.0,
        "longest phrase": int(lengths.max(initial=0)),
        "seen more than once": round(float((rows["times"] > 1).mean()), 3) if len(keys) else 0.0,
        **{f"from {s.name.lower()}": int((sources == s).sum()) for s in PhraseSource},
        "vocabulary": file.vocab_size,
        "tokenizer": file.tokenizer_hash,
    }


def merge(paths: list[Path], out: Path, max_keys: int, max_phrases: int) -> int:
    """Write the union of pool files; returns its phrases. Later files count as newer.

    Raises:
        InputError: one cannot be read, or is for another tokenizer.
    """
    files = [opened(path) for path in paths]
    first = files[0]
    for file in files[1:]:
        if file.tokenizer_hash != first.tokenizer_hash or file.vocab_size != first.vocab_size:
            raise InputError(f"{file.path} is for another tokenizer than {first.path}")
    rows = dict(first.rows())
    for file in files[1:]:
        rows = union(file.rows(), rows, max_keys, max_phrases, news=False)
    target = PoolFile(out, vocab_size=first.vocab_size, tokenizer_hash=first.tokenizer_hash)
    save(target, rows)
    return len(rows["keys"])


def save(file: PoolFile, rows: dict[str, np.ndarray]) -> None:
    """Write rows in the place of what a pool's file has.

    Raises:
        InputError: they cannot be written.
    """
    try:
        file.put(rows)
    except (OSError, ValueError) as error:
        raise InputError(f"--out {file.path}: cannot be written ({error})") from None


def rows_of(pool: PhrasePool, vocab_size: int) -> dict[str, np.ndarray]:
    """The rows of a pool's shared phrases."""
    return file_rows.rows_of(file_rows.snapshot(pool.arrays), vocab_size)
