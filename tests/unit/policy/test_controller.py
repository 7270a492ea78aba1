"""The policy that weighs costs and estimates: pure functions, no engine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ouroboros.policy.acceptance_estimates import CalibrationBias
from vllm_ouroboros.policy.controller import EXPLORATION_STEPS, IDLE_FACTOR, SHRINKAGE, Policy
from vllm_ouroboros.policy.forward_costs import CostCurve, Costs
from vllm_ouroboros.policy.throughput import MIN_OBSERVED_STEPS, Step
from vllm_ouroboros.trees.draft_tree import ROOT
from vllm_ouroboros.trees.node_kinds import NUM_KINDS

from ..helpers.policy_fakes import ALONE_COUNTED, SURE, curve, text, tree_of


def policy_of(row: float, draft: float, *slots: int, fixed: float = 1.0) -> Policy:
    policy = Policy(Costs(curve(fixed, row), curve(draft, 0.0)))
    for slot in slots:
        policy.begin_step(slot, True)
    return policy


@given(
    gains=st.lists(st.lists(st.floats(0.001, 0.99), max_size=12), min_size=1, max_size=4),
    row=st.floats(0.001, 1.0),
    others=st.integers(0, 3),
)
def test_sizes_are_worth_the_most(gains, row, others) -> None:
    """No other number of the best nodes makes more tokens, the time of their rows taken off; their
    odds count for less than they are, since the best of many estimates are too good.
    """
    policy = policy_of(row, 0.0)
    trees = [np.sort(np.array(g))[::-1] for g in gains]
    batch = len(trees) + others
    sizes = policy.tree_sizes(trees, batch)
    speed, flat = policy.throughput(batch), np.sort(np.concatenate(trees))[::-1]
    odds = flat / (1 - flat) / SHRINKAGE
    doubted = odds / (1 + odds)
    worth = [
        doubted[:n].sum() - speed * policy.costs.target.at(batch + n) for n in range(len(flat) + 1)
    ]
    assert worth[sizes.sum()] == pytest.approx(max(worth))
    taken = sum(tree[:n].sum() for tree, n in zip(trees, sizes, strict=True))
    assert taken == pytest.approx(flat[: sizes.sum()].sum())


@pytest.mark.parametrize("row, size", [(0.0, 4), (0.4, 2), (9.0, 0)])
def test_rows_are_taken_while_they_are_worth_it(row, size) -> None:
    """All where rows are free, the likely ones, none where a row costs a whole step."""
    [got] = policy_of(row, 0.1).tree_sizes([np.array([0.9, 0.7, 0.1, 0.05])], 1)
    assert got == size
    assert policy_of(row, 0.1).tree_sizes([np.empty(0)], 1).tolist() == [0]


def test_rates_follow_the_request() -> None:
    policy = policy_of(0.2, 0.1, 0, 1)
    tree = tree_of([1, 2, 3], [ROOT, 0, 1], [SURE] * 3)
    for _ in range(30):
        policy.learn(0, tree, 3, None, text(1, 2, 3, 0))
        policy.learn(1, tree, 3, None, text(9))
    good, bad = policy.rates([0, 1])
    assert good[SURE] > bad[SURE]
    policy.forget(1)
    policy.begin_step(1, True)
    assert policy.requests[1].bias.odds_ratio == 1
    before = policy.greedy.estimates.trials.copy()
    policy.begin_step(2, False)  # requests that sample are a class of their own
    policy.learn(2, tree, 3, None, text(9))
    assert (policy.greedy.estimates.trials == before).all()
    assert policy.sampled.estimates.trials.sum() == 1
    assert policy.rates([]).shape == (0, NUM_KINDS)


def test_drafting_goes_on_while_the_chain_is_likely_to_get_there() -> None:
    confidence = np.array([[0.95, 0.95, 0.0], [0.95, 0.05, 0.0]], np.float32)
    slots, lengths = np.array([0, 1]), np.array([2, 2], np.int32)
    policy = policy_of(0.1, 0.2, 0, 1)
    assert policy.continues_drafting(slots, confidence, lengths, 20, 2).tolist() == [True, False]
    assert not policy_of(0.1, 9.0, 0, 1).continues_drafting(slots, confidence, lengths, 20, 2).any()


def drafts_of(policy: Policy, *slots: int, lags=0, limits=26, promised=0.0) -> np.ndarray:
    shape = len(slots)
    return policy.choose_drafted(
        np.array(slots), np.full(shape, promised), 10, np.full(shape, lags), np.full(shape, limits)
    )


def drive(policy: Policy, steps: int, right: bool, seconds: float = 1.0) -> list[bool]:
    """Steps of one request whose drafts are right, or wrong; the pool alone never helps."""
    tree = tree_of([1, 2, 3], [ROOT, 0, 1], [SURE] * 3)
    nothing, now, drafted = tree.prefix(0), policy._last[0] if policy._last else 0.0, []
    for _ in range(steps):
        policy.begin_step(0, True)
        [drafts] = drafts_of(policy, 0).tolist()
        drafted.append(drafts)
        written = text(1, 2, 3, 0) if right and drafts else text(9)
        if drafts:
            policy.observe_drafting(policy.costs.round(10))
            policy.learn(0, tree, 3, nothing, written)
        now += seconds + drafts * policy.costs.round(10)
        policy.end_step(Step(1, len(written), 1.0, True), now)
    return drafted


def test_a_draft_that_had_to_wait_does_not_end_drafting() -> None:
    """The first one may have compiled something for half a minute."""
    policy = policy_of(0.0, 0.3)
    drive(policy, 1, True)
    policy.observe_drafting(30.0)
    assert all(drive(policy, 20, True))


def test_drafts_that_do_not_pay_end_and_are_looked_at_again() -> None:
    """Looks take about a hundredth of the time; once drafts pay, they come back."""
    policy = policy_of(0.0, 0.3)
    assert all(drive(policy, 200, True)[50:])
    late = drive(policy, 3000, False)[200:]
    assert 0 < sum(late) * 0.3 / len(late) < 0.012
    assert sum(late) % EXPLORATION_STEPS == 0
    assert all(drive(policy, 3000, True)[-100:])
    assert not drafts_of(Policy(Costs(curve(1.0, 0.0), None)), 0).any()


def test_only_those_are_drafted_for_whom_it_helps() -> None:
    policy = policy_of(0.01, 0.1, 0, 1)
    tree = tree_of([1, 2], [ROOT, 0], [SURE] * 2)
    for _ in range(120):
        policy.begin_step(0, True)
        policy.begin_step(1, True)
        policy.learn(0, tree, 2, tree.prefix(0), text(1, 2, 0))
        policy.learn(1, tree, 2, tree.prefix(0), text(9))
    assert drafts_of(policy, 0, 1).tolist() == [True, False]


def test_the_draft_model_is_asked_where_phrases_promise_little() -> None:
    """The same request drafts in one step and not in another, by what it finds in the pool."""
    policy = policy_of(0.01, 0.1, 0)
    tree, pool = (
        tree_of([1, 2], [ROOT, 0], [SURE] * 2),
        tree_of([1, 2], [ROOT, 0], [ALONE_COUNTED] * 2),
    )
    for _ in range(200):
        policy.begin_step(0, True)
        if drafts_of(policy, 0).any():
            policy.learn(0, tree, 2, tree.prefix(0), text(1, 2, 0))
        if drafts_of(policy, 0, promised=1.9).any():
            policy.learn(0, tree, 2, pool, text(1, 2, 0))
    assert drafts_of(policy, 0, promised=0.1).all()
    assert not drafts_of(policy, 0, promised=1.9).any()
    assert policy.requests[0].mean_savings == pytest.approx(
        policy.requests[0].expected_savings()[[0, 3]].mean(), 0.1
    )


def test_drafts_that_are_never_verified_end() -> None:
    """Rows may be so dear that not one node of a drafted tree is verified."""
    policy = policy_of(0.0, 0.1, 0)
    tree = tree_of([1], [ROOT], [SURE])
    for _ in range(100):
        policy.begin_step(0, True)
        if drafts_of(policy, 0).any():
            policy.learn(0, tree, 0, tree.prefix(0), text(9))
    assert not drafts_of(policy, 0).any()
    assert policy.rates([0])[0][SURE] < 0.5  # the text says that it would have been wrong


def test_many_requests_learn_together_that_drafting_does_not_pay() -> None:
    """A batch need not find out for each of its requests what it saw in others."""
    slots = range(32)
    policy, steps = policy_of(0.0, 1.0, *slots), 0
    tree = tree_of([1], [ROOT], [SURE])
    while drafts_of(policy, *slots).any():
        steps += 1
        for slot in slots:
            policy.begin_step(slot, True)
            policy.learn(slot, tree, 0, tree.prefix(0), text(9))
    assert 0 < steps < 4 + EXPLORATION_STEPS
    policy.begin_step(32, True)
    assert policy.requests[32].expected_savings(0) < 0.3  # was 1


def test_a_request_without_end_still_hears_of_others() -> None:
    policy = policy_of(0.0, 1.0, 0)
    for _ in range(20000):
        policy.requests[0].observe_savings(0.5, 0)  # steps of one class alone
    assert policy.requests[0].expected_savings(1) == pytest.approx(policy.greedy.savings[1])


def test_a_text_is_read_for_what_drafting_will_bring() -> None:
    """Long prompts with short answers are left unread."""
    policy = Policy(Costs(curve(1.0, 0.0), curve(0.001, 0.01)))
    policy.begin_step(0, True)
    assert policy.reads_prompt(0, 10)
    assert not policy.reads_prompt(0, 10000)
    assert not policy.reads_prompt(7, 1)  # a stranger
    assert drafts_of(policy, 0, lags=10).all()
    assert not drafts_of(policy, 0, lags=10000).any()
    assert not drafts_of(policy, 0, lags=300, limits=2).any()
    for _ in range(60):
        policy.forget(0)
        policy.begin_step(0, True)  # requests turn out to end at once
    assert not drafts_of(policy, 0, lags=300).any()
    assert not policy.reads_prompt(0, 300)
    assert not Policy(Costs(curve(1.0, 0.0), None)).reads_prompt(0, 1)


def test_a_look_reads_little() -> None:
    """Of requests that were not read, a look takes those that it can read in its time."""
    policy = Policy(Costs(curve(1.0, 0.0), curve(0.01, 0.01)))
    for slot in range(2):
        policy.begin_step(slot, True)
    policy.greedy.savings[:] = -1.0
    lags, limits = np.array([900, 20]), np.full(2, 26)
    chosen = []
    for now in range(400):
        policy.end_step(step(2, 2), float(now))
        chosen.append(policy.choose_drafted(np.arange(2), np.zeros(2), 2, lags, limits).tolist())
        if chosen[-1][1]:
            lags[1] = 0  # it has been read now
    assert (
        chosen[:EXPLORATION_STEPS] == [[False, True]] * EXPLORATION_STEPS
    )  # at once, whatever it may cost
    assert chosen[EXPLORATION_STEPS] == [False, False]
    assert EXPLORATION_STEPS < sum(two for _, two in chosen) < 100
    assert not any(one for one, _ in chosen)


def test_a_look_whose_request_ends_is_not_the_last_one() -> None:
    """No time is left to read another request in its place; later there is."""
    policy = Policy(Costs(curve(1.0, 0.0), curve(0.01, 0.01)))
    policy.greedy.savings[:] = -1.0
    looks = []
    for now in range(300):
        policy.begin_step(
            now // 2, True
        )  # every request ends after two steps, in the middle of a look
        policy.end_step(step(1, 1), float(now))
        unread = np.array([20 if now % 2 == 0 or not looks[-1] else 0])
        drafts = policy.choose_drafted(np.array([now // 2]), np.zeros(1), 1, unread, np.full(1, 26))
        looks.append(bool(drafts.any()))
        if now % 2:
            policy.forget(now // 2)
    assert looks[:3] == [True, True, False]
    assert any(looks[100:200])
    assert any(looks[200:])


def test_a_cost_that_was_measured_wrong_is_found_out() -> None:
    """An engine that starts on a busy machine may think drafting a hundred times too dear."""
    policy = Policy(Costs(curve(1.0, 0.0), curve(10.0, 0.0)))
    policy.begin_step(0, True)
    chosen = []
    for now in range(100):
        chosen.append(bool(drafts_of(policy, 0).any()))
        if chosen[-1]:
            for _ in range(2):
                policy.costs.observe_round(10, 0.1, 0.1)
            policy.observe_drafting(0.2)
        policy.end_step(step(1, 3 if chosen[-1] else 1, 1.1), float(now))
    assert all(chosen[:EXPLORATION_STEPS])
    assert all(chosen[-80:])


def test_what_the_pool_would_have_done_alone_does_not_count_for_the_draft_model() -> None:
    policy = policy_of(0.0, 0.1)
    tree = tree_of([1, 2], [ROOT, 0], [SURE] * 2)
    alone = tree_of([1, 2], [ROOT, 0], [ALONE_COUNTED] * 2)
    for _ in range(100):
        policy.begin_step(0, True)
        policy.learn(0, tree, 2, alone, text(1, 2, 0))
    assert policy.requests[0].expected_savings(0) == pytest.approx(0.0, abs=0.02)
    assert policy.greedy.estimates.rates([CalibrationBias()])[0, ALONE_COUNTED] > 0.9


def test_wide_rounds_are_for_those_who_can_afford_them() -> None:
    policy = Policy(Costs(curve(1.0, 0.0), CostCurve([1, 100], [0.1, 0.2])))
    assert policy.affords_rows(1, 20, 2)
    assert not policy.affords_rows(1, 100, 2)


def step(requests=1, tokens=1, forwards=1.0, decoding=True) -> Step:
    return Step(requests, tokens, forwards, decoding)


def test_steps_that_say_nothing_are_not_counted() -> None:
    policy = policy_of(0.0, 2.0)
    policy.end_step(step(), 0.0)
    policy.end_step(step(decoding=False), 2.0)
    policy.end_step(step(requests=2), 4.0)
    policy.end_step(step(requests=2), 4.0 + 2 * IDLE_FACTOR)
    assert policy.costs.overhead == 0
    policy.end_step(step(requests=2), 4.0 + 2 * IDLE_FACTOR + 1.5)
    assert policy.costs.overhead == 0.5


def test_a_second_is_worth_what_the_batch_makes_of_it() -> None:
    """What the costs say at first; never less than plain decoding would make."""
    policy = policy_of(0.5, 2.0)
    assert policy.throughput(4) == 4 / 3
    for i in range(MIN_OBSERVED_STEPS + 3):
        policy.end_step(step(requests=4, tokens=12, forwards=3.0), 3.0 * i)
    assert policy.throughput(4) == pytest.approx(4.0)
    for i in range(300):
        policy.end_step(step(requests=4, tokens=1, forwards=3.0), 100 + 3.0 * i)
    assert policy.throughput(4) == pytest.approx(4 / 3)
