"""Acceptance on the device for batches in which every choice is an argmax.

The walk and the moves of KV need no answer from the host: it gets tokens and paths in one copy.
Batches with noise, logprobs or processors take `sampler.verify`, whose waves draw as vLLM does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from vllm_ouroboros.kernels.tree_accept import accept_trees, choose_tokens
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.verify.acceptance import Verified
from vllm_ouroboros.verify.host_arrays import to_device

USUAL_STOPS = 4
"""Ids that end a text, of nearly all requests; more of them compile the kernel anew."""


class Walked(NamedTuple):
    """A walk on the device; R requests, T sampled rows."""

    path: torch.Tensor  # int32 [R, max_depth], accepted rows of each request, padded with -1
    tokens: torch.Tensor  # int32 [R, max_depth + 1], accepted tokens and the one after, then -1
    predicted: torch.Tensor  # int32 [T]

    def to_host(self, rows: np.ndarray, trees: list[DraftTree | None]) -> list[Verified | None]:
        """What was found about each tree, as `sampler.verify` says it; waits for the device."""
        sizes = [part.numel() for part in self]
        flat = torch.cat([part.flatten() for part in self]).cpu().split(sizes)
        path = flat[0].numpy().reshape(self.path.shape)
        predicted = flat[2].numpy().astype(np.int64)
        found: list[Verified | None] = []
        for r, tree in enumerate(trees):
            if tree is None:
                found.append(None)
                continue
            own = path[r][path[r] >= 0] - 1
            last = rows[r] + 1 + len(tree.tokens)
            found.append(Verified(tree, own.astype(np.int32), predicted[rows[r] : last]))
        return found


def walk_on_device(
    logits: torch.Tensor,
    rows: np.ndarray,
    trees: list[DraftTree | None],
    stops: list[frozenset[int]],
    max_nodes: int,
) -> Walked:
    """Choose and walk for a batch; nothing is awaited.

    Args:
        logits: [T, vocab], the sampled rows of all requests in flat order.
        rows: int64 [R], first row of each request; a tree's node i has row ``rows[r] + 1 + i``.
        trees: the tree of each request, or None: its first row is all that counts.
        stops: ids that end each request's text.
        max_nodes: most nodes of a tree of this engine: kernels are compiled for it.
    """
    num_rows, num_requests = logits.shape[0], len(trees)
    tokens = np.zeros(num_rows, np.int32)
    parents = np.full(num_rows, -1, np.int32)
    for first, tree in zip(rows.tolist(), trees, strict=True):
        if tree is not None:
            own = slice(first + 1, first + 1 + len(tree.tokens))
            tokens[own], parents[own] = tree.tokens, tree.parents + 1
    ends = np.full((num_requests, max([USUAL_STOPS, *map(len, stops)])), -1, np.int32)
    for r, ids in enumerate(stops):
        ends[r, : len(ids)] = sorted(ids)
    starts = np.append(rows, num_rows).astype(np.int32)
    depth = np.zeros(num_rows, np.int32)  # of no account without noise
    on = to_device(logits.device, tokens, parents, starts, ends, depth)
    ints = {"dtype": torch.int32, "device": logits.device}
    walked = Walked(
        torch.empty(num_requests, max_nodes, **ints),
        torch.empty(num_requests, max_nodes + 1, **ints),
        torch.empty(num_rows, **ints),
    )
    choose_tokens(logits, on[2], on[4], None, walked.predicted)
    accept_trees(
        on[0], on[1], on[2], walked.predicted, walked.path,
        torch.empty(num_requests, **ints), walked.tokens, stops=on[3],
    )  # fmt: skip
    return walked
