"""Where a key lies in the pool, and who makes room for it (compiled).

A set-associative cache: a key hashes to one set of `WAYS` slots. A full set evicts the key that was
used longest ago, so memory never grows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_ouroboros.phrases.compiling import compiled, compiled_inner

WAYS = 8
"""Slots of a set."""


@njit(cache=True, inline="always")
def first_slot(num_slots, key):
    """First slot of the key's set (a 64-bit mix, after splitmix64)."""
    x = np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.int64(x % np.uint64(num_slots // WAYS)) * WAYS


@njit(cache=True, inline="always")
def _is_sound(pool, slot):
    """Whether what a slot says of its phrases can be: compiled loops go by it unchecked."""
    count, sound = pool.counts[slot], True
    if count < 0 or count > pool.lengths.shape[1]:
        return False
    for g in range(count):
        length, source = pool.lengths[slot, g], pool.sources[slot, g]
        sound &= 0 < length <= pool.tokens.shape[2] and 0 <= source < pool.hits.shape[0]
    return sound


@compiled
def find(pool, scope, token):
    """Slot of a key, or -1. Marks the key as used."""
    key = (np.int64(scope) << 32) | np.int64(token)
    first = first_slot(pool.keys.shape[0], key)
    pool.lookups[0] += 1
    for slot in range(first, first + WAYS):
        if pool.keys[slot] == key:
            if not _is_sound(pool, slot):
                pool.faults[0] += 1
                return -1
            pool.clock[0] += 1
            pool.stamps[slot] = pool.clock[0]
            if pool.counts[slot] > 0:
                pool.hits[pool.sources[slot, 0]] += 1
            return slot
    return -1


@compiled_inner
def claim(pool, scope, token):
    """Slot of a key, made by evicting the oldest key of its set if need be."""
    key = (np.int64(scope) << 32) | np.int64(token)
    first = first_slot(pool.keys.shape[0], key)
    oldest = first
    for slot in range(first, first + WAYS):
        if pool.keys[slot] == key:
            oldest = slot
            break
        if pool.stamps[slot] < pool.stamps[oldest]:
            oldest = slot
    if pool.keys[oldest] == key and not _is_sound(pool, oldest):
        pool.faults[0] += 1
        pool.counts[oldest] = 0
    if pool.keys[oldest] != key:
        pool.keys[oldest] = key
        pool.counts[oldest] = 0
    pool.clock[0] += 1
    pool.stamps[oldest] = pool.clock[0]
    return oldest
