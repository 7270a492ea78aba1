"""The phrase pool against a plain-Python model of it."""

from __future__ import annotations

import re
from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_ouroboros.phrases import (
    CONTEXTS,
    FIRST_HASH,
    WAYS,
    PhrasePool,
    PhraseSource,
    Scopes,
    _first_slot,
    context_of,
    insert,
    insert_text,
    key_of,
)


class Oracle:
    """What a pool must hold, in dicts and lists.

    The assignment of keys to sets is taken from the code (any fixed one is right); which key a
    full set gives up, and what stands in a slot in which order, is not.
    """

    def __init__(self, slots: int, guesses: int, beta: int) -> None:
        self.slots, self.guesses, self.beta = slots, guesses, beta
        self.sets: dict[int, OrderedDict[tuple[int, int], list[tuple[tuple[int, ...], int]]]] = {}
        self.inserted = Counter()

    def set_of(self, scope: int, token: int) -> OrderedDict:
        first = int(_first_slot(self.slots, (scope << 32) | token))
        assert first % WAYS == 0
        assert 0 <= first < self.slots
        return self.sets.setdefault(first, OrderedDict())

    def insert(self, scope, token, phrase, source) -> None:
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
            phrase = max(same[0], phrase, key=len)
        phrases.insert(len(trusted) if guess else 0, (phrase, source))
        del phrases[self.guesses :]
        self.inserted[source] += 1

    def lookup(self, scope, token) -> list[tuple[int, ...]]:
        keys = self.set_of(scope, token)
        if (scope, token) not in keys:
            return []
        keys.move_to_end((scope, token))
        return [phrase for phrase, _ in keys[scope, token]]

    def held(self) -> dict[tuple[int, int], list[tuple[int, ...]]]:
        return {
            key: [phrase for phrase, _ in phrases]
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


TOKENS = st.integers(0, 30)
SCOPES = st.integers(0, 2)
PHRASES = st.lists(st.integers(0, 2), max_size=6)  # a small alphabet, so that prefixes collide
SOURCES = st.sampled_from(PhraseSource)


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
        self.oracle.insert(scope, token, phrase, source)

    @rule(token=TOKENS, scope=SCOPES)
    def lookup(self, token, scope) -> None:
        self.lookups += 1
        assert self.pool.lookup(token, scope) == self.oracle.lookup(scope, token)

    @rule(text=st.lists(TOKENS, max_size=12), source=SOURCES, scope=SCOPES)
    def insert_text(self, text, source, scope) -> None:
        self.pool.insert_text(text, source, scope)
        for i, token in enumerate(text[:-1]):
            self.oracle.insert(scope, token, text[i + 1 : i + 1 + self.beta], source)

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
        assert len(held) <= self.slots
        assert len(self.pool) == sum(map(len, held.values()))
        assert self.pool.bytes == self.bytes
        assert self.pool.inserted() == {
            s.name.lower(): self.oracle.inserted[s] for s in PhraseSource
        }
        assert self.pool.arrays.hits[0] == self.lookups
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
        counters = 8 + 8 * len(PhraseSource) + 2 * 8
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
        load = Counter(int(_first_slot(slots, key)) for key in keys)
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


def test_large_token_ids_and_scopes_are_distinct_keys() -> None:
    pool = PhrasePool(4096, 2, 2)
    keys = [(s, t) for s in (0, 1, 2**31 - 2) for t in (0, 1, 2**31 - 1)]
    for i, (scope, token) in enumerate(keys):
        pool.insert(token, [i], PhraseSource.PROMPT, scope)
    assert [pool.lookup(t, s) for s, t in keys] == [[(i,)] for i in range(len(keys))]


@given(
    text=st.lists(st.integers(0, 5), max_size=40),
    beta=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    contexts=st.integers(1, len(CONTEXTS)),
)
@settings(max_examples=150, deadline=None)
def test_a_text_fed_in_pieces_gives_the_phrases_of_the_whole(text, beta, cuts, contexts) -> None:
    """With room for all phrases, feeding piece by piece ends in the same phrases."""
    tokens, source = np.array(text, np.int32), int(PhraseSource.PROMPT)
    whole, pieces = PhrasePool(1024, 64, beta), PhrasePool(1024, 64, beta)
    insert_text(whole.arrays, 0, tokens, 0, len(text), source, contexts)
    start = 0
    for end in [*sorted(c for c in cuts if c < len(text)), len(text)]:
        resumed = insert_text(pieces.arrays, 0, tokens, start, end, source, contexts)
        assert start <= resumed
        assert resumed <= max(end, start)
        # a key at or after the point where the next call starts is one whose phrase is cut short
        assert resumed == max(start, end - beta)
        start = resumed
    expected = {key: sorted(phrases) for key, phrases in contents(whole).items()}
    assert {key: sorted(phrases) for key, phrases in contents(pieces).items()} == expected
    for i in range(len(text) - beta):
        phrase = tuple(text[i + 1 : i + 1 + beta])
        for context in range(contexts):
            if i + 1 >= CONTEXTS[context]:
                assert phrase in expected[0, key_of(tokens, i + 1, context)]
    assert all(context_of(key) < contexts for _, key in expected)


IDS = st.one_of(st.integers(0, 40), st.integers(0, 2**31 - 1))


def key(*tokens: int) -> int:
    """Key of tokens in a row, as many as a context has."""
    return key_of(np.array(tokens, np.int32), len(tokens), CONTEXTS.index(len(tokens)))


@given(text=st.lists(IDS, min_size=CONTEXTS[-1], max_size=30), scope=st.integers(0, 2**31 - 1))
@settings(max_examples=100, deadline=None)
def test_tokens_in_a_row_have_a_key_that_no_token_has(text, scope) -> None:
    for context, length in enumerate(CONTEXTS):
        found = key(*text[-length:])
        assert found == key_of(np.array(text, np.int32), len(text), context)
        assert FIRST_HASH <= found < 2**32 if context else found == text[-1]
        assert context_of(found) == context_of(scope << 32 | found) == context


@pytest.mark.parametrize("length", CONTEXTS[1:])
def test_neighbours_have_keys_of_their_own(length) -> None:
    """In any order of the tokens; a few of many may share one."""
    rest = [7] * (length - 2)
    keys = {key(*rest, before, token) for before in range(100) for token in range(100)}
    keys |= {key(before, *rest, token) for before in range(100) for token in range(100)}
    assert len(keys) > (9_990 if length == 2 else 19_880)  # 100 are the same in both


def test_a_text_is_found_by_one_token_and_by_several() -> None:
    pool, text = PhrasePool(512, 3, 2), np.array([1, 2, 3, 9, 2, 4, 5], np.int32)
    insert_text(pool.arrays, 7, text, 0, len(text), int(PhraseSource.HISTORY), 3)
    assert pool.lookup(2, 7) == [(4, 5), (3, 9)]
    assert pool.lookup(key(1, 2), 7) == [(3, 9)]
    assert pool.lookup(key(9, 2), 7) == [(4, 5)]
    assert pool.lookup(key(1, 2, 3, 9), 7) == [(2, 4)]
    assert pool.lookup(key(2, 1), 7) == []
    assert pool.lookup(key(4, 5), 7) == [], "nothing follows"
    assert pool.lookup(key(1, 2)) == [], "another scope"
    assert pool.inserted()["history"] == 6 + 5 + 3


def test_feeding_one_token_at_a_time_costs_beta_insertions_a_token() -> None:
    """The resume point bounds the work: no call goes over old text again."""
    pool, beta = PhrasePool(64, 4, 3), 3
    text = np.arange(100, dtype=np.int32) % 17
    start = 0
    for end in range(1, 101):
        start = insert_text(pool.arrays, 0, text, start, end, int(PhraseSource.HISTORY))
    assert pool.inserted()["history"] <= 100 * beta
    assert start == 97


def test_insert_takes_a_slice_of_a_longer_array() -> None:
    pool = PhrasePool(8, 2, 3)
    buffer = np.array([9, 9, 1, 2, 3, 4, 9], np.int32)
    insert(pool.arrays, 0, 5, buffer, 2, 4, int(PhraseSource.WINDOW))
    assert pool.lookup(5) == [(1, 2, 3)]
    assert pool.inserted() == {"prompt": 0, "window": 1, "verification": 0, "history": 0}


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_phrase_is_nothing(length) -> None:
    pool = PhrasePool(8, 2, 3)
    insert(pool.arrays, 0, 5, np.zeros(3, np.int32), 0, length, int(PhraseSource.WINDOW))
    assert len(pool) == 0
    assert contents(pool) == {}
    assert pool.inserted()["window"] == 0


def test_hits_count_lookups_that_found_a_phrase() -> None:
    pool = PhrasePool(8, 2, 3)
    pool.insert(5, [1], PhraseSource.PROMPT)
    assert [pool.lookup(5), pool.lookup(6)] == [[(1,)], []]
    assert pool.arrays.hits.tolist() == [2, 1]
    pool.clear()
    assert pool.lookup(5) == []
    assert pool.arrays.hits.tolist() == [3, 1]


# -- scopes ----------------------------------------------------------------------------------------


NAMES = st.one_of(st.none(), st.integers(0, 6), st.tuples(st.text(max_size=1), st.none()))


@given(asked=st.lists(st.one_of(st.just("new"), NAMES.map(lambda name: [name]))))
@settings(max_examples=100, deadline=None)
def test_a_name_keeps_its_number_and_nobody_else_gets_it(asked) -> None:
    scopes = Scopes(PhrasePool(8, 1, 1))
    names: dict = {}
    taken = {0}
    for one in asked:
        number = scopes.new() if one == "new" else scopes.of(one[0])
        if one != "new" and one[0] in names:
            assert number == names[one[0]]
            continue
        assert number not in taken
        assert 0 < number <= Scopes.LAST
        taken.add(number)
        if one != "new":
            names[one[0]] = number


def test_who_was_not_seen_for_longest_is_forgotten() -> None:
    scopes = Scopes(PhrasePool(8, 1, 1), names=3)
    first = {name: scopes.of(name) for name in "abc"}
    assert scopes.of("a") == first["a"]
    scopes.of("d")  # takes the place of b
    assert {name: scopes.of(name) for name in "ac"} == {name: first[name] for name in "ac"}
    assert scopes.of("b") not in first.values()


def test_when_numbers_run_out_the_pool_starts_again() -> None:
    """What stands under a number is never another one's: all phrases go before the first reuse."""
    pool = PhrasePool(64, 2, 2)
    scopes = Scopes(pool)
    one = scopes.of("one")
    scopes._next = Scopes.LAST
    last = scopes.of("last")
    for scope in (0, one, last):
        pool.insert(5, [6], PhraseSource.PROMPT, scope)
    assert pool.lookup(5, last) == [(6,)]
    again = scopes.of("another")
    assert (one, last, again) == (1, 2**31 - 1, 1)
    assert len(pool) == 0
    assert scopes.of("one") == 2, "its number is another one's now"
