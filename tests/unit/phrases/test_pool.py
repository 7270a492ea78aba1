"""The phrase pool against a plain-Python model of it."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.eviction import WAYS, first_slot
from vllm_ouroboros.phrases.insertion import MAX_TIMES, insert, insert_text
from vllm_ouroboros.phrases.pool import PhrasePool

from ..helpers.phrase_oracle import PHRASES, SCOPES, SOURCES, TOKENS, Oracle, agree, contents, times


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of operations on a pool and on its model."""

    @initialize(
        capacity=st.sampled_from([1, 8, 9, 24]), guesses=st.integers(1, 3), beta=st.integers(1, 4)
    )
    def start(self, capacity, guesses, beta) -> None:
        self.pool = PhrasePool(capacity, guesses, beta)
        self.slots = -(-capacity // WAYS) * WAYS
        self.oracle = Oracle(self.slots, guesses, beta)
        self.beta = beta
        self.bytes = self.pool.bytes
        self.lookups = 0

    @rule(token=TOKENS, phrase=PHRASES, source=SOURCES, scope=SCOPES)
    def insert(self, token, phrase, source, scope) -> None:
        self.pool.insert(token, phrase, source, scope)
        self.oracle.insert(scope, token, phrase, source, source != PhraseSource.WINDOW)

    @rule(token=TOKENS, scope=SCOPES)
    def lookup(self, token, scope) -> None:
        self.lookups += 1
        assert self.pool.lookup(token, scope) == self.oracle.lookup(scope, token)

    @rule(text=st.lists(TOKENS, max_size=12), source=SOURCES, scope=SCOPES)
    def insert_text(self, text, source, scope) -> None:
        self.pool.insert_text(text, source, scope)
        for i, token in enumerate(text[:-1]):
            self.oracle.insert(scope, token, text[i + 1 : i + 1 + self.beta], source, 1)

    @rule(really=st.integers(0, 5))
    def clear(self, really) -> None:
        if not really:
            self.pool.clear()
            self.oracle.sets.clear()

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = contents(self.pool)
        assert held == self.oracle.held()
        assert times(self.pool) == self.oracle.times()
        assert len(held) <= self.slots
        assert len(self.pool) == sum(map(len, held.values()))
        assert self.pool.bytes == self.bytes
        assert self.pool.inserted() == {
            s.name.lower(): self.oracle.inserted[s] for s in PhraseSource
        }
        assert self.pool.arrays.lookups[0] == self.lookups
        for phrases in held.values():
            for p in phrases:
                assert not any(agree(p, q) for q in phrases if q is not p), "not merged"


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_newest_first_and_bounded_by_the_guess_set() -> None:
    pool = PhrasePool(8, guess_set_size=3, phrase_len=4)
    for phrase in ([1, 1], [2, 2], [3, 3], [4, 4]):
        pool.insert(7, phrase, PhraseSource.PROMPT)
    assert pool.lookup(7) == [(4, 4), (3, 3), (2, 2)]
    pool.insert(7, [2, 2], PhraseSource.PROMPT)
    assert pool.lookup(7) == [(2, 2), (4, 4), (3, 3)]


def test_the_longer_of_two_agreeing_phrases_is_kept() -> None:
    pool = PhrasePool(8, guess_set_size=3, phrase_len=4)
    pool.insert(7, [1, 2, 3], PhraseSource.PROMPT)
    pool.insert(7, [9], PhraseSource.PROMPT)
    pool.insert(7, [1, 2], PhraseSource.PROMPT)
    assert pool.lookup(7) == [(1, 2, 3), (9,)]
    pool.insert(7, [9, 8, 7, 6, 5], PhraseSource.PROMPT)
    assert pool.lookup(7) == [(9, 8, 7, 6), (1, 2, 3)]


def test_guesses_of_the_window_stand_behind_text() -> None:
    pool = PhrasePool(8, guess_set_size=3, phrase_len=4)
    pool.insert(7, [1], PhraseSource.WINDOW)
    pool.insert(7, [2], PhraseSource.HISTORY)
    pool.insert(7, [3], PhraseSource.WINDOW)
    assert pool.lookup(7) == [(2,), (3,), (1,)]
    pool.insert(7, [4], PhraseSource.VERIFICATION)  # the oldest guess goes first
    assert pool.lookup(7) == [(4,), (2,), (3,)]
    pool.insert(7, [2, 9], PhraseSource.WINDOW)  # no guess moves or changes what was text
    assert pool.lookup(7) == [(4,), (2,), (3,)]
    pool.insert(7, [3, 9], PhraseSource.PROMPT)  # a guess that came true is none any more
    pool.insert(7, [5], PhraseSource.WINDOW)
    assert pool.lookup(7) == [(3, 9), (4,), (2,)]
    assert pool.inserted() == {"prompt": 1, "window": 2, "verification": 1, "history": 1}


def test_phrases_that_are_seen_too_often_to_count_count_half() -> None:
    pool = PhrasePool(8, guess_set_size=4, phrase_len=2)
    for phrase, seen in (([1, 1], 1), ([2, 2], 9), ([3, 3], MAX_TIMES), ([4, 4], 0)):
        for _ in range(seen):
            pool.insert(7, phrase, PhraseSource.HISTORY)
    pool.insert(7, [4, 4], PhraseSource.WINDOW)
    assert times(pool) == {(0, 7): [MAX_TIMES, 9, 1, 0]}
    pool.insert(7, [3], PhraseSource.PROMPT)
    assert pool.lookup(7) == [(3, 3), (2, 2), (1, 1), (4, 4)]
    assert times(pool) == {(0, 7): [(MAX_TIMES + 1) // 2, 4, 0, 0]}


def test_a_lookup_counts_as_use() -> None:
    pool = PhrasePool(WAYS, 1, 1)  # one set
    for token in range(WAYS):
        pool.insert(token, [token], PhraseSource.PROMPT)
    assert pool.lookup(0) == [(0,)]
    pool.insert(100, [5], PhraseSource.PROMPT)
    assert pool.lookup(0) == [(0,)]
    assert pool.lookup(1) == []
    assert [pool.lookup(t) for t in range(2, WAYS)] == [[(t,)] for t in range(2, WAYS)]


@pytest.mark.parametrize("guesses, beta", [(1, 1), (3, 5), (10, 6), (64, 32)])
def test_memory_is_the_documented_formula(guesses, beta) -> None:
    formula = re.search(r"``(capacity \* [^`]*)``", PhrasePool.__doc__).group(1)
    for capacity in (8, 9, 64, 1000):
        names = {"capacity": -(-capacity // WAYS) * WAYS, "G": guesses, "beta": beta}
        documented = eval(formula.replace("β", "beta"), {}, names)
        counters = 3 * 8 + 2 * 8 * len(PhraseSource)
        assert PhrasePool(capacity, guesses, beta).bytes == documented + counters


def test_memory_does_not_grow() -> None:
    pool = PhrasePool(64, 4, 3)
    before = [(a.ctypes.data, a.nbytes) for a in pool.arrays]
    text = np.random.default_rng(0).integers(0, 50_000, 20_000).astype(np.int32)
    pool.insert_text(text, PhraseSource.HISTORY)
    assert [(a.ctypes.data, a.nbytes) for a in pool.arrays] == before
    assert len(pool) <= 64 * 4


def test_keys_spread_over_the_sets() -> None:
    """Neighbouring token ids, and one token in many scopes, must not crowd into a few sets."""
    slots = 1024 * WAYS
    for keys in (range(4096), [s << 32 for s in range(4096)], range(0, 4096 * 64, 64)):
        load = Counter(int(first_slot(slots, key)) for key in keys)
        assert max(load.values()) < 20  # mean 4; a Poisson tail this long has odds below 1e-5
        assert len(load) > 900


@given(
    a=st.lists(st.tuples(TOKENS, PHRASES), max_size=20),
    b=st.lists(st.tuples(TOKENS, PHRASES), max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_scopes_never_mix(a, b) -> None:
    both, alone = PhrasePool(4096, 3, 4), PhrasePool(4096, 3, 4)
    scope_a, scope_b = 5, 2**31 - 2
    for token, phrase in a:
        both.insert(token, phrase, PhraseSource.PROMPT, scope_a)
        alone.insert(token, phrase, PhraseSource.PROMPT, scope_a)
    for token, phrase in b:
        both.insert(token, phrase, PhraseSource.PROMPT, scope_b)
    for token in range(31):
        assert both.lookup(token, scope_a) == alone.lookup(token, scope_a)
    assert all(not alone.lookup(token, scope) for token in range(31) for scope in (0, scope_b))


def test_feeding_one_token_at_a_time_costs_beta_insertions_a_token() -> None:
    """The resume point bounds the work: no call goes over old text again."""
    pool, beta = PhrasePool(64, 4, 3), 3
    text = np.arange(100, dtype=np.int32) % 17
    for end in range(1, 101):
        insert_text(pool.arrays, 0, text, end - 1, end, int(PhraseSource.HISTORY), 1)
    assert pool.inserted()["history"] <= 100 * beta


def test_insert_takes_a_slice_of_a_longer_array() -> None:
    pool = PhrasePool(8, 2, 3)
    buffer = np.array([9, 9, 1, 2, 3, 4, 9], np.int32)
    insert(pool.arrays, 0, 5, buffer, 2, 4, int(PhraseSource.WINDOW), 0, 1)
    assert pool.lookup(5) == [(1, 2, 3)]
    assert pool.inserted() == {"prompt": 0, "window": 1, "verification": 0, "history": 0}


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_phrase_is_nothing(length) -> None:
    pool = PhrasePool(8, 2, 3)
    insert(pool.arrays, 0, 5, np.zeros(3, np.int32), 0, length, int(PhraseSource.WINDOW), 0, 1)
    assert len(pool) == 0
    assert contents(pool) == {}
    assert pool.inserted()["window"] == 0


def test_hits_count_lookups_that_found_a_phrase() -> None:
    """By the source of the first phrase."""
    pool = PhrasePool(8, 2, 3)
    pool.insert(5, [1], PhraseSource.PROMPT)
    pool.insert(7, [1], PhraseSource.WINDOW)
    pool.insert(7, [2], PhraseSource.HISTORY)
    assert [pool.lookup(5), pool.lookup(6), len(pool.lookup(7))] == [[(1,)], [], 2]
    hits = {"prompt": 1, "window": 0, "verification": 0, "history": 1}
    assert pool.hits() == hits
    assert pool.arrays.lookups[0] == 3
    pool.clear()
    assert pool.lookup(5) == []
    assert pool.hits() == hits
    assert pool.arrays.lookups[0] == 4


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_slots_that_cannot_be_are_passed_over(seed) -> None:
    """Compiled loops check no bounds: whatever the arrays hold, nothing beyond them is touched."""
    rng = np.random.default_rng(seed)
    pool = PhrasePool(16, 3, 4)
    pool.insert_text(rng.integers(0, 9, 60), PhraseSource.HISTORY)
    arrays, wild = pool.arrays, [-(2**31), -5, -1, 0, 1, 3, 4, 5, 10**6, 2**31 - 1]
    arrays.counts[:] = rng.choice([*arrays.counts, *wild], arrays.counts.shape)
    arrays.lengths[:] = rng.choice([1, 2, 3, 4, *wild], arrays.lengths.shape)
    arrays.sources[:] = rng.choice([0, 1, 2, 3, -128, -1, 4, 127], arrays.sources.shape)
    for token in range(9):
        found = pool.lookup(token)
        assert len(found) <= 3
        assert all(1 <= len(phrase) <= 4 for phrase in found)
    pool.insert_text(rng.integers(0, 9, 400), PhraseSource.PROMPT)
    pool.insert(1, rng.integers(0, 9, 3), PhraseSource.WINDOW)
    faults = int(arrays.faults[0])
    for token in range(9):
        pool.lookup(token)
    assert arrays.faults[0] == faults, "an insertion makes its slot sound"
