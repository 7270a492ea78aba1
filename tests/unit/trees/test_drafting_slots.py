"""The life cycle of a slot."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.drafting import Drafting

from ..helpers.drafting_world import Life, Window, World, make
from ..helpers.fakes import Language


def small(**changes) -> Drafting:
    shape = {
        "beta": 2, "guesses": 2, "columns": 2, "budget": 4, "draft_tokens": 2, "num_suffixes": 1,
        "max_len": 40, "stops": (),
    }  # fmt: skip
    return make(SimpleNamespace(**{**shape, **changes}))


def commit(drafting: Drafting, slot: int, text: np.ndarray, length: int) -> None:
    """Feed one request's text."""
    slots, lengths = np.array([slot]), np.array([length])
    drafting.commit(text[None], slots, np.zeros(1, np.int64), lengths, PhraseSource.PROMPT)


def test_slots_are_handed_out_once_and_come_back_clean() -> None:
    drafting = small()
    slots = [drafting.add() for _ in range(4)]
    assert sorted(slots) == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        drafting.add()
    world, life = World(Language(1), drafting, 40), Life.__new__(Life)
    life.drafting, life.row, life.text, life.slot, life.kv = drafting, 0, [1, 2], slots[2], {}
    life.window = Window(2, 2)
    world.show(life)
    commit(drafting, life.slot, world.token_ids[0], 2)
    drafting.start(life.slot, 2, 4, 20)
    world.draft([life])
    world.build([life])
    drafting.release(slots[2])
    again = drafting.add(9)
    state = drafting.state
    assert again == slots[2]
    assert [
        a[again] for a in (state.committed, state.cached, state.in_pool, state.window_levels)
    ] == [0] * 4
    assert [a[again] for a in (state.chain_len, state.size)] == [0, 0]
    assert state.scope[again] == 9
    assert not state.chain_only[again]
    drafting.release(again)
    assert state.scope[drafting.add()] == 0
    assert len(drafting.tree(again).tokens) == 0


def test_scopes_share_nothing() -> None:
    drafting = small()
    text = np.array([1, 2, 3, 4], np.int32)
    one, two, shared, friend = (drafting.add(scope) for scope in (5, 6, 0, 5))
    assert drafting.state.scope[[one, two, shared, friend]].tolist() == [5, 6, 0, 5]
    commit(drafting, one, text, 4)
    assert [drafting.pool.lookup(1, scope) for scope in (5, 6, 0)] == [[(2, 3)], [], []]
    for slot in (two, shared, friend):
        drafting.start(slot, 1, 4, 0)
    slots = np.array([two, shared, friend])
    drafting.build(slots, np.zeros(3, np.int64), np.array([[1]], np.int32))
    trees = [drafting.tree(slot).tokens.tolist() for slot in slots]
    assert trees[:2] == [[], []]
    assert trees[2][:2] == [2, 3]


def test_reset_forgets_the_draft_and_takes_the_engines_word_for_the_cache() -> None:
    drafting = small()
    slot = drafting.add()
    drafting.state.chain_len[slot] = drafting.state.size[slot] = 2
    drafting.reset(slot, 17)
    assert drafting.state.cached[slot] == 17
    assert len(drafting.tree(slot).tokens) == 0
    assert drafting.state.chain_len[slot] == 0


@pytest.mark.parametrize(
    "chain, emitted, cached, expected",
    [
        ([5, 6, 7], [5, 6, 9], 13, 12),  # two of the chain were committed
        ([5, 6, 7], [9], 13, 10),
        ([5, 6, 7], [5, 6, 7, 8], 12, 12),  # the last was never cached
        ([5, 6, 7], [5, 6, 7, 8, 9], 13, 13),  # a suffix went on
        ([5, 6, 7], [5], 13, 11),
        ([], [5, 6], 9, 9),
    ],
)
def test_settle_keeps_the_committed_part_of_the_chain(chain, emitted, cached, expected) -> None:
    drafting = small()
    slot = drafting.add()
    drafting.start(slot, 10, 4, 40)
    drafting.state.chain[slot, : len(chain)] = chain
    drafting.state.chain_len[slot], drafting.state.cached[slot] = len(chain), cached
    drafting.settle(slot, emitted)
    assert drafting.state.cached[slot] == expected
    assert drafting.state.chain_len[slot] == 0


@pytest.mark.parametrize("limit, done", [(0, True), (-3, True), (1, False), (99, False)])
def test_start_clamps_the_limit_and_the_cache(limit, done) -> None:
    drafting = small()
    slot = drafting.add()
    drafting.reset(slot, 12)
    drafting.start(slot, 8, limit, 20)
    assert drafting.state.node_limit[slot] == min(limit, 4)
    assert bool(drafting.state.done[slot]) is done
    assert drafting.state.cached[slot] == 7  # the last token must run to be continued


def test_state_has_a_fixed_size() -> None:
    drafting = small()
    before = drafting.bytes
    slots = [drafting.add() for _ in range(4)]
    for slot in slots:
        drafting.release(slot)
    assert drafting.bytes == before == sum(a.nbytes for a in drafting.state)


def test_commit_returns_for_what_was_cut_short() -> None:
    drafting = small(beta=3)
    slot = drafting.add()
    text = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32)
    for length in (2, 3, 3, 6, 8):
        commit(drafting, slot, text, length)
    assert [drafting.pool.lookup(t) for t in range(1, 9)] == [
        [(2, 3, 4)], [(3, 4, 5)], [(4, 5, 6)], [(5, 6, 7)], [(6, 7, 8)], [(7, 8)], [(8,)], [],
    ]  # fmt: skip


def test_no_requests_no_rows() -> None:
    drafting = small()
    none = np.empty(0, np.int64)
    out, total, wanted = drafting.plan(none, none, np.zeros((1, 4), np.int32))
    assert (total, wanted) == (0, 0)
    assert out.query_start_loc.tolist() == [0]
    drafting.absorb(none, out, np.empty(0, np.int64))


@given(seed=st.integers(0, 2**32 - 1), requests=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_a_batch_is_fed_as_its_requests_are(seed, requests) -> None:
    rng = np.random.default_rng(seed)
    texts = rng.integers(2, 6, (6, 60)).astype(np.int32)
    trees = [DraftTree.chain(rng.integers(2, 6, n).tolist()) for n in range(1, requests + 1)]
    trees = [
        tree._replace(sources=rng.integers(1, 3, len(tree.tokens)).astype(np.int32))
        for tree in trees
    ]
    predicted = [rng.integers(2, 6, len(tree.tokens) + 1) for tree in trees]
    pools = []
    for together in (True, False):
        drafting = Drafting(
            PhrasePool(1024, 4, 3), max_requests=4, budget=9, draft_tokens=2, num_suffixes=2,
            window_size=0, max_len=60, contexts=3,
        )  # fmt: skip
        slots = np.array([drafting.add(scope) for scope in range(requests)])
        rows = np.random.default_rng(seed).permutation(6)[:requests]
        for length in (5, 6, 30):
            lengths = length + np.arange(requests)
            parts = [slice(None)] if together else [slice(r, r + 1) for r in range(requests)]
            for part in parts:
                given = slots[part], rows[part], lengths[part]
                drafting.commit(texts, *given, PhraseSource.HISTORY)
            for part in parts:
                drafting.learn(
                    slots[part].tolist(), [5] * len(trees[part]), trees[part], predicted[part]
                )
        pools.append(drafting.pool.arrays)
    for one, other in zip(*pools, strict=True):
        np.testing.assert_array_equal(one, other)
