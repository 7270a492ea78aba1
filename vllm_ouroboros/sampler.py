"""Acceptance: which nodes of the trees become output, and the token that follows them.

The rule: from the root on, a child is accepted if and only if it equals the token that the target
chooses at its parent. The output is then a function of the target alone, whatever was drafted.
A tree is only ever verified for a request whose choice at a node depends on the logits there and
nothing else (greedy, no penalties, ...: see `can_speculate`); all other requests have one row,
which vLLM's own sampler treats as if we were not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput

from vllm_ouroboros.tree import DraftTree, walk

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

_EPS = 1e-5


class Verified(NamedTuple):
    """What verification found out about one request's tree of n nodes."""

    tree: DraftTree
    path: np.ndarray  # int32 [accepted], nodes
    predicted: np.ndarray  # int64 [n + 1], the target's token after the root and after each node


_LOGITS_PARAMETERS = (
    "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "allowed_token_ids",
    "bad_words", "structured_outputs", "thinking_token_budget", "watermarking",
    "trace_decode_token_ids",
)  # fmt: skip
"""Of `SamplingParams`: what makes a choice depend on more than its logits, unless it is falsy."""


def can_speculate(params: SamplingParams | None) -> bool:
    """Whether the target's choice at a node is the argmax of its raw logits."""
    return (
        params is not None
        and params.temperature < _EPS
        and params.repetition_penalty == 1
        and not any(getattr(params, name, None) for name in _LOGITS_PARAMETERS)
    )


def greedy(logits: torch.Tensor) -> np.ndarray:
    """Greedy token int64 [T] of logits [T, vocab]; the first of equals, as in vLLM."""
    if logits.is_cpu:  # several times faster than torch's argmax there
        return logits.float().numpy().argmax(-1)
    return logits.argmax(-1).numpy(force=True)


def verify(
    logits: torch.Tensor,
    rows: np.ndarray,
    trees: list[DraftTree | None],
    stops: list[frozenset[int]],
    accept: bool,
) -> tuple[list[Verified | None], np.ndarray]:
    """Walk the trees of a batch.

    Args:
        logits: [T, vocab], the rows of all requests in flat order.
        rows: int64 [R], first row of each request; a tree's node i has row ``rows[r] + 1 + i``.
        trees: the tree of each request, or None for a request with one row.
        stops: ids after which the text of a request ends.
        accept: False accepts nothing (the rows are still there).

    Returns:
        Per request what was found (None without a tree), and int64 [R], the row that each
        request's next token is sampled from.
    """
    verified: list[Verified | None] = [None] * len(trees)
    last = rows.copy()
    if not accept or not any(tree is not None for tree in trees):
        return verified, last
    predicted = greedy(logits)
    for r, tree in enumerate(trees):
        if tree is None:
            continue
        own = predicted[rows[r] : rows[r] + 1 + len(tree.tokens)]
        path = np.empty(len(tree.tokens), np.int32)
        path = path[: walk(tree.tokens, tree.parents, len(tree.tokens), own, path)]
        for i, node in enumerate(path):
            if int(tree.tokens[node]) in stops[r]:
                path = path[:i]  # the token that ends the text comes as the bonus token
                break
        if len(path):
            last[r] += 1 + path[-1]
        verified[r] = Verified(tree, path, own)
    return verified, last


def sample(
    sampler: Sampler,
    logits: torch.Tensor,
    rows: np.ndarray,
    verified: list[Verified | None],
    last: np.ndarray,
    metadata: SamplingMetadata,
) -> SamplerOutput:
    """Accepted paths and, sampled by vLLM, the token after each.

    Args:
        sampler: vLLM's sampler.
        logits: [T, vocab]; may be changed in place.
        rows: int64 [R], see `verify`.
        verified: see `verify`.
        last: see `verify`.
        metadata: vLLM's sampling parameters of the R requests.

    Returns:
        Tokens int32 [R, width], padded with -1, and the logprobs of all of them if asked for.
    """
    paths = [v.path if v is not None else np.empty(0, np.int32) for v in verified]
    width = 1 + max(len(path) for path in paths)
    tokens = np.full((len(paths), width), -1, np.int32)
    visited = np.repeat(rows[:, None], width, axis=1)
    for r, path in enumerate(paths):
        if len(path):
            tokens[r, : len(path)] = verified[r].tree.tokens[path]  # type: ignore[union-attr]
            visited[r, 1 : len(path) + 1] = rows[r] + 1 + path
    ends = torch.from_numpy(np.array([len(path) for path in paths]))

    logprobs = None
    if width > 1 and metadata.max_num_logprobs is not None:
        raw = logits[torch.from_numpy(visited).flatten().to(logits.device)].float()
        if sampler.logprobs_mode == "raw_logprobs":
            raw = sampler.compute_logprobs(raw)
        logprobs = raw
    output = sampler(logits[torch.from_numpy(last).to(logits.device)], metadata)
    if width == 1:
        return output

    sampled = torch.from_numpy(tokens).to(logits.device)
    sampled.scatter_(1, ends[:, None].to(logits.device), output.sampled_token_ids)
    tensors: LogprobsTensors | None = None
    if logprobs is not None:
        flat = sampled.flatten().long().clamp(min=0)
        tensors = sampler.gather_logprobs(logprobs, metadata.max_num_logprobs, flat)
    return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=tensors)
