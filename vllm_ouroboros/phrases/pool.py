"""The phrase pool: short continuations, found by the token they follow.

A set-associative cache in preallocated arrays. A key (scope and token) hashes to one set of
`WAYS` slots; a slot holds up to G phrases of up to β tokens: first those that stood in real text
or that the target confirmed, then guesses of the Jacobi window, both newest first.
Insert and lookup touch one set: O(WAYS + G·β), whatever the pool holds. A full set evicts the
key that was used longest ago, so memory never grows.

The functions are compiled and take `PoolArrays`, so that the drafting code can use them inside
its own compiled loops; `PhrasePool` is the same for Python callers.
"""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource, PoolArrays
from vllm_ouroboros.phrases.eviction import WAYS, find
from vllm_ouroboros.phrases.insertion import insert, insert_text


class PhrasePool:
    """A pool of at most ``capacity`` keys, rounded up to whole sets.

    Memory in bytes: ``capacity * (20 + G * (10 + 4 * β))``; see `bytes`.
    """

    def __init__(self, capacity: int, guess_set_size: int, phrase_len: int) -> None:
        slots = -(-capacity // WAYS) * WAYS
        # written, not zeros: the kernel hands out pages when they are first written, which took
        # requests longer than all else that is done to insert a phrase
        self.arrays = PoolArrays(
            keys=np.full(slots, -1, np.int64),
            stamps=np.full(slots, 0, np.int64),
            counts=np.full(slots, 0, np.int32),
            lengths=np.full((slots, guess_set_size), 0, np.int32),
            sources=np.full((slots, guess_set_size), 0, np.int8),
            times=np.full((slots, guess_set_size), 0, np.uint8),
            tokens=np.full((slots, guess_set_size, phrase_len), 0, np.int32),
            owners=np.full((slots, guess_set_size), 0, np.int32),
            clock=np.zeros(1, np.int64),
            inserted=np.zeros(len(PhraseSource), np.int64),
            faults=np.zeros(1, np.int64),
            lookups=np.zeros(1, np.int64),
            hits=np.zeros(len(PhraseSource), np.int64),
        )

    @property
    def bytes(self) -> int:
        """Bytes of all arrays; fixed for the life of the pool."""
        return sum(array.nbytes for array in self.arrays)

    def __len__(self) -> int:
        """Phrases held now."""
        return int(self.arrays.counts.sum())

    def clear(self) -> None:
        """Forget all phrases; the counts of insertions and lookups go on."""
        self.arrays.keys.fill(-1)
        self.arrays.stamps.fill(0)
        self.arrays.counts.fill(0)

    def insert(self, token: int, phrase, source: PhraseSource, scope: int = 0) -> None:
        """Put one phrase among those of ``token`` (cut to β tokens); see the function `insert`."""
        tokens = np.asarray(phrase, np.int32)
        times = int(source != PhraseSource.WINDOW)
        insert(self.arrays, scope, token, tokens, 0, len(tokens), int(source), times, np.int32(0))

    def insert_text(self, text, source: PhraseSource, scope: int = 0, contexts: int = 1) -> None:
        """Feed a text; see the function `insert_text`."""
        tokens = np.asarray(text, np.int32)
        insert_text(self.arrays, scope, tokens, 0, len(tokens), int(source), np.int32(0), contexts)

    def lookup(self, token: int, scope: int = 0) -> list[tuple[int, ...]]:
        """The phrases of ``token``, the most useful first."""
        pool = self.arrays
        slot = find(pool, scope, token)
        if slot < 0:
            return []
        return [
            tuple(pool.tokens[slot, g, : pool.lengths[slot, g]].tolist())
            for g in range(pool.counts[slot])
        ]

    def inserted(self) -> dict[str, int]:
        """Insertions by source since the start."""
        return {s.name.lower(): int(self.arrays.inserted[s]) for s in PhraseSource}

    def hits(self) -> dict[str, int]:
        """Lookups since the start that found phrases, by the source of the first of them."""
        return {s.name.lower(): int(self.arrays.hits[s]) for s in PhraseSource}
