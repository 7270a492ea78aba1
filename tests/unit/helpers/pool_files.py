"""Pools and their files, for tests of what is read and written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.eviction import WAYS, first_slot
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_file import PoolFile
from vllm_ouroboros.phrases.pool_format import FORMAT, FORMAT_VERSION, PoolFormat, tokenizer_hash

VOCAB = 31
HASH = tokenizer_hash({"a": 0, "b": 1})
METADATA = {
    "format": FORMAT,
    "format_version": str(FORMAT_VERSION),
    "plugin_version": "0",
    "vocab_size": str(VOCAB),
    "tokenizer_hash": HASH,
}


def make(path, vocab_size: int = VOCAB, **options) -> PoolFile:
    return PoolFile(path, PoolFormat(vocab_size, HASH), **options)


def beside(path: Path) -> list[Path]:
    """What a file's folder holds, but for its lock."""
    return [one for one in path.parent.iterdir() if one.suffix != ".lock"]


def small_pool(*phrases: list[int]) -> PhrasePool:
    """A pool of one key, 7."""
    pool = PhrasePool(64, 3, 4)
    for phrase in phrases or ([1, 2, 3],):
        pool.insert(7, phrase, PhraseSource.PROMPT)
    return pool


def loaded(path, **changes) -> PhrasePool:
    pool = PhrasePool(64, 3, 4)
    make(path, **changes).load(pool)
    return pool


def ordered(pool: PhrasePool) -> list[tuple[int, list[tuple[tuple[int, ...], int]]]]:
    """Keys by time of use, each with its phrases and their sources."""
    a = pool.arrays
    slots = np.nonzero(a.keys >= 0)[0]
    return [
        (
            int(a.keys[slot]),
            [
                (tuple(a.tokens[slot, g, : a.lengths[slot, g]].tolist()), int(a.sources[slot, g]))
                for g in range(a.counts[slot])
            ],
        )
        for slot in slots[np.argsort(a.stamps[slots])]
    ]


def cut(keys, pool: PhrasePool):
    """What of `ordered` another pool must hold."""
    slots, guesses, beta = pool.arrays.tokens.shape
    sets: dict[int, list[int]] = {}
    for key, _ in keys:
        sets.setdefault(int(first_slot(slots, key)), []).append(key)
    kept = {key for members in sets.values() for key in members[-WAYS:]}
    result = []
    for key, phrases in keys:
        if key in kept:
            unique: dict[tuple[int, ...], int] = {}
            for phrase, source in phrases:
                unique.setdefault(phrase[:beta], source)
            result.append((key, list(unique.items())[:guesses]))
    return result


def tensors(**changes) -> dict[str, np.ndarray]:
    """Two rows of a sound file, and what is changed in them."""
    return {
        "keys": np.array([3, 4], np.int32),
        "lengths": np.array([2, 1], np.int32),
        "sources": np.array([0, 3], np.int8),
        "times": np.array([1, 7], np.uint8),
        "tokens": np.array([[5, 6], [7, 0]], np.int32),
        **changes,
    }


def container(rows=None, **changes) -> bytes:
    return safetensors.numpy.save(tensors() if rows is None else rows, {**METADATA, **changes})
