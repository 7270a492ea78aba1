"""The trees of a step: as large as they may be, or of those nodes that are worth their rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ouroboros.integration.live_requests import Request
from vllm_ouroboros.policy.controller import Policy
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.drafting import Drafting


class Drafted(NamedTuple):
    """The R requests of a batch that are drafted for."""

    requests: list[Request]
    slots: np.ndarray  # int64 [R]
    rows: np.ndarray  # int64 [R], in vLLM's batch
    token_ids: np.ndarray  # int32 [*, max_model_len], of that batch
    size: int  # requests of the batch, others included

    @classmethod
    def of(
        cls, requests: list[Request], rows: list[int], token_ids: np.ndarray, size: int
    ) -> Drafted:
        """Requests, and where they stand in a batch of so many."""
        slots = np.array([request.slot for request in requests], np.int64)
        return cls(requests, slots, np.array(rows, np.int64), token_ids, size)


class Plan(NamedTuple):
    """What phrases alone would make of a step, before the draft model is asked."""

    rates: np.ndarray  # float64 [R, KINDS]
    least: float  # probability below which no node is worth a look
    worth: float  # probability above which a node is worth its row
    trees: list[DraftTree]
    probabilities: list[np.ndarray]  # float64 of the nodes of each tree
    promised: np.ndarray  # float64 [R], tokens of the nodes that are worth their rows


def plan(drafting: Drafting, policy: Policy, batch: Drafted) -> Plan:
    """Grow trees of phrases alone."""
    rates, least = policy.rates(batch.slots.tolist()), policy.least(batch.size)
    trees, probabilities = drafting.grow(
        batch.slots, batch.rows, batch.token_ids, rates, least, alone=True
    )
    worth = policy.row_worth(batch.size)
    promised = np.array([p[p > worth].sum() for p in probabilities])
    return Plan(rates, least, worth, trees, probabilities, promised)


def best(drafting: Drafting, policy: Policy, planned: Plan, batch: Drafted) -> list[DraftTree]:
    """Trees of those nodes that are worth their rows; the plan's where nothing was drafted.

    The requests get what they were cut from, and what would have been without the draft model.
    """
    trees, probabilities = [*planned.trees], [*planned.probabilities]
    drafted = drafting.state.chain_len[batch.slots] > 0
    with_draft = drafting.grow(
        batch.slots[drafted],
        batch.rows[drafted],
        batch.token_ids,
        planned.rates[drafted],
        planned.least,
    )
    for i, tree, p in zip(np.flatnonzero(drafted).tolist(), *with_draft, strict=True):
        batch.requests[i].alone = trees[i].prefix(int((probabilities[i] > planned.worth).sum()))
        trees[i], probabilities[i] = tree, p
    for request, tree in zip(batch.requests, trees, strict=True):
        request.grown = tree
    sizes = policy.sizes(probabilities, batch.size)
    return [tree.prefix(n) for tree, n in zip(trees, sizes.tolist(), strict=True)]


def whole(drafting: Drafting, batch: Drafted, alike_nodes: int, budget: int) -> list[DraftTree]:
    """Trees as large as they may be.

    Args:
        drafting: holds chains and phrases.
        batch: the requests.
        alike_nodes: nodes that a graph wants of each tree of this batch; 0 for any.
        budget: most nodes of a tree.
    """
    state = drafting.state
    drafting.build(batch.slots, batch.rows, batch.token_ids)
    alike = len(batch.slots) == batch.size and not state.narrow[batch.slots].any()
    alike = alike and bool((state.limit[batch.slots] == budget).all())
    wanted = alike_nodes if alike else 0
    return [drafting.tree(slot).padded(wanted) for slot in batch.slots.tolist()]
