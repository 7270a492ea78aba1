"""What each node of a tree promises: the probability that the target accepts it.

A node's kind says what speaks for its token: how sure the draft model is of it, and what the pool
knows. For each kind the rate is estimated at which its nodes are right once their turn comes: the
target reached the parent, and none of the siblings before them was right. Along a path these rates
multiply to the probability that a node is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from numba.extending import register_jitable

from vllm_ouroboros.trees.draft_tree import ROOT, DraftTree, child_of
from vllm_ouroboros.trees.node_kinds import ALONE, EVIDENCES, GRADES, KINDS, Evidence

PRIOR_WEIGHT, MEMORY = 6.0, 0.998  # observations that the prior is worth; decay for each step
REQUEST_WEIGHT, REQUEST_MEMORY = 6.0, 0.9  # the same for a request; decay for each of its steps
SUREST = 0.998  # rate that no node goes beyond


def _prior() -> np.ndarray:
    grades = np.array([0.15, 0.28, 0.43, 0.58, 0.73, 0.85, 0.9, 0.96, 0.15])
    # of what the pool says: nothing, two guesses, said elsewhere, goes on; then shares, ascending
    alone = np.array([
        0.01, 0.1, 0.3, 0.03, 0.3,
        0.02, 0.04, 0.06, 0.13, 0.21, 0.41, 0.59, 0.71,
        0.83, 0.88, 0.915, 0.955, 0.977, 0.988, 0.997,
    ])  # fmt: skip
    speaks = np.array([
        0.0, 0.1, 0.3, -0.5, 0.5,
        -1.0, -0.4, -0.2, 0.1, 0.25, 0.5, 0.9, 1.2,
        1.8, 2.0, 2.3, 3.2, 3.5, 3.7, 4.4,
    ])  # fmt: skip
    odds = np.log(grades / (1 - grades))[:, None] + speaks
    return np.concatenate([1 / (1 + np.exp(-odds)), alone[None], alone[None]]).ravel()


PRIOR = _prior()
"""Rate float64 [KINDS] before anything was seen: the pool's word and the draft model's, as odds."""


@register_jitable
def rate(turns, right, prior):
    """Rate at which nodes are right, given the prior and what was counted; numbers or arrays."""
    return (right + PRIOR_WEIGHT * prior) / (turns + PRIOR_WEIGHT)


@njit(cache=True)
def observe(tokens, parents, kinds, text, turns, right):
    """Count for each kind how many nodes had their turn, and how many were right.

    ``text`` int32 [m] is what the target wrote; what it would have written behind is not known.
    Returns how many nodes had their turn, how many were right, and how many of those that had
    their turn should have been by the rates before.
    """
    passed = np.empty(tokens.shape[0], np.int64)
    path = np.empty(tokens.shape[0], np.int64)
    had, hits, expected = 0, 0, 0.0
    node = ROOT
    for token in text:
        found = -1
        for child in range(node + 1, tokens.shape[0]):
            if parents[child] == node:
                kind = kinds[child]
                expected += rate(turns[kind], right[kind], PRIOR[kind])
                passed[had] = kind
                had += 1
                if tokens[child] == token:
                    found = child
                    break
        if found < 0:
            break
        path[hits] = kinds[found]
        hits += 1
        node = found
    for kind in passed[:had]:
        turns[kind] += 1
    for kind in path[:hits]:
        right[kind] += 1
    return had, hits, expected


@njit(cache=True)
def surprises(tokens, parents, kinds, text, first, by_phrase):
    """How many right nodes of a path a tree of phrases would have lacked, by what phrases knew.

    ``text`` int32 [m] leads along the path, of whose nodes those before ``first`` do not count and
    that one is known to be lacking; ``by_phrase`` float64 [evidence] are rates.
    """
    node, lacking = ROOT, 0.0
    for depth in range(text.shape[0] - 1):
        found = child_of(tokens, parents, tokens.shape[0], node, text[depth])
        if found < 0:
            break
        node = found
        if depth == first:
            lacking += 1.0
        elif depth > first:
            lacking += 1.0 - by_phrase[kinds[node] % EVIDENCES]
    return lacking


@dataclass
class Estimates:
    """Rates of kinds, over many requests, and how one request differs from them.

    Attributes:
        turns: float64 [KINDS], nodes that had their turn, of late.
        right: float64 [KINDS], those of them that were right.
    """

    turns: np.ndarray = field(default_factory=lambda: np.zeros(KINDS))
    right: np.ndarray = field(default_factory=lambda: np.zeros(KINDS))

    def rates(self, leanings: Sequence[Leaning]) -> np.ndarray:
        """Rates float64 [R, KINDS] for requests that lean so."""
        return np.clip(lean(self._rates(), leanings), 0.002, SUREST)

    def _rates(self) -> np.ndarray:
        return rate(self.turns, self.right, PRIOR)

    def grades(self) -> np.ndarray:
        """Rates float64 [GRADES] whatever the pool says."""
        shape = (GRADES, EVIDENCES)
        turns, right = self.turns.reshape(shape).sum(1), self.right.reshape(shape).sum(1)
        prior = PRIOR.reshape(shape)[:, Evidence.NONE]
        return rate(turns, right, prior)

    def learn(self, tree: DraftTree, text: np.ndarray, leaning: Leaning | None) -> float:
        """The target wrote ``text`` int32 [m] where a tree with kinds was expected.

        The leaning learns as well, unless it is None: from trees that were verified.

        Returns:
            How many nodes were right.
        """
        had, right, expected = observe(
            tree.tokens, tree.parents, tree.kinds, text, self.turns, self.right
        )
        if leaning is not None:
            leaning.learn(right, expected, had)
        return float(right)

    def steps_saved(self, tree: DraftTree, text: np.ndarray, alone: int) -> float:
        """How many steps a tree spared a request which wrote ``text`` int32 [m].

        Args:
            tree: with kinds.
            alone: nodes that would have been right without the draft model. The step would have
                ended behind them; of what followed, phrases would have had some in the next ones.
        """
        if len(text) - 1 < alone:
            return -1.0
        by_phrase = self._rates().reshape(GRADES, EVIDENCES)[ALONE]
        return surprises(tree.tokens, tree.parents, tree.kinds, text, alone, by_phrase)

    def fade(self) -> None:
        """A step went by: what is not seen again comes back to the prior, and is tried again."""
        self.turns *= MEMORY
        self.right *= MEMORY


def lean(rates: np.ndarray, leanings: Sequence[Leaning]) -> np.ndarray:
    """Rates float64 [R, n] of requests that lean so, given those of all, float64 [n].

    By the odds: a factor on rates near 1 would make long paths of them look sure.
    """
    odds = np.array([one.factor for one in leanings]).reshape(-1, 1) * rates
    return odds / (1 - rates + odds)


@dataclass
class Leaning:
    """Whether a request's drafts are right more or less often than others'.

    Attributes:
        right: nodes that were right, of late.
        expected: that were expected to be.
        turns: that had their turn.
    """

    right: float = 0.0
    expected: float = 0.0
    turns: float = 0.0

    @property
    def factor(self) -> float:
        """What the odds of its rates are multiplied with."""
        right = (self.right + REQUEST_WEIGHT) / (self.expected + REQUEST_WEIGHT)
        wrong = self.turns - self.right, self.turns - self.expected
        return right * (wrong[1] + REQUEST_WEIGHT) / (wrong[0] + REQUEST_WEIGHT)

    def learn(self, right: float, expected: float, turns: float) -> None:
        """So many nodes were right of those that had their turn, so many were expected to be."""
        self.right += right
        self.expected += expected
        self.turns += turns

    def fade(self) -> None:
        """A step went by."""
        self.right *= REQUEST_MEMORY
        self.expected *= REQUEST_MEMORY
        self.turns *= REQUEST_MEMORY


def warm_up() -> None:
    """Compile (or load from numba's cache) what learns, so that no request waits for it."""
    tree = DraftTree.chain([1, 1])._replace(kinds=np.zeros(2, np.int32))
    text = np.ones(1, np.int32)
    Estimates().learn(tree, text, Leaning())
    Estimates().steps_saved(tree, text, 0)
