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

from collections import OrderedDict
from collections.abc import Hashable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numba import njit

WAYS = 8
CONTEXTS = (1, 2, 4, 8, 24)
"""Tokens in a row that a key may stand for."""
FIRST_HASH = 2**31
"""Keys below are tokens, those from here to 2^32 stand for several in a row."""
_HASH_BITS = 28  # what is left of a key behind the number of its context
MOST = 255
"""Times that a phrase is counted up to; then those of its key count half."""


class PhraseSource(IntEnum):
    """Where a phrase came from; index into `PoolArrays.inserted`."""

    PROMPT = 0
    WINDOW = 1
    VERIFICATION = 2
    HISTORY = 3


_WINDOW = int(PhraseSource.WINDOW)


class PoolArrays(NamedTuple):
    """State of a pool with S slots, G phrases a slot, β tokens a phrase."""

    keys: np.ndarray  # int64 [S], scope << 32 | key of a context, or -1
    stamps: np.ndarray  # int64 [S], time of last use
    counts: np.ndarray  # int32 [S], phrases in the slot
    lengths: np.ndarray  # int32 [S, G], tokens of each phrase
    sources: np.ndarray  # int8 [S, G], PhraseSource
    times: np.ndarray  # uint8 [S, G], that it was seen behind its key, of late
    tokens: np.ndarray  # int32 [S, G, β]
    clock: np.ndarray  # int64 [1]
    inserted: np.ndarray  # int64 [4], insertions by PhraseSource
    hits: np.ndarray  # int64 [2], lookups and those that found a phrase


@njit(cache=True, inline="always")
def _first_slot(num_slots, key):
    """First slot of the key's set (a 64-bit mix, after splitmix64)."""
    x = np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.int64(x % np.uint64(num_slots // WAYS)) * WAYS


@njit(cache=True)
def find(pool, scope, token):
    """Slot of a key, or -1. Marks the key as used."""
    key = (np.int64(scope) << 32) | np.int64(token)
    first = _first_slot(pool.keys.shape[0], key)
    pool.hits[0] += 1
    for slot in range(first, first + WAYS):
        if pool.keys[slot] == key:
            pool.clock[0] += 1
            pool.stamps[slot] = pool.clock[0]
            pool.hits[1] += pool.counts[slot] > 0
            return slot
    return -1


@njit(cache=True)
def _claim(pool, scope, token):
    """Slot of a key, made by evicting the oldest key of its set if need be."""
    key = (np.int64(scope) << 32) | np.int64(token)
    first = _first_slot(pool.keys.shape[0], key)
    oldest = first
    for slot in range(first, first + WAYS):
        if pool.keys[slot] == key:
            oldest = slot
            break
        if pool.stamps[slot] < pool.stamps[oldest]:
            oldest = slot
    if pool.keys[oldest] != key:
        pool.keys[oldest] = key
        pool.counts[oldest] = 0
    pool.clock[0] += 1
    pool.stamps[oldest] = pool.clock[0]
    return oldest


@njit(cache=True)
def insert(pool, scope, token, phrase, start, length, source, times):
    """Put ``phrase[start:start+length]``, seen so many ``times``, among the phrases of ``token``.

    It becomes the first; a guess of the window only the first of the guesses. A phrase that
    repeats, extends or is the beginning of one already there takes its place, and its times come
    on top: the longer of the two is kept, and a guess never moves a phrase that is none. A new
    phrase pushes out the last one when the slot is full, unless it is a guess and the slot holds
    none.
    """
    length = min(length, pool.tokens.shape[2])
    if length <= 0:
        return
    slot = _claim(pool, scope, token)
    count = pool.counts[slot]
    place = -1
    for g in range(count):
        shared = min(length, pool.lengths[slot, g])
        same = True
        for i in range(shared):
            if pool.tokens[slot, g, i] != phrase[start + i]:
                same = False
                break
        if same:
            place = g
            break
    target = 0
    if source == _WINDOW:
        while target < count and pool.sources[slot, target] != _WINDOW:
            target += 1
        if (place >= 0 and place < target) or target == pool.tokens.shape[1]:
            return
    kept = length
    seen = times
    if place < 0:
        if count < pool.tokens.shape[1]:
            pool.counts[slot] = count + 1
        place = pool.counts[slot] - 1
    else:
        kept = max(length, pool.lengths[slot, place])
        seen += pool.times[slot, place]
    # element by element, which compiles to far less than slices do; column by column, so that one
    # token is all there is to save
    for i in range(pool.tokens.shape[2]):
        token_i = phrase[start + i] if i < length else pool.tokens[slot, place, i]
        for g in range(place, target, -1):
            pool.tokens[slot, g, i] = pool.tokens[slot, g - 1, i]
        pool.tokens[slot, target, i] = token_i
    for g in range(place, target, -1):
        pool.lengths[slot, g] = pool.lengths[slot, g - 1]
        pool.sources[slot, g] = pool.sources[slot, g - 1]
        pool.times[slot, g] = pool.times[slot, g - 1]
    pool.lengths[slot, target] = kept
    pool.sources[slot, target] = source
    if seen > MOST:
        for g in range(pool.counts[slot]):
            pool.times[slot, g] //= 2
        seen //= 2
    pool.times[slot, target] = seen
    pool.inserted[source] += 1


@njit(cache=True)
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


@njit(cache=True)
def insert_text(pool, scope, text, fed, end, source, contexts=1):
    """Feed ``text[:end]``, whose first ``fed`` tokens were fed before.

    Each token becomes a key of what follows it, and so do the tokens before it, for the first
    ``contexts`` of `CONTEXTS`. Phrases that the end of the text cut short last time grow to β
    tokens.
    """
    beta = pool.tokens.shape[2]
    for i in range(max(0, fed - beta), end - 1):
        length = min(beta, end - 1 - i)
        for context in range(contexts):
            if i + 1 >= CONTEXTS[context]:
                key = key_of(text, i + 1, context)
                times = np.int64(i + 1 >= fed)  # of one type wherever `insert` is called
                insert(pool, scope, key, text, i + 1, length, source, times)


class PhrasePool:
    """A pool of at most ``capacity`` keys, rounded up to whole sets.

    Memory in bytes: ``capacity * (20 + G * (6 + 4 * β))``; see `bytes`.
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
            clock=np.zeros(1, np.int64),
            inserted=np.zeros(len(PhraseSource), np.int64),
            hits=np.zeros(2, np.int64),
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
        insert(self.arrays, scope, token, tokens, 0, len(tokens), int(source), times)

    def insert_text(self, text, source: PhraseSource, scope: int = 0) -> None:
        """Feed a text: every token becomes the key of what follows it."""
        tokens = np.asarray(text, np.int32)
        insert_text(self.arrays, scope, tokens, 0, len(tokens), int(source))

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


class Scopes:
    """Numbers for those who share phrases; 0 is everybody's, and no other is ever used twice.

    Args:
        pool: is emptied should the numbers run out (2^31 of them).
        names: how many are remembered; who was forgotten starts with no phrases.
    """

    LAST = 2**31 - 1

    def __init__(self, pool: PhrasePool, names: int = 2**16) -> None:
        self._pool, self._limit, self._next = pool, names, 1
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()

    def new(self) -> int:
        """A number that nobody else has."""
        if self._next > self.LAST:
            self._pool.clear()
            self._numbers.clear()
            self._next = 1
        self._next += 1
        return self._next - 1

    def of(self, name: Hashable) -> int:
        """The number of a name, the same each time."""
        if name not in self._numbers:
            number = self.new()
            self._numbers[name] = number
            if len(self._numbers) > self._limit:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(name)
        return self._numbers[name]
