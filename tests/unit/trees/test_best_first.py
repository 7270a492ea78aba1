"""Trees that grow best nodes first, against a plain-Python reading of what they should be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import CONTEXTS, key_of
from vllm_ouroboros.phrases.insertion import insert, insert_text
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.candidates import BRANCH_PROBABILITIES
from vllm_ouroboros.trees.draft_tree import ROOT, NodeSource
from vllm_ouroboros.trees.drafting import Drafting
from vllm_ouroboros.trees.node_kinds import (
    BACKOFF_WEIGHTS,
    BASE_SHARE,
    BEYOND_CHAIN,
    NOT_IN_TOP_K,
    NUM_EVIDENCES,
    NUM_GRADES,
    NUM_KINDS,
    SHARE_BOUNDS,
    WITHOUT_DRAFT,
    Evidence,
    grade,
)
from vllm_ouroboros.trees.request_state import NUM_ALTERNATIVES

from ..helpers.fakes import node_paths
from ..helpers.tree_oracle import reference

OWNER = 7


def world_of(pool: PhrasePool, text=((1, 2),), budget: int = 16, stops: tuple[int, ...] = ()):
    """A request whose every node is as likely as not."""
    drafting = Drafting(
        pool, max_requests=4, budget=budget, draft_tokens=4, num_suffixes=2, window_size=2,
        max_len=64, stops=stops, contexts=len(CONTEXTS),
    )  # fmt: skip
    drafting.state.owner[:] = OWNER
    drafting.start(0, 2, budget, 64)
    return SimpleNamespace(
        drafting=drafting, slots=np.zeros(1, np.int64), rows=np.zeros(1, np.int64), alone=False,
        token_ids=np.array(text, np.int32), rates=np.full((1, NUM_KINDS), 0.5), least=0.004,
    )  # fmt: skip


@st.composite
def worlds(draw, budget: int):
    """Some requests with what was drafted for them, and a pool that knows their language."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab, requests = draw(st.integers(2, 12)), draw(st.integers(1, 3))
    pool = PhrasePool(int(rng.choice([16, 512])), *rng.integers(1, 4, 2).tolist())
    stops = draw(st.sampled_from([(), (), (1,), (0, 5)]))
    world = world_of(pool, rng.integers(0, vocab, (4, 64)), budget, stops)
    world.slots, world.rows = rng.permutation(4)[:requests], rng.permutation(4)[:requests]
    world.rates = rng.uniform(0.01, draw(st.sampled_from([0.4, 0.99])), (requests, NUM_KINDS))
    world.least, world.alone = draw(st.sampled_from([0.004, 0.02, 0.1])), draw(st.booleans())
    state = world.drafting.state
    state.scope[:] = draw(st.sampled_from([(0, 0, 0, 0), (1, 2, 1, 2**31 - 1)]))
    for scope in set(state.scope.tolist()):
        text = rng.integers(0, vocab, draw(st.sampled_from([0, 8, 40]))).astype(np.int32)
        own = draw(st.integers(0, len(text)))  # tokens that these requests wrote, before others
        for fed, end, owner in ((0, own, OWNER), (own, len(text), OWNER + 1)):
            insert_text(
                pool.arrays, scope, text, fed, end, int(PhraseSource.HISTORY), owner, len(CONTEXTS)
            )
        for _ in range(draw(st.sampled_from([0, 5, 20]))):
            phrase = rng.integers(0, vocab, rng.integers(1, 5))
            pool.insert(int(rng.integers(vocab)), phrase, PhraseSource.WINDOW, scope)
    for slot in world.slots.tolist():
        limit = draw(st.sampled_from([0, 1, budget // 2, budget, budget + 3]))
        world.drafting.start(slot, int(rng.integers(1, 40)), limit, 64, rng.random() < 0.3)
        if draw(st.booleans()):
            expected = rng.integers(0, vocab, rng.integers(1, 30)).astype(np.int32)
            world.drafting.predict(slot, expected, 0)
            state = world.drafting.state
            state.predicted_seen[slot] = state.committed[slot]
            state.predicted_at[slot], state.predicted_run[slot] = (
                rng.integers(0, 32),
                draw(st.integers(0, 6)),
            )
        state.chain_len[slot] = rng.integers(budget)
        state.chain[slot] = rng.integers(0, vocab, budget)
        state.confidence[slot] = rng.random(budget) ** draw(st.sampled_from([0.2, 1, 3]))
        if draw(st.booleans()):
            state.alternatives[slot] = rng.integers(-1, vocab, (budget, NUM_ALTERNATIVES))
            state.alternative_probs[slot] = rng.random((budget, NUM_ALTERNATIVES)) * (
                1 - state.confidence[slot, :, None]
            )
        if draw(st.booleans()):
            for branches in (state.branches, state.branch_next):
                branches[slot] = rng.integers(-1, vocab, branches[slot].shape)
    return world


def grown(world):
    """Trees, and for each its nodes: token, parent, source, kind, probability."""
    trees, probabilities = world.drafting.grow(
        world.slots, world.rows, world.token_ids, world.rates, world.least, world.alone
    )
    pairs = zip(trees, probabilities, strict=True)
    return trees, [[*zip(*(a.tolist() for a in (*t, p)), strict=True)] for t, p in pairs]


@given(world=worlds(budget=24))
@settings(max_examples=120, deadline=None)
def test_nodes_stand_in_the_order_of_their_probability(world) -> None:
    state, stops = world.drafting.state, world.drafting.stops
    trees, nodes = grown(world)
    for slot, tree, rows in zip(world.slots, trees, nodes, strict=True):
        paths = node_paths(tree)
        assert len(set(paths)) == len(paths) <= state.node_limit[slot] <= 24
        assert not any(token in stops for path in paths for token in path[:-1])
        assert tree.is_chain or not state.chain_only[slot]
        left = {ROOT: 1.0} | {i: row[-1] for i, row in enumerate(rows)}
        assert sorted(left.values(), reverse=True) == [1.0, *(row[-1] for row in rows)]
        for _, parent, source, kind, probability in rows:
            assert world.least <= probability <= left[parent] + 1e-12, "more than is left for it"
            left[parent] -= probability
            assert (source == NodeSource.DRAFT) == (kind // NUM_EVIDENCES < NOT_IN_TOP_K)
    state.node_limit[world.slots] //= 2
    halves = state.node_limit[world.slots].tolist()
    assert grown(world)[1] == [rows[:n] for rows, n in zip(nodes, halves, strict=True)]


@given(world=worlds(budget=9))
@settings(max_examples=250, deadline=None)
def test_a_tree_is_the_one_of_the_specification(world) -> None:
    for r, nodes in enumerate(grown(world)[1]):
        expected = reference(world, r, [node[:2] for node in nodes])
        assert [node[:-1] for node in nodes] == [node[:-1] for node in expected]
        assert [node[-1] for node in nodes] == pytest.approx([node[-1] for node in expected])


@given(world=worlds(budget=16))
@settings(max_examples=60, deadline=None)
def test_alone_the_pool_knows_nothing_of_the_draft(world) -> None:
    world.alone = True
    _, alone = grown(world)
    assert {node[3] // NUM_EVIDENCES for nodes in alone for node in nodes} <= {WITHOUT_DRAFT}
    world.alone, world.drafting.state.chain_len[:] = False, 0
    assert grown(world)[1] == alone


def looked(world) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """Grade, evidence and source of each path."""
    [tree], [nodes] = grown(world)
    found = [(*divmod(kind, NUM_EVIDENCES), source) for _, _, source, kind, _ in nodes]
    return dict(zip(node_paths(tree), found, strict=True))


PAIR = key_of(np.array([1, 2], np.int32), 2, 1)


def counted(*parts: float | None, times: int = 1) -> int:
    """Evidence of a token that is such a part of what was counted, in contexts that grow."""
    share = BASE_SHARE
    for part, otherwise in zip(parts, BACKOFF_WEIGHTS, strict=False):
        if part is not None:
            share = (times * part + otherwise * share) / (times + otherwise)
    return Evidence.COUNTED + int((share > SHARE_BOUNDS).sum())


ON, GUESSED_ON = Evidence.CONTINUES_PHRASE, Evidence.CONTINUES_GUESS


@pytest.mark.parametrize(
    "key, source, newer, expected",
    [
        (2, PhraseSource.PROMPT, [], [counted(1), ON, ON]),
        (2, PhraseSource.HISTORY, [9], [counted(0.5, times=2), ON, ON]),
        (2, PhraseSource.WINDOW, [], [Evidence.WINDOW_GUESS, GUESSED_ON, GUESSED_ON]),
        (PAIR, PhraseSource.HISTORY, [], [counted(None, 1), ON, ON]),
    ],
)
def test_a_phrase_goes_on_token_by_token(key, source, newer, expected) -> None:
    pool = PhrasePool(64, 3, 4)
    pool.insert(key, [3, 4, 5], source)
    pool.insert(key, newer, PhraseSource.HISTORY)
    found = looked(world_of(pool))
    assert [found[(3, 4, 5)[:n]][1] for n in (1, 2, 3)] == expected
    assert {(grade, source) for grade, _, source in found.values()} <= {
        (WITHOUT_DRAFT, NodeSource.SUFFIX)
    }


def test_what_is_counted_of_a_token_grows_with_its_times_and_its_context() -> None:
    """A few times in a row speak for it more than once, a long context more than a short one."""
    evidence = {}
    for context, length in enumerate(CONTEXTS):
        for times in (1, 3):
            pool, text = PhrasePool(512, 3, 4), np.arange(26, dtype=np.int32)
            for i in range(times):
                head = np.full(length, 30 + i, np.int32)
                fed = np.concatenate([head, text[25 - length : 25], [7]])
                insert_text(pool.arrays, 0, fed.astype(np.int32), 0, len(fed), 3, 0, context + 1)
            world = world_of(pool, text[None, :25])
            world.drafting.start(0, 25, 16, 64)
            evidence[length, times] = looked(world)[(7,)][1]
    for times in (1, 3):
        column = [evidence[length, times] for length in CONTEXTS]
        assert column == sorted(set(column))
    assert all(evidence[length, 1] < evidence[length, 3] for length in CONTEXTS[:-1])


def test_what_the_request_wrote_itself_counts_more_than_what_another_did_later() -> None:
    """Whoever wrote a phrase last owns it, so the order of the two does not matter here."""
    own, other = np.array([3], np.int32), np.array([4], np.int32)
    evidence = {}
    for owner in (OWNER, 0):
        pool = PhrasePool(64, 3, 4)
        insert(pool.arrays, 0, 2, own, 0, 1, int(PhraseSource.HISTORY), 1, owner)
        insert(pool.arrays, 0, 2, other, 0, 1, int(PhraseSource.HISTORY), 1, 0)
        found = looked(world_of(pool))
        evidence[owner] = [found[(token,)][1] for token in (3, 4)]
    assert evidence[0][0] == evidence[0][1] == counted(0.5, times=2)
    assert evidence[OWNER][1] < evidence[0][1] < evidence[OWNER][0]


def test_the_target_said_so_elsewhere_is_little_and_guesses_count_for_nothing() -> None:
    pool = PhrasePool(64, 4, 2)
    insert(pool.arrays, 0, 2, np.array([3], np.int32), 0, 1, int(PhraseSource.VERIFICATION), 0, 0)
    pool.insert(2, [4], PhraseSource.WINDOW)
    assert looked(world_of(pool)) == {
        (3,): (WITHOUT_DRAFT, Evidence.CORRECTION, NodeSource.SUFFIX),
        (4,): (WITHOUT_DRAFT, Evidence.WINDOW_GUESS, NodeSource.SUFFIX),
    }
    pool.insert(2, [5], PhraseSource.PROMPT)
    assert looked(world_of(pool))[(5,)][1] == counted(1)


def test_who_thought_of_a_token_and_a_branch_that_brings_what_follows_it() -> None:
    pool = PhrasePool(64, 3, 4)
    for key, phrase in ((2, [5]), (5, [11]), (6, [12]), (8, [13])):
        pool.insert(key, phrase, PhraseSource.HISTORY)
    world = world_of(pool)
    state, draft, suffix = world.drafting.state, NodeSource.DRAFT, NodeSource.SUFFIX
    state.chain_len[0], state.chain[0, :2], state.confidence[0, :2] = 2, (5, 6), (0.9, 0.3)
    state.alternatives[0, 0, 0], state.alternative_probs[0, 0, 0] = 7, 0.08
    state.branches[0, 0, 0], state.branch_next[0, 0, 0] = 8, 9
    known, another = counted(1), counted(0)  # the pool knows another token there
    assert looked(world) == {
        (5,): (grade(0.9), known, draft),
        (7,): (grade(0.8), another, draft),
        (8,): (grade(BRANCH_PROBABILITIES[0]), another, draft),
        (5, 6): (grade(0.3), another, draft),
        (5, 11): (NOT_IN_TOP_K, known, suffix),
        (5, 6, 12): (BEYOND_CHAIN, known, suffix),
        (8, 9): (grade(BRANCH_PROBABILITIES[0]), another, draft),
        (8, 13): (BEYOND_CHAIN, known, suffix),
    }


def test_a_draft_token_is_graded_by_what_is_left_once_likelier_ones_were_wrong() -> None:
    """The pool puts the draft model's second choice first: that is no surer for it."""
    pool = PhrasePool(64, 3, 4)
    pool.insert(2, [7], PhraseSource.HISTORY)
    world = world_of(pool)
    world.rates = (
        np.linspace(0.1, 0.4, NUM_EVIDENCES)
        .repeat(NUM_GRADES)
        .reshape(-1, NUM_GRADES)
        .T.reshape(1, -1)
    )
    state = world.drafting.state
    state.chain_len[0], state.chain[0, 0], state.confidence[0, 0] = 1, 5, 0.6
    state.alternatives[0, 0, :2], state.alternative_probs[0, 0, :2] = (7, 8), (0.3, 0.05)
    found = looked(world)
    assert [path for path in found if len(path) == 1] == [(7,), (5,), (8,)]
    assert found[(7,)][0] == grade(0.3)
    assert found[(5,)][0] == grade(0.6 / 0.7)
    assert found[(8,)][0] == grade(0.05 / 0.1)


def test_limits_stops_and_narrow_requests() -> None:
    pool = PhrasePool(64, 3, 1)
    for key, token in ((2, 4), (2, 3), (3, 6), (3, 5), (4, 7)):
        pool.insert(key, [token], PhraseSource.HISTORY)
    for limit, narrow, stops, expected in (
        (4, False, (), [(3,), (4,), (3, 5), (3, 6)]),
        (16, True, (), [(3,), (3, 5)]),
        (16, False, (3,), [(3,), (4,), (4, 7)]),
        (0, False, (), []),
    ):
        world = world_of(pool, stops=stops)
        world.drafting.start(0, 2, limit, 64, narrow)
        assert list(looked(world)) == expected
    world.slots, world.rows, world.rates = world.slots[:0], world.rows[:0], world.rates[:0]
    assert grown(world) == ([], [])
