"""Who shares phrases with whom."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.scopes import Scopes

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
