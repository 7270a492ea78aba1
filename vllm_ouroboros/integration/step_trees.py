"""The trees of a step: fixed ones, or best-first ones of the nodes that are worth their rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ouroboros.integration.live_requests import Request
from vllm_ouroboros.policy.controller import Policy
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.drafting import Drafting


class DraftBatch(NamedTuple):
    """The R requests of a batch that are drafted for."""

    requests: list[Request]
    slots: np.ndarray  # int64 [R]
    rows: np.ndarray  # int64 [R], in vLLM's batch
    token_ids: np.ndarray  # int32 [*, max_model_len], of that batch
    size: int  # requests of the batch, others included

    @classmethod
    def of(
        cls, requests: list[Request], rows: list[int], token_ids: np.ndarray, size: int
    ) -> DraftBatch:
        """Requests, and where they stand in a batch of so many."""
        slots = np.array([request.slot for request in requests], np.int64)
        return cls(requests, slots, np.array(rows, np.int64), token_ids, size)


class PhraseTrees(NamedTuple):
    """Trees of phrases alone, grown before it is known whether the draft model runs."""

    rates: np.ndarray  # float64 [R, NUM_KINDS], acceptance rates of each request
    min_probability: float  # below which no node is grown
    threshold: float  # probability above which a node is worth its row
    trees: list[DraftTree]
    probabilities: list[np.ndarray]  # float64 of the nodes of each tree, descending
    expected_accepted: np.ndarray  # float64 [R], tokens, of the nodes that are worth their rows

    def worth_verifying(self, i: int) -> DraftTree:
        """The i-th tree, cut to the nodes that are worth their rows."""
        return self.trees[i].prefix(int((self.probabilities[i] > self.threshold).sum()))


def phrase_trees(drafting: Drafting, policy: Policy, batch: DraftBatch) -> PhraseTrees:
    """Grow trees of phrases alone."""
    rates = policy.rates(batch.slots.tolist())
    min_probability = policy.min_probability(batch.size)
    trees, probabilities = drafting.grow(
        batch.slots, batch.rows, batch.token_ids, rates, min_probability, without_draft=True
    )
    threshold = policy.acceptance_threshold(batch.size)
    expected = np.array([p[p > threshold].sum() for p in probabilities])
    return PhraseTrees(rates, min_probability, threshold, trees, probabilities, expected)


def best_first_trees(
    drafting: Drafting, policy: Policy, phrases: PhraseTrees, batch: DraftBatch
) -> list[DraftTree]:
    """Trees of the nodes that are worth their rows; those of phrases where nothing was drafted.

    Each request keeps the tree that its own was cut from, and the one without the draft model.
    """
    trees, probabilities = [*phrases.trees], [*phrases.probabilities]
    drafted = drafting.state.chain_len[batch.slots] > 0
    with_draft = drafting.grow(
        batch.slots[drafted],
        batch.rows[drafted],
        batch.token_ids,
        phrases.rates[drafted],
        phrases.min_probability,
    )
    for i, tree, p in zip(np.flatnonzero(drafted).tolist(), *with_draft, strict=True):
        batch.requests[i].phrase_tree = phrases.worth_verifying(i)
        trees[i], probabilities[i] = tree, p
    for request, tree, p in zip(batch.requests, trees, probabilities, strict=True):
        request.grown_tree, request.probabilities = tree, p
    sizes = policy.tree_sizes(probabilities, batch.size)
    return [tree.prefix(n) for tree, n in zip(trees, sizes.tolist(), strict=True)]


def fixed_trees(drafting: Drafting, batch: DraftBatch) -> list[DraftTree]:
    """Trees as large as they may be: chain, suffixes, and phrases at the root."""
    drafting.build(batch.slots, batch.rows, batch.token_ids)
    return [drafting.tree(slot) for slot in batch.slots.tolist()]
