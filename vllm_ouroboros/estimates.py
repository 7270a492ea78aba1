"""What each node of a tree promises: the probability that the target accepts it.

A node's kind says who proposed it, where, and how sure the draft model was. For each kind the rate
is estimated at which its nodes are right once their turn comes: the target reached the parent, and
none of the siblings before them was right. Along a path these rates multiply to the probability
that a node is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numba import njit

from vllm_ouroboros.tree import ROOT, DraftTree, NodeSource

_DRAFT = int(NodeSource.DRAFT)
BINS = 10  # of the draft model's confidence, for tokens of the chain
BRANCH, BRANCH_LATER = 10, 11
END, END_LATER = 12, 15  # phrases at the chain's end: the first three, and further tokens
START, START_LATER = 16, 19  # phrases at the root
KINDS = 20
PRIOR = np.array(
    [(b + 0.5) / BINS for b in range(BINS)]
    + [0.2, 0.4] + [0.35, 0.2, 0.1, 0.6] + [0.35, 0.2, 0.1, 0.6]
)  # fmt: skip
"""Rate of each kind before anything was seen."""
PRIOR_WEIGHT, MEMORY = 8.0, 2000.0  # observations that the prior is worth, and that are remembered
REQUEST_WEIGHT, REQUEST_MEMORY = 6.0, 0.9  # the same for a request; decay for each of its steps


def bins(confidence: np.ndarray) -> np.ndarray:
    """Kinds int64 of tokens of a chain, by the draft model's probability of each."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


@njit(cache=True)
def label(parents, sources, chain_len, confidence, kinds):
    """Fill the kinds int32 [n] of a tree's nodes; a chain stands first, see `build_trees`.

    ``confidence`` [chain_len] is the draft model's probability of each token of the chain.
    """
    size = parents.shape[0]
    end = chain_len - 1
    at_end, at_start = 0, 0
    for i in range(size):
        parent = parents[i]
        if sources[i] == _DRAFT:
            if i < chain_len:
                kinds[i] = min(int(confidence[i] * BINS), BINS - 1)
            else:
                kinds[i] = BRANCH if parent < chain_len else BRANCH_LATER
        elif parent == ROOT:
            kinds[i] = START + min(at_start, 2)
            at_start += 1
        elif parent == end:
            kinds[i] = END + min(at_end, 2)
            at_end += 1
        elif parent >= chain_len and END <= kinds[parent] <= END_LATER:
            kinds[i] = END_LATER
        else:
            kinds[i] = START_LATER


@njit(cache=True)
def probabilities(parents, kinds, rates, result):
    """Fill the probabilities float64 [n] that nodes are accepted, from the rates of kinds."""
    left = np.ones(parents.shape[0] + 1)  # by row: that no child so far is right
    for i in range(parents.shape[0]):
        row = parents[i] + 1
        reached = 1.0 if row == 0 else result[row - 1]
        rate = rates[kinds[i]]
        result[i] = reached * left[row] * rate
        left[row] *= 1.0 - rate


@njit(cache=True)
def observe(tokens, parents, kinds, predicted, turns, right):
    """Count for each kind how many nodes had their turn, and how many were right."""
    node = ROOT
    while True:
        found = -1
        for child in range(node + 1, tokens.shape[0]):
            if parents[child] == node:
                turns[kinds[child]] += 1
                if tokens[child] == predicted[node + 1]:
                    right[kinds[child]] += 1
                    found = child
                    break
        if found < 0:
            return
        node = found


@dataclass
class Estimates:
    """Rates of kinds, over all requests, and how requests differ from them.

    Attributes:
        turns: float64 [KINDS], nodes that had their turn, of late.
        right: float64 [KINDS], those of them that were right.
    """

    turns: np.ndarray = field(default_factory=lambda: np.zeros(KINDS))
    right: np.ndarray = field(default_factory=lambda: np.zeros(KINDS))

    def rates(self, leaning: Leaning) -> np.ndarray:
        """Rates float64 [KINDS] for a request."""
        rates = (self.right + PRIOR_WEIGHT * PRIOR) / (self.turns + PRIOR_WEIGHT)
        return np.clip(rates * leaning.factor, 0.005, 0.99)

    def learn(self, tree: DraftTree, predicted: np.ndarray, leaning: Leaning) -> None:
        """A tree with kinds was verified; ``predicted`` [n + 1] is the target's token per row."""
        turns, right = np.zeros(KINDS), np.zeros(KINDS)
        observe(tree.tokens, tree.parents, tree.kinds, predicted, turns, right)
        expected = (self.right + PRIOR_WEIGHT * PRIOR) / (self.turns + PRIOR_WEIGHT)
        leaning.learn(float(right.sum()), float((turns * expected).sum()))
        self.turns += turns
        self.right += right
        share = np.minimum(1.0, MEMORY / np.maximum(self.turns, 1.0))
        self.turns *= share
        self.right *= share


@dataclass
class Leaning:
    """Whether a request's drafts are right more or less often than others'."""

    right: float = 0.0
    expected: float = 0.0

    @property
    def factor(self) -> float:
        """What its rates are multiplied with."""
        return (self.right + REQUEST_WEIGHT) / (self.expected + REQUEST_WEIGHT)

    def learn(self, right: float, expected: float) -> None:
        """So many nodes were right in a step where so many were expected to be."""
        self.right = REQUEST_MEMORY * self.right + right
        self.expected = REQUEST_MEMORY * self.expected + expected
