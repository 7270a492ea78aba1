"""Building, describing and merging the files of phrase pools."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from vllm_ouroboros.cli.inputs import InputError
from vllm_ouroboros.phrases import file_rows
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import CONTEXTS, FIRST_HASH
from vllm_ouroboros.phrases.merging import union
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_file import PoolFile


def file_for(path: Path, model: str) -> tuple[PoolFile, Callable[[str], list[int]]]:
    """The file of a model's phrases, and what makes tokens of a text.

    Raises:
        InputError: there is no such model, or it has no tokenizer.
    """
    from vllm.config import ModelConfig
    from vllm.tokenizers import cached_tokenizer_from_config

    from vllm_ouroboros.integration.model_compat import reason
    from vllm_ouroboros.integration.persistence import file_of

    try:
        config = ModelConfig(model=model)
        tokenizer = cached_tokenizer_from_config(config)
    except Exception as error:
        raise InputError(f"--tokenizer {model}: cannot be loaded ({reason(error)})") from None
    return file_of(path, config), lambda text: tokenizer.encode(text, add_special_tokens=False)


def insert_texts(pool: PhrasePool, texts: Iterable[str], encode: Callable[[str], list[int]]) -> int:
    """Feed texts to a pool as requests feed it what they wrote; returns their tokens."""
    total = 0
    for text in texts:
        ids = encode(text)
        total += len(ids)
        pool.insert_text(ids, PhraseSource.HISTORY, contexts=len(CONTEXTS))
    return total


def read(path: Path) -> tuple[PoolFile, dict[str, np.ndarray]]:
    """The pool file at a path, whatever tokenizer it is for, and its rows.

    Raises:
        InputError: there is none, or it is something else, or damaged.
    """
    try:
        file = PoolFile.at(path)
        return file, file.rows()
    except ValueError as error:
        raise InputError(str(error)) from None


def describe(path: Path) -> dict[str, object]:
    """What a pool's file holds."""
    file, rows = read(path)
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
        "vocabulary": file.form.vocab_size,
        "tokenizer": file.form.tokenizer_hash,
    }


def merge(paths: list[Path], out: Path, max_keys: int, max_phrases: int) -> int:
    """Write the union of pool files; returns its phrases. Later files count as newer.

    Raises:
        InputError: one cannot be read, or is for another tokenizer.
    """
    (first, rows), *others = map(read, paths)
    for file, newer in others:
        if file.form != first.form:
            raise InputError(f"{file.path} is for another tokenizer than {first.path}")
        rows = union(newer, rows, max_keys, max_phrases, news=False)
    save(PoolFile(out, first.form), rows)
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
