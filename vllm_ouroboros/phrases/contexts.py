"""Keys of the pool: the last token of a text, or a hash of its last few (compiled)."""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.phrases.compiling import compiled

CONTEXTS = (1, 2, 4, 8, 24)
"""Tokens in a row that a key may stand for; tuned on traces of the shipped pair by
scripts/simulate."""
FIRST_HASH = 2**31
"""Keys below are tokens, those from here to 2^32 stand for several in a row."""
_HASH_BITS = 28  # what is left of a key behind the number of its context


@compiled
def key_of(text, end, context):
    """Key of the last `CONTEXTS[context]` tokens of ``text[:end]``, which must have so many."""
    if context == 0:
        return np.int64(text[end - 1])
    x = np.uint64(context)
    for i in range(end - CONTEXTS[context], end):
        x = (x ^ np.uint64(text[i])) * np.uint64(0x9E3779B97F4A7C15)
        x ^= x >> np.uint64(29)
    hashed = np.int64(x & np.uint64(2**_HASH_BITS - 1))
    return FIRST_HASH + (np.int64(context) << _HASH_BITS) + hashed
