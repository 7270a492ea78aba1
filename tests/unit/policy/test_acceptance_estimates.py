"""How likely nodes are accepted: what is learned from walks, and by requests."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.policy.acceptance_estimates import (
    MAX_RATE,
    PRIOR,
    CalibrationBias,
    Estimates,
    apply_bias,
)
from vllm_ouroboros.trees.draft_tree import ROOT, DraftTree, walk
from vllm_ouroboros.trees.node_kinds import (
    GRADE_BOUNDS,
    NUM_EVIDENCES,
    NUM_GRADES,
    NUM_KINDS,
    PREDICTION,
    PREDICTION_GUESS,
    Evidence,
    grade,
    kind_of,
)

from ..helpers.policy_fakes import SURE, text, tree_of


def test_kinds_are_grades_and_evidence() -> None:
    assert len(PRIOR) == NUM_KINDS == NUM_GRADES * NUM_EVIDENCES
    assert sorted({kind_of(g, e) for g in range(NUM_GRADES) for e in range(NUM_EVIDENCES)}) == [
        *range(NUM_KINDS)
    ]
    assert [grade(np.float32(p)) for p in (0.0, *GRADE_BOUNDS, 1.0)] == [
        *range(len(GRADE_BOUNDS) + 1),
        len(GRADE_BOUNDS),
    ]
    table = PRIOR.reshape(NUM_GRADES, NUM_EVIDENCES)
    assert ((table > 0) & (table < 1)).all()
    assert (np.diff(table[: len(GRADE_BOUNDS) + 1], axis=0) > 0).all()
    assert (np.diff(table[:, Evidence.COUNTED : PREDICTION_GUESS]) > 0).all(), "by larger shares"
    assert (table[:, PREDICTION] > table[:, PREDICTION_GUESS]).all()


@given(seed=st.integers(0, 2**31), size=st.integers(1, 12), known=st.integers(1, 13))
@settings(deadline=None)
def test_what_is_learned_are_the_turns_of_a_walk(seed, size, known) -> None:
    """Every accepted node was right in its turn; each level has at most one that was. Nothing is
    learned of places that the target has not written yet.
    """
    rng = np.random.default_rng(seed)
    parents = np.array([rng.integers(-1, i) if i else -1 for i in range(size)], np.int32)
    tokens = rng.integers(0, 3, size).astype(np.int32)
    tree = DraftTree(tokens, parents, parents, np.arange(size, dtype=np.int32))
    predicted = rng.integers(0, 3, size + 1)
    path = np.empty(size, np.int32)
    accepted = path[: walk(tokens, parents, size, predicted, path)].tolist()
    rows = [0, *(node + 1 for node in accepted)]
    written = predicted[rows].astype(np.int32)[:known]
    accepted = accepted[:known]
    estimates, bias = Estimates(), CalibrationBias()
    assert estimates.learn(tree, written, bias) == len(accepted)
    assert np.flatnonzero(estimates.accepted).tolist() == sorted(accepted)
    reached = [ROOT, *accepted][:known]
    turns = [
        i for i in range(size)
        if parents[i] in reached and not any(a < i and parents[a] == parents[i] for a in accepted)
    ]  # fmt: skip
    assert np.flatnonzero(estimates.trials).tolist() == turns
    assert bias.accepted == len(accepted)


def test_rates_come_to_what_happens_and_requests_differ() -> None:
    tree = tree_of([1], [ROOT], [SURE])
    estimates, good, bad = Estimates(), CalibrationBias(), CalibrationBias()
    for i in range(4000):
        right = i % 4 == 0
        bias = good if right else bad
        estimates.learn(tree, text(1 if right else 2), bias)
        bias.decay()
        estimates.decay()
    assert estimates.rates([CalibrationBias()])[0, SURE] == pytest.approx(0.25, abs=0.05)
    assert estimates.rates_by_grade()[SURE // NUM_EVIDENCES] == pytest.approx(0.25, abs=0.05)
    assert estimates.rates([good])[0, SURE] > 2 * estimates.rates([bad])[0, SURE]
    assert (estimates.rates([good, bad]) <= MAX_RATE).all()
    before = bias.odds_ratio, estimates.accepted.sum()
    estimates.learn(tree, text(1), None)  # of a tree that was not verified
    assert bias.odds_ratio == before[0]
    assert estimates.accepted.sum() == before[1] + 1


def test_a_request_as_good_as_others_has_their_rates() -> None:
    """And one that is better misses less, but what is all but certain has little to gain."""
    rates = np.array([0.0, 0.3, 0.97, 1.0])
    usual, better = apply_bias(rates, [CalibrationBias(10, 10, 20), CalibrationBias(20, 10, 20)])
    np.testing.assert_allclose(usual, rates)
    assert (better[1:3] > rates[1:3]).all()
    assert better[1] / rates[1] > 1.5 > 1.03 > better[2] / rates[2]
    np.testing.assert_allclose(better[[0, 3]], [0, 1])
    np.testing.assert_allclose(1 - apply_bias(1 - rates, [CalibrationBias(0, 10, 20)])[0], better)


@pytest.mark.parametrize(
    "written, alone, saved",
    [
        ((9,), 0, 0.0),
        ((1, 9), 0, 1.0),
        ((1, 9), 1, 0.0),
        ((1, 9), 2, -1.0),  # the draft model led astray
        ((1, 2, 3, 9), 0, 2.0),
        ((1, 2, 3, 9), 1, 2.0),  # they lacked it after all
        ((1, 2, 3, 9), 2, 1.0),
    ],
)
def test_a_draft_saves_a_step_for_each_token_that_phrases_would_have_lacked(
    written, alone, saved
) -> None:
    """Of tokens 1, 2 and 3 phrases know the second; it would have come with the next step."""
    estimates, known = Estimates(), SURE + PREDICTION_GUESS - 1
    tree = tree_of([1, 2, 3], [ROOT, 0, 1], [SURE, known, SURE])
    assert estimates.steps_saved(tree, text(*written), alone) == pytest.approx(saved, abs=0.03)


def test_what_is_not_seen_again_is_tried_again() -> None:
    """A bad start must not shut a kind out for ever."""
    tree, estimates = tree_of([1], [ROOT], [SURE]), Estimates()
    for _ in range(50):
        estimates.learn(tree, text(2), None)
    assert estimates.rates([CalibrationBias()])[0, SURE] < 0.2
    for _ in range(3000):
        estimates.decay()
    assert estimates.rates([CalibrationBias()])[0, SURE] == pytest.approx(PRIOR[SURE], abs=0.05)
