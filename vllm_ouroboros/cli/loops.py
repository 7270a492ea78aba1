"""Whether a text repeats itself, which flatters any speculative decoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LOOP_NGRAM, LOOP_COUNT = 4, 8
"""A text loops if one token 4-gram occurs more than 8 times."""


def loops(token_ids: Sequence[int]) -> bool:
    """Whether a text loops, see `LOOP_COUNT`."""
    return max_ngram_count(token_ids) > LOOP_COUNT


def max_ngram_count(token_ids: Sequence[int], n: int = LOOP_NGRAM) -> int:
    """How often the most frequent n-gram occurs; 0 in a text shorter than that."""
    grams = Counter(tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1))
    return max(grams.values(), default=0)
