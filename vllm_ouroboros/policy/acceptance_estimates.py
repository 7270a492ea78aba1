"""Acceptance rates: how likely the target accepts a node, by its kind.

For each kind of node the rate is estimated at which its nodes are accepted once they have their
trial: the target reached the parent, and none of the siblings before them was accepted. Along a
path these rates multiply to the probability that a node is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numba.extending import register_jitable

from vllm_ouroboros.phrases.compiling import compiled
from vllm_ouroboros.trees.draft_tree import ROOT, DraftTree, child_of
from vllm_ouroboros.trees.node_kinds import (
    NUM_EVIDENCES,
    NUM_GRADES,
    NUM_KINDS,
    WITHOUT_DRAFT,
    Evidence,
)

PRIOR_WEIGHT, DECAY = 6.0, 0.998
"""Trials that the prior counts for; what a step leaves of the trials before it."""
BIAS_PRIOR_WEIGHT, BIAS_DECAY = 6.0, 0.9
"""The same for the bias of one request, by its own steps."""
MIN_RATE, MAX_RATE = 0.002, 0.998
"""No rate goes beyond these."""


def _prior() -> np.ndarray:
    grades = np.array([0.15, 0.28, 0.43, 0.58, 0.73, 0.85, 0.9, 0.96, 0.15])
    # by `Evidence`: none, two of the window, correction, continued phrase; then shares, ascending;
    # then two of a prediction
    without_draft = np.array([
        0.01, 0.1, 0.3, 0.03, 0.3,
        0.02, 0.04, 0.06, 0.13, 0.21, 0.41, 0.59, 0.71,
        0.83, 0.88, 0.915, 0.955, 0.977, 0.988, 0.997,
        0.5, 0.95,
    ])  # fmt: skip
    pool_log_odds = np.array([
        0.0, 0.1, 0.3, -0.5, 0.5,
        -1.0, -0.4, -0.2, 0.1, 0.25, 0.5, 0.9, 1.2,
        1.8, 2.0, 2.3, 3.2, 3.5, 3.7, 4.4,
        0.7, 3.2,
    ])  # fmt: skip
    log_odds = np.log(grades / (1 - grades))[:, None] + pool_log_odds
    return np.concatenate([
        1 / (1 + np.exp(-log_odds)), without_draft[None], without_draft[None]
    ]).ravel()  # fmt: skip


PRIOR = _prior()
"""Rate float64 [NUM_KINDS] before any trial: the log-odds of the draft model's grade and of the
pool's evidence, added. Fitted to traces of the shipped pair and of a weaker one (HumanEval,
documented functions and random tokens, recorded by scripts/simulate/record_trace.py)."""


@register_jitable
def rate(trials, accepted, prior):
    """Acceptance rate, given the prior and what was counted; numbers or arrays."""
    return (accepted + PRIOR_WEIGHT * prior) / (trials + PRIOR_WEIGHT)


@compiled
def observe(tokens, parents, kinds, text, trials, accepted):
    """Count trials and accepted nodes of each kind, from one verified tree.

    Args:
        tokens: int32 [n], the tree's.
        parents: int32 [n].
        kinds: int32 [n].
        text: int32 [m], what the target wrote; what it would have written behind is not known.
        trials: float64 [NUM_KINDS], added to.
        accepted: float64 [NUM_KINDS], added to.

    Returns:
        Trials of this tree, its accepted nodes, and how many were expected to be accepted by the
        rates before.
    """
    tried_kinds = np.empty(tokens.shape[0], np.int64)
    path_kinds = np.empty(tokens.shape[0], np.int64)
    tried, hits, expected = 0, 0, 0.0
    node = ROOT
    for token in text:
        found = -1
        for child in range(node + 1, tokens.shape[0]):
            if parents[child] == node:
                kind = kinds[child]
                expected += rate(trials[kind], accepted[kind], PRIOR[kind])
                tried_kinds[tried] = kind
                tried += 1
                if tokens[child] == token:
                    found = child
                    break
        if found < 0:
            break
        path_kinds[hits] = kinds[found]
        hits += 1
        node = found
    for kind in tried_kinds[:tried]:
        trials[kind] += 1
    for kind in path_kinds[:hits]:
        accepted[kind] += 1
    return tried, hits, expected


@compiled
def missing_from_phrases(tokens, parents, kinds, text, first, phrase_rates):
    """Accepted nodes that a tree of phrases alone would not have had, as expected by its rates.

    Args:
        tokens: int32 [n], the tree's.
        parents: int32 [n].
        kinds: int32 [n].
        text: int32 [m], what the target wrote; it leads along the accepted path.
        first: depth of the first node that phrases are known not to have had; those above it do
            not count.
        phrase_rates: float64 [NUM_EVIDENCES], acceptance rates without a draft.
    """
    node, missing = ROOT, 0.0
    for depth in range(text.shape[0] - 1):
        found = child_of(tokens, parents, tokens.shape[0], node, text[depth])
        if found < 0:
            break
        node = found
        if depth == first:
            missing += 1.0
        elif depth > first:
            missing += 1.0 - phrase_rates[kinds[node] % NUM_EVIDENCES]
    return missing


@dataclass
class Estimates:
    """Acceptance rates of kinds, over many requests.

    Attributes:
        trials: float64 [NUM_KINDS], nodes that had their trial, decayed.
        accepted: float64 [NUM_KINDS], those of them that were accepted.
    """

    trials: np.ndarray = field(default_factory=lambda: np.zeros(NUM_KINDS))
    accepted: np.ndarray = field(default_factory=lambda: np.zeros(NUM_KINDS))

    def rates(self, biases: Sequence[CalibrationBias]) -> np.ndarray:
        """Rates float64 [R, NUM_KINDS] of requests with these biases."""
        return np.clip(apply_bias(self._rates(), biases), MIN_RATE, MAX_RATE)

    def _rates(self) -> np.ndarray:
        return rate(self.trials, self.accepted, PRIOR)

    def rates_by_grade(self) -> np.ndarray:
        """Rates float64 [NUM_GRADES], whatever the pool says."""
        shape = (NUM_GRADES, NUM_EVIDENCES)
        trials, accepted = self.trials.reshape(shape).sum(1), self.accepted.reshape(shape).sum(1)
        prior = PRIOR.reshape(shape)[:, Evidence.NONE]
        return rate(trials, accepted, prior)

    def learn(self, tree: DraftTree, text: np.ndarray, bias: CalibrationBias | None) -> float:
        """The target wrote ``text`` int32 [m] where a tree with kinds was drafted.

        Args:
            tree: with kinds.
            text: int32 [m].
            bias: of the request, which learns as well; None for a tree that was not verified.

        Returns:
            How many nodes were accepted.
        """
        tried, accepted, expected = observe(
            tree.tokens, tree.parents, tree.kinds, text, self.trials, self.accepted
        )
        if bias is not None:
            bias.learn(accepted, expected, tried)
        return float(accepted)

    def steps_saved(self, tree: DraftTree, text: np.ndarray, accepted_without: int) -> float:
        """How many steps the draft model saved a request which wrote ``text`` int32 [m].

        Args:
            tree: with kinds.
            text: int32 [m].
            accepted_without: nodes that would have been accepted without the draft model. The step
                would have ended behind them; of what followed, phrases would have had some in the
                next steps.
        """
        if len(text) - 1 < accepted_without:
            return -1.0
        phrase_rates = self._rates().reshape(NUM_GRADES, NUM_EVIDENCES)[WITHOUT_DRAFT]
        return missing_from_phrases(
            tree.tokens, tree.parents, tree.kinds, text, accepted_without, phrase_rates
        )

    def decay(self) -> None:
        """A step went by: what is not seen again returns to the prior, and is tried again."""
        self.trials *= DECAY
        self.accepted *= DECAY


def apply_bias(rates: np.ndarray, biases: Sequence[CalibrationBias]) -> np.ndarray:
    """Rates float64 [R, n] of requests with these biases, given those of all, float64 [n].

    By the odds: a factor on rates near 1 would make long paths of them look certain.
    """
    odds = np.array([one.odds_ratio for one in biases]).reshape(-1, 1) * rates
    return odds / (1 - rates + odds)


@dataclass
class CalibrationBias:
    """Whether a request's nodes are accepted more or less often than the estimates expect.

    Attributes:
        accepted: nodes, decayed.
        expected: nodes that were expected to be accepted.
        trials: nodes that had their trial.
    """

    accepted: float = 0.0
    expected: float = 0.0
    trials: float = 0.0

    @property
    def odds_ratio(self) -> float:
        """What the odds of its rates are multiplied with."""
        accepted = (self.accepted + BIAS_PRIOR_WEIGHT) / (self.expected + BIAS_PRIOR_WEIGHT)
        rejected = self.trials - self.accepted
        expected_rejected = self.trials - self.expected
        return (
            accepted * (expected_rejected + BIAS_PRIOR_WEIGHT) / (rejected + BIAS_PRIOR_WEIGHT)
        )  # fmt: skip

    def learn(self, accepted: float, expected: float, trials: float) -> None:
        """Add one verified tree."""
        self.accepted += accepted
        self.expected += expected
        self.trials += trials

    def decay(self) -> None:
        """A step of the request went by."""
        self.accepted *= BIAS_DECAY
        self.expected *= BIAS_DECAY
        self.trials *= BIAS_DECAY


def warm_up() -> None:
    """Compile (or load from numba's cache) what learns, so that no request waits for it."""
    tree = DraftTree.chain([1, 1])._replace(kinds=np.zeros(2, np.int32))
    text = np.ones(1, np.int32)
    Estimates().learn(tree, text, CalibrationBias())
    Estimates().steps_saved(tree, text, 0)
