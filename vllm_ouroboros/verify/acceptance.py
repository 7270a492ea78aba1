"""Acceptance: which nodes of the trees become output, and the token that follows them.

The rule: from the root on, a child is accepted if and only if it equals the token that the target
chooses at its parent, be it greedily or with the noise of that place in the text. Nothing else of
a draft can reach the output. The target chooses through vLLM's own sampler, first after each
request's text, then, as long as a child was accepted, after the path that leads to it: a wave of
rows for each depth, so that no more rows are sampled than tokens come out, in the order in which
vLLM alone would have sampled them. Requests whose choice is a plain argmax need no waves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_ouroboros.trees.draft_tree import ROOT, DraftTree, child_of, walk
from vllm_ouroboros.verify.cpu.argmax import argmax as cpu_argmax
from vllm_ouroboros.verify.token_sampler import RequestSampling, TokenSampler


class Verified(NamedTuple):
    """What verification found out about one request's tree of n nodes."""

    tree: DraftTree
    path: np.ndarray  # int32 [accepted], nodes
    predicted: np.ndarray  # int64 [n + 1], the target's token after the root and after each node;
    # the most probable one where the sampler was not asked


def greedy(logits: torch.Tensor) -> np.ndarray:
    """Greedy token int64 [T] of logits [T, vocab]; the first of equals, as in vLLM."""
    if logits.is_cpu:  # several times faster than torch's argmax there
        if logits.dtype == torch.bfloat16:
            return cpu_argmax(logits)
        return logits.float().numpy().argmax(-1)
    return logits.argmax(-1).numpy(force=True)


def verify(
    sampler: TokenSampler,
    logits: torch.Tensor,
    rows: np.ndarray,
    trees: list[DraftTree | None],
    requests: list[RequestSampling],
    unfinished: set[int],
    live: SamplingMetadata,
) -> tuple[list[Verified | None], SamplerOutput]:
    """Walk the trees of a batch.

    Args:
        sampler: chooses the tokens.
        logits: [T, vocab], the rows of all requests in flat order.
        rows: int64 [R], first row of each request; a tree's node i has row ``rows[r] + 1 + i``.
        trees: the tree of each request, or None for a request with one row.
        requests: [R].
        unfinished: requests in the middle of their prompt, whose noise must not be used up.
        live: vLLM's metadata of the batch.

    Returns:
        Per request what was found (None without a tree), and the accepted tokens, each with the
        token after it: int32 [R, width] padded with -1, and logprobs [R * width, *] if asked for.
    """
    verified: list[Verified | None] = [None] * len(trees)
    first = rows.copy()
    if live.logprob_token_ids:  # their table has a width of its own, for one row a request
        trees = [None] * len(trees)
    if any(tree is not None for tree in trees):
        predicted = greedy(logits)
        for r, tree in enumerate(trees):
            if tree is not None:
                own = predicted[rows[r] : rows[r] + 1 + len(tree.tokens)]
                plain = requests[r].argmax_only
                path = _plain_path(tree, own, requests[r].stops) if plain else _no_path()
                if len(path):
                    first[r] += 1 + path[-1]
                verified[r] = Verified(tree, path, own)

    whole = len(first) == logits.shape[0]
    output = sampler.after_text(
        logits if whole else logits[torch.from_numpy(first).to(logits.device)],
        live,
        {r: q.generator for r, q in enumerate(requests) if q.generator and r not in unfinished},
    )
    waves: list[tuple[list[int], SamplerOutput]] = [([*range(len(trees))], output)]
    paths: dict[int, list[int]] = {
        r: []
        for r, found in enumerate(verified)
        if found is not None and not requests[r].argmax_only
    }
    going: list[int] = [*paths]
    while going:
        going = _descend(waves[-1], going, verified, paths, requests)
        if going:
            index = torch.from_numpy(np.array([rows[r] + 1 + paths[r][-1] for r in going]))
            output = sampler.after_paths(
                logits[index.to(logits.device)],
                live,
                going,
                [requests[r] for r in going],
                [verified[r].tree.tokens[paths[r]].tolist() for r in going],  # type: ignore[union-attr]
            )
            waves.append((going, output))
    for r, nodes in paths.items():
        verified[r] = verified[r]._replace(path=np.array(nodes, np.int32))  # type: ignore[union-attr]
    return verified, _assemble(waves, verified, paths.keys())


def _no_path() -> np.ndarray:
    return np.empty(0, np.int32)


def _plain_path(tree: DraftTree, predicted: np.ndarray, stops: frozenset[int]) -> np.ndarray:
    """Nodes accepted by argmax; the token that ends the text comes as the one after the path."""
    path = np.empty(len(tree.tokens), np.int32)
    path = path[: walk(tree.tokens, tree.parents, len(tree.tokens), predicted, path)]
    for i, token in enumerate(tree.tokens[path].tolist()):
        if token in stops:
            return path[:i]
    return path


def _descend(
    wave: tuple[list[int], SamplerOutput],
    going: list[int],
    verified: list[Verified | None],
    paths: dict[int, list[int]],
    requests: list[RequestSampling],
) -> list[int]:
    """Accept the children that a wave chose; the requests that go on."""
    tokens = dict(zip(wave[0], wave[1].sampled_token_ids[:, 0].tolist(), strict=True))
    result = []
    for r in going:
        tree, _, predicted = verified[r]  # type: ignore[misc]
        node = paths[r][-1] if paths[r] else ROOT
        predicted[node + 1] = tokens[r]
        child = child_of(tree.tokens, tree.parents, len(tree.tokens), node, tokens[r])
        if child >= 0 and tokens[r] not in requests[r].stops:
            paths[r].append(child)
            result.append(r)
    return result


def _assemble(waves, verified: list[Verified | None], walked) -> SamplerOutput:
    """One output of all waves: the d-th holds the d-th token of each request that was walked."""
    output = waves[0][1]
    lengths = [len(found.path) if found is not None else 0 for found in verified]
    width = 1 + max(lengths)
    if width == 1:
        return output
    device = output.sampled_token_ids.device
    tokens = torch.full((len(lengths), width), -1, dtype=torch.int32, device=device)
    for r, found in enumerate(verified):
        if found is not None and r not in walked and lengths[r]:
            tokens[r, : lengths[r]] = torch.from_numpy(found.tree.tokens[found.path])
    # a plain request's one row stands after its path, in the first wave
    ends = torch.tensor([0 if r in walked else n for r, n in enumerate(lengths)])
    tokens[torch.arange(len(lengths)), ends] = output.sampled_token_ids[:, 0]
    for depth, (rows, one) in enumerate(waves[1:], 1):
        tokens[rows, depth] = one.sampled_token_ids[:, 0]

    tables = output.logprobs_tensors
    if tables is None:
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)
    ids, values, ranks = (
        torch.zeros(len(lengths), width, *table.shape[1:], dtype=table.dtype, device=device)
        for table in tables[:3]
    )
    for depth, (rows, one) in enumerate(waves):
        for whole, table in zip((ids, values, ranks), one.logprobs_tensors[:3], strict=True):
            whole[rows, depth] = table
    flat = LogprobsTensors(ids.flatten(0, 1), values.flatten(0, 1), ranks.flatten(0, 1))
    return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=flat)
