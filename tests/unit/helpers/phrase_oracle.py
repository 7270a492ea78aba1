"""What a phrase pool should do, in plain Python."""

from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np
from hypothesis import strategies as st

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.eviction import WAYS, first_slot
from vllm_ouroboros.phrases.insertion import MAX_TIMES
from vllm_ouroboros.phrases.pool import PhrasePool


class Oracle:
    """What a pool must hold, in dicts and lists.

    The assignment of keys to sets is taken from the code (any fixed one is right); which key a
    full set gives up, and what stands in a slot in which order, is not.
    """

    def __init__(self, slots: int, guesses: int, beta: int) -> None:
        self.slots, self.guesses, self.beta = slots, guesses, beta
        # sets by first slot: keys with their phrases, each with its source and its times
        self.sets: dict[int, OrderedDict[tuple[int, int], list[tuple]]] = {}
        self.inserted = Counter()

    def set_of(self, scope: int, token: int) -> OrderedDict:
        first = int(first_slot(self.slots, (scope << 32) | token))
        assert first % WAYS == 0
        assert 0 <= first < self.slots
        return self.sets.setdefault(first, OrderedDict())

    def insert(self, scope, token, phrase, source, times) -> None:
        phrase = tuple(phrase)[: self.beta]
        if not phrase:
            return
        keys = self.set_of(scope, token)
        if (scope, token) not in keys and len(keys) == WAYS:
            keys.popitem(last=False)  # the key that was used longest ago
        phrases = keys.setdefault((scope, token), [])
        keys.move_to_end((scope, token))
        same = next((old for old in phrases if agree(old[0], phrase)), None)
        trusted = [old for old in phrases if old[1] != PhraseSource.WINDOW]
        guess = source == PhraseSource.WINDOW
        if guess and (same in trusted or len(trusted) == self.guesses):
            return  # a guess moves nothing that is better than a guess
        if same is not None:
            phrases.remove(same)
            phrase, times = max(same[0], phrase, key=len), times + same[2]
        phrases.insert(len(trusted) if guess else 0, (phrase, source, times))
        del phrases[self.guesses :]
        if times > MAX_TIMES:
            phrases[:] = [(*old[:2], old[2] // 2) for old in phrases]
        self.inserted[source] += 1

    def lookup(self, scope, token) -> list[tuple[int, ...]]:
        keys = self.set_of(scope, token)
        if (scope, token) not in keys:
            return []
        keys.move_to_end((scope, token))
        return [phrase for phrase, *_ in keys[scope, token]]

    def held(self) -> dict[tuple[int, int], list[tuple[int, ...]]]:
        return {
            key: [phrase for phrase, *_ in phrases]
            for keys in self.sets.values()
            for key, phrases in keys.items()
        }

    def times(self) -> dict[tuple[int, int], list[int]]:
        return {
            key: [times for *_, times in phrases]
            for keys in self.sets.values()
            for key, phrases in keys.items()
        }


def agree(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one is the beginning of the other."""
    return a[: len(b)] == b[: len(a)]


def contents(pool: PhrasePool) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """All keys of a pool with their phrases, read from its arrays (a lookup would count as use)."""
    a = pool.arrays
    found = {}
    for slot in np.nonzero(a.keys >= 0)[0]:
        key = (int(a.keys[slot] >> 32), int(a.keys[slot] & 0xFFFFFFFF))
        assert key not in found, "a key stands in two slots"
        found[key] = [
            tuple(a.tokens[slot, g, : a.lengths[slot, g]].tolist()) for g in range(a.counts[slot])
        ]
    return found


def times(pool: PhrasePool) -> dict[tuple[int, int], list[int]]:
    """How often each phrase of `contents` was seen."""
    a = pool.arrays
    return {
        (int(key >> 32), int(key & 0xFFFFFFFF)): seen[:count].tolist()
        for key, seen, count in zip(a.keys, a.times, a.counts, strict=True)
        if key >= 0
    }


TOKENS = st.integers(0, 30)
SCOPES = st.integers(0, 2)
PHRASES = st.lists(st.integers(0, 2), max_size=6)  # a small alphabet, so that prefixes collide
SOURCES = st.sampled_from(PhraseSource)
