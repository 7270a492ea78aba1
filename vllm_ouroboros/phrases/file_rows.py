"""A phrase pool as rows, one a phrase: what a pool's file holds.

Rows stand in the order in which inserting them fills a pool, so that the last row counts most. They
do not depend on the G, β or capacity of the pool they came from. Only phrases of scope 0, which all
requests share, ever become rows: the other scopes belong to tenants or to one request.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource, PoolArrays
from vllm_ouroboros.phrases.compiling import compiled
from vllm_ouroboros.phrases.contexts import FIRST_HASH
from vllm_ouroboros.phrases.insertion import insert
from vllm_ouroboros.phrases.pool import PhrasePool

MAX_WIDTH = 32
"""Tokens that a phrase of a file may have: the most that the option ``phrase_len`` allows."""
DTYPES = {
    "keys": "int32", "lengths": "int32", "sources": "int8", "times": "uint8", "tokens": "int32",
}  # fmt: skip
"""Columns of m rows and their types: key [m] (a token, or below zero what stands for several),
length [m], `PhraseSource` [m] and times seen [m] of a phrase; its tokens [m, β], then zeros.
"""


def snapshot(pool: PoolArrays) -> tuple[np.ndarray, ...]:
    """Copies of the slots of scope 0 (a free slot has the key -1), for `rows_of`."""
    slots = np.nonzero(pool.keys >> 32 == 0)[0]
    return tuple(column[slots] for column in pool[:7])  # keys to tokens


def rows_of(slots: tuple[np.ndarray, ...], vocab_size: int) -> dict[str, np.ndarray]:
    """The rows of a `snapshot`; ids outside the vocabulary, which `check` refuses, are left out.

    Free places hold what was there before, of any scope: none of it may get into a row.
    """
    keys, used, counts, lengths, sources, times, tokens = slots
    order, room = np.argsort(used), tokens.shape[1]
    # backwards, since the first phrase of a slot is to be inserted last
    slot, place = np.nonzero(np.arange(room)[::-1] < counts[order, None])
    slot, place = order[slot], room - 1 - place
    keys, lengths, tokens = keys[slot], lengths[slot, place], tokens[slot, place]
    tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] = 0
    known = ((tokens >= 0) & (tokens < vocab_size)).all(1)
    known &= (keys < vocab_size) | (keys >= FIRST_HASH)
    signed = keys.astype(np.uint32).view(np.int32)
    rows = signed, lengths, sources[slot, place], times[slot, place], tokens
    return {name: column[known] for name, column in zip(DTYPES, rows, strict=True)}


def check(tensors: Mapping[str, np.ndarray], vocab_size: int) -> None:
    """Raises ValueError unless the rows fit together and every value may be trusted."""
    kinds = {name: str(array.dtype) for name, array in tensors.items()}
    *columns, shape = (tensors[name].shape for name in DTYPES)
    if kinds != DTYPES or len(shape) != 2 or any(column != shape[:1] for column in columns):
        raise ValueError("other tensors than expected")
    if shape[1] > MAX_WIDTH:  # a union makes all rows as wide
        raise ValueError(f"phrases of more than {MAX_WIDTH} tokens")
    bounds = {
        "keys": (-FIRST_HASH, vocab_size),
        "lengths": (1, shape[1] + 1),
        "sources": (0, len(PhraseSource)),
        "tokens": (0, vocab_size),
    }  # any number of times will do
    for name, (low, high) in bounds.items():
        if ((tensors[name] < low) | (tensors[name] >= high)).any():
            raise ValueError(f"{name} out of range")


def fill(pool: PhrasePool, rows: Mapping[str, np.ndarray]) -> None:
    """Insert rows; the counts of insertions stay as they are."""
    inserted = pool.arrays.inserted.copy()
    _insert_all(pool.arrays, *(rows[name] for name in DTYPES))
    pool.arrays.inserted[:] = inserted


@compiled
def _insert_all(pool, keys, lengths, sources, times, tokens):
    texts = tokens.ravel()
    for row in range(keys.shape[0]):
        key = np.int64(keys[row]) & 0xFFFFFFFF
        first = row * tokens.shape[1]
        seen, nobody = np.int64(times[row]), np.int32(0)
        insert(pool, 0, key, texts, first, lengths[row], sources[row], seen, nobody)
