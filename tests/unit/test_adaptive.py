"""Costs, estimates and the policy that weighs them: pure functions, no engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ouroboros.adaptive import IDLE, Policy, Step, best_size, prune
from vllm_ouroboros.costs import SIZES, Costs, Curve, measure
from vllm_ouroboros.draft_rounds import confidences
from vllm_ouroboros.estimates import (
    BRANCH,
    BRANCH_LATER,
    END,
    END_LATER,
    KINDS,
    PRIOR,
    START,
    START_LATER,
    Estimates,
    Leaning,
    bins,
    label,
    probabilities,
)
from vllm_ouroboros.tree import ROOT, DraftTree, NodeSource, walk

D, S = int(NodeSource.DRAFT), int(NodeSource.SUFFIX)


def tree_of(nodes: list[tuple[int, int, int]], chain: int, confidence=(0.95, 0.55, 0.05)):
    """A tree of (token, parent, source), with kinds."""
    tokens, parents, sources = (np.array(part, np.int32) for part in zip(*nodes, strict=True))
    kinds = np.empty(len(nodes), np.int32)
    label(parents, sources, chain, np.array(confidence, np.float32), kinds)
    return DraftTree(tokens, parents, sources, kinds)


def curve(fixed: float, row: float) -> Curve:
    return Curve(SIZES, [fixed + row * n for n in SIZES])


# -- costs -----------------------------------------------------------------------------------------


def test_a_curve_interpolates_never_falls_and_goes_on() -> None:
    one = Curve([1, 2, 4, 8], [4.0, 3.0, 6.0, 8.0])
    assert [one.at(n) for n in (0, 1, 2, 3, 4, 6, 8, 10)] == [0, 4, 4, 5, 6, 7, 8, 9]
    assert one.table(10).tolist() == [one.at(n) for n in range(11)]
    assert one.table(100)[100] == one.at(100)
    assert Curve([1], [2.0]).at(3) == 6


def test_measurement_takes_the_fastest_of_some_runs() -> None:
    now, runs = [0.0], []

    def run(rows: int) -> None:
        runs.append(rows)
        now[0] += rows * (1 if runs.count(rows) == 3 else 5) * scale

    scale = 2**-10
    found = measure(run, 20, clock=lambda: now[0])
    assert list(found.sizes) == [1, 2, 4, 8, 16]
    assert found.seconds == [n * scale for n in (1, 2, 4, 8, 16)]
    runs.clear()
    scale = 2.0  # a slow model: what was measured goes on as a line
    found = measure(run, 1000, clock=lambda: now[0])
    assert list(found.sizes) == [1, 2]
    assert found.at(8) > found.at(4) > found.at(2)


def test_costs_follow_what_is_seen() -> None:
    one = curve(1.0, 0.0)
    for _ in range(200):
        one.observe(8, 2.0)
    assert one.at(8) == pytest.approx(2.0, rel=0.01)
    for _ in range(400):  # eight rows have become dear, one has not
        one.observe(8, 4.0)
        one.observe(1, 1.0)
    assert one.at(1) == pytest.approx(1.0, rel=0.1)
    assert one.at(8) == pytest.approx(4.0, rel=0.1)
    assert one.table(8)[8] == pytest.approx(one.at(8))
    before = one.factor
    one.observe(8, 1e9)  # a machine that slept
    assert one.factor < 1.2 * before
    one.observe(0, 5.0)
    costs = Costs(curve(1.0, 0.0), None)
    costs.observe_overhead(0.5)
    assert costs.overhead == 0.5
    costs.observe_overhead(1e9)
    assert costs.overhead < 0.6
    shown = costs.as_dict()
    assert shown["target"]["1"] == 1000
    assert "draft" not in shown


# -- estimates -------------------------------------------------------------------------------------


def test_kinds_say_who_proposed_a_node_and_where() -> None:
    tree = tree_of(
        [
            (1, ROOT, D), (2, 0, D), (3, 1, D),  # the chain
            (4, ROOT, D), (5, 3, D), (6, 0, D),  # branches
            (7, 2, S), (8, 6, S), (9, 2, S), (1, 2, S), (2, 2, S),  # at its end
            (7, ROOT, S), (8, 11, S), (9, ROOT, S), (9, 0, S),  # at the root, or off the chain
        ],
        chain=3,
    )  # fmt: skip
    assert tree.kinds.tolist() == [
        9, 5, 0, BRANCH, BRANCH_LATER, BRANCH, END, END_LATER, END + 1, END + 2, END + 2,
        START, START_LATER, START + 1, START_LATER,
    ]  # fmt: skip
    pool_only = tree_of([(1, ROOT, S), (2, 0, S), (3, ROOT, S)], chain=0)
    assert pool_only.kinds.tolist() == [START, START_LATER, START + 1]
    assert bins(np.array([0.0, 0.55, 1.0], np.float32)).tolist() == [0, 5, 9]
    assert len(PRIOR) == KINDS


def test_probabilities_of_siblings_share_what_is_left() -> None:
    tree = tree_of([(1, ROOT, D), (2, 0, D), (3, ROOT, S), (4, ROOT, S)], chain=2)
    rates = np.zeros(KINDS)
    rates[[9, 5, START, START + 1]] = 0.5, 0.4, 0.6, 0.5
    result = np.empty(4)
    probabilities(tree.parents, tree.kinds, rates, result)
    assert result.tolist() == pytest.approx([0.5, 0.2, 0.3, 0.1])


@given(seed=st.integers(0, 2**31), size=st.integers(1, 12))
def test_what_is_learned_are_the_turns_of_a_walk(seed, size) -> None:
    """Every accepted node was right in its turn; each level has at most one that was."""
    rng = np.random.default_rng(seed)
    parents = np.array([rng.integers(-1, i) if i else -1 for i in range(size)], np.int32)
    tokens = rng.integers(0, 3, size).astype(np.int32)
    tree = DraftTree(tokens, parents, np.full(size, S, np.int32), np.arange(size, dtype=np.int32))
    predicted = rng.integers(0, 3, size + 1)
    path = np.empty(size, np.int32)
    accepted = path[: walk(tokens, parents, size, predicted, path)].tolist()
    estimates, leaning = Estimates(), Leaning()
    estimates.learn(tree, predicted, leaning)
    assert np.flatnonzero(estimates.right).tolist() == sorted(accepted)
    turns = [
        i for i in range(size)
        if (parents[i] in accepted or parents[i] == ROOT)
        and not any(a < i and parents[a] == parents[i] for a in accepted)
    ]  # fmt: skip
    assert np.flatnonzero(estimates.turns).tolist() == turns
    assert leaning.right == len(accepted)


def test_rates_come_to_what_happens_and_requests_differ() -> None:
    tree = tree_of([(1, ROOT, D)], chain=1)
    estimates, good, bad = Estimates(), Leaning(), Leaning()
    for i in range(4000):
        right = i % 4 == 0
        leaning = good if right else bad
        estimates.learn(tree, np.array([1 if right else 2, 0]), leaning)
    assert estimates.rates(Leaning())[9] == pytest.approx(0.25, abs=0.02)
    assert estimates.turns.max() <= 2001
    assert estimates.rates(good)[9] > 2 * estimates.rates(bad)[9]
    assert (estimates.rates(good) <= 0.99).all()


def test_confidence_is_the_probability_of_the_chosen_token() -> None:
    logits = torch.randn(5, 7).bfloat16()
    tokens = np.array([0, 6, 3, 3, 1])
    wanted = logits.float().softmax(-1)[torch.arange(5), torch.from_numpy(tokens)]
    assert confidences(logits, tokens).tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


# -- the policy ------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), size=st.integers(1, 15), share=st.floats(0, 1))
def test_a_pruned_tree_keeps_its_paths(seed, size, share) -> None:
    rng = np.random.default_rng(seed)
    parents = np.array([rng.integers(-1, i) if i else -1 for i in range(size)], np.int32)
    ids = np.arange(size, dtype=np.int32)
    tree = DraftTree(ids, parents, ids, ids)
    keep = rng.random(size) < share
    for i in range(size):
        keep[i] &= parents[i] == ROOT or keep[parents[i]]
    got = prune(tree, keep)
    assert got.tokens.tolist() == got.sources.tolist() == got.kinds.tolist() == ids[keep].tolist()
    for token, parent in zip(got.tokens.tolist(), got.parents.tolist(), strict=True):
        assert (ROOT if parent == ROOT else got.tokens[parent]) == parents[token]


@given(
    gains=st.lists(st.floats(0.001, 0.99), max_size=30),
    requests=st.integers(1, 4),
    row=st.floats(0.0, 1.0),
    spent=st.floats(0.0, 3.0),
)
def test_the_best_size_is_the_best(gains, requests, row, spent) -> None:
    gains = np.sort(np.array(gains))[::-1]
    seconds = curve(1.0, row).table(requests + len(gains))
    rates = [
        (requests + gains[:n].sum()) / (spent + seconds[requests + n])
        for n in range(len(gains) + 1)
    ]
    got = best_size(gains, requests, seconds, spent)
    assert rates[got] == pytest.approx(max(rates))


@pytest.mark.parametrize("row, size", [(0.0, 4), (0.2, 2), (9.0, 0)])
def test_rows_are_taken_while_they_are_worth_it(row, size) -> None:
    """All where rows are free, the chain's likely part, none where a row costs a whole step."""
    policy = Policy(Costs(curve(1.0, row), curve(0.1, 0.0)))
    nodes = [(1, ROOT, D), (2, 0, D), (3, 1, D), (4, 2, S)]
    tree = tree_of(nodes, chain=3, confidence=(0.75, 0.55, 0.05))
    [got] = policy.select([tree], [0], 0.0)
    assert got.tokens.tolist() == [1, 2, 3, 4][:size]
    empty = tree_of([(1, ROOT, D)], chain=1).prefix(0)
    assert len(policy.select([empty], [0], 0.0)[0].tokens) == 0
    assert policy.select([], [], 0.0) == []


def test_requests_compete_for_rows() -> None:
    policy = Policy(Costs(curve(1.0, 0.2), curve(0.1, 0.0)))
    tree = tree_of([(1, ROOT, D), (2, 0, D), (3, 1, D)], chain=3, confidence=(0.8, 0.7, 0.6))
    for _ in range(30):
        policy.learn(0, tree, np.array([1, 2, 3, 0]))
        policy.learn(1, tree, np.array([9, 9, 9, 9]))
    good, bad = policy.select([tree, tree], [0, 1], 0.0)
    assert len(good.tokens) > len(bad.tokens)
    policy.forget(1)
    assert policy.leaning(1).factor == 1
    before = policy.estimates.turns.copy()
    policy.learn(1, tree._replace(kinds=None), np.zeros(4))  # a list of the scheduler's own
    assert (policy.estimates.turns == before).all()


def test_drafting_goes_on_while_the_chain_is_likely_to_get_there() -> None:
    policy = Policy(Costs(curve(1.0, 0.01), curve(0.2, 0.0)))
    confidence = np.array([[0.95, 0.95, 0.0], [0.95, 0.05, 0.0]], np.float32)
    lengths = np.array([2, 2], np.int32)
    assert policy.goes_on(np.array([0, 1]), confidence, lengths, 20).tolist() == [True, False]
    dear = Policy(Costs(curve(1.0, 0.01), curve(9.0, 0.0)))
    assert not dear.goes_on(np.array([0, 1]), confidence, lengths, 20).any()


def step(requests=1, tokens=1, forwards=1.0, drafted=True, decoding=True) -> Step:
    return Step(requests, tokens, forwards, drafted, decoding)


@pytest.mark.parametrize("pays", [True, False])
def test_the_faster_way_is_taken_and_the_other_one_looked_at(pays) -> None:
    """Both are tried, then the slower one has about a hundredth of the steps; things change."""
    policy = Policy(Costs(curve(1.0, 0.0), curve(2.0, 0.0)))
    now, tried = 0.0, []
    for i in range(8000):
        drafted = policy.drafts(1)
        tried.append(drafted)
        good = pays == (i < 3000)
        tokens = (9 if good else 2) if drafted else 1
        policy.end_step(step(forwards=1.0, tokens=tokens, drafted=drafted), now)
        now += 3.0 if drafted else 1.0
    first, second = tried[200:3000], tried[4600:]
    wrong = [d != pays for d in first], [d == pays for d in second]
    for share in (sum(w) / len(w) for w in wrong):
        assert 0.002 < share < 0.015
    assert not Policy(Costs(curve(1.0, 0.0), None)).drafts(1)


def test_steps_that_say_nothing_are_not_counted() -> None:
    policy = Policy(Costs(curve(1.0, 0.0), curve(2.0, 0.0)))
    policy.end_step(step(), 0.0)
    policy.end_step(step(decoding=False), 2.0)
    policy.end_step(step(requests=2), 4.0)
    policy.end_step(step(requests=2), 4.0 + 2 * IDLE)
    assert policy.costs.overhead == 0
    policy.end_step(step(requests=2), 4.0 + 2 * IDLE + 1.5)
    assert policy.costs.overhead == 0.5
