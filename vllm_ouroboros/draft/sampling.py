"""Drafting for requests that sample: with the noise that the target will use.

Where a choice depends on noise, text repeats less and the draft model is wrong more often than in
greedy decoding. But the noise of a place is known before the target gets there, and it says which
tokens are next in line: they become branches beside the chain, and one more draft forward says how
each of them goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_ouroboros.trees.draft_tree import ROOT, child_of
from vllm_ouroboros.trees.drafting import Drafting
from vllm_ouroboros.trees.request_state import BRANCHES
from vllm_ouroboros.trees.round_rows import Round
from vllm_ouroboros.verify.token_sampler import RequestSampling, TokenSampler

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class SampledDraft(NamedTuple):
    """The draft of a request that samples."""

    request: RequestSampling  # its noise stands where the chain ends
    before: list[RequestSampling]  # its noise as it stood before each token of the chain
    branches: bool  # whether its tree may have some


class DraftSampling:
    """Chooses for the draft model; one for each call of the proposer.

    Args:
        sampler: the runner's.
        runner: holds vLLM's sampling metadata.
        drafting: chains and pool.
        requests: by slot, the requests that do more than take the argmax.
    """

    def __init__(
        self,
        sampler: TokenSampler,
        runner: GPUModelRunner,
        drafting: Drafting,
        requests: dict[int, RequestSampling],
    ) -> None:
        self.sampler, self.drafting = sampler, drafting
        self.live = runner.input_batch.sampling_metadata
        chain_only = drafting.state.chain_only
        self.drafts = {
            slot: SampledDraft(q, [], not chain_only[slot]) for slot, q in requests.items()
        }

    def __bool__(self) -> bool:
        return bool(self.drafts)

    def choose(
        self,
        slots: np.ndarray,
        rows: np.ndarray,
        out: Round,
        logits: torch.Tensor,
        predicted: np.ndarray,
    ) -> None:
        """Put chosen tokens in place of the most probable ones, in one round.

        The guesses of a request are walked like a tree in verification, a wave of rows for each
        depth; only rows that a walk comes to are sampled.

        Args:
            slots: int64 [R], slots of the requests.
            rows: int64 [R], their rows in the runner's batch.
            out: the round.
            logits: [M, vocab] of the rows ``out.logits_rows[:M]``.
            predicted: int64 [T], written.
        """
        state = self.drafting.state
        wanted = out.logits_rows[: logits.shape[0]]
        firsts = np.searchsorted(wanted, out.query_start_loc[:-1] + out.num_uncached - 1)
        nodes = {i: ROOT for i, slot in enumerate(slots.tolist()) if slot in self.drafts}
        paths = {i: state.chain[slots[i], : state.chain_len[slots[i]]].tolist() for i in nodes}
        while nodes:
            for i in nodes:
                draft = self.drafts[int(slots[i])]
                draft.before.append(draft.request.with_noise_copy())
            index = torch.tensor([int(firsts[i]) + 1 + node for i, node in nodes.items()])
            requests = [self.drafts[int(slots[i])].request for i in nodes]
            where, along = [int(rows[i]) for i in nodes], [paths[i] for i in nodes]
            tokens = self._tokens(logits[index], where, requests, along)
            self._find_branches([int(slots[i]) for i in nodes], where, logits[index], along, tokens)
            going = {}
            for (i, node), token in zip(nodes.items(), tokens, strict=True):
                current = int(out.query_start_loc[i] + out.num_uncached[i]) - 1
                predicted[current + 1 + node] = token
                size = int(out.num_guesses[i])
                part = slice(current + 1, current + 1 + size)
                child = child_of(out.tokens[part], out.guesses[part], size, node, token)
                if child >= 0 and token not in self.drafting.stops:
                    going[i] = child
                paths[i].append(token)
            nodes = going

    def _tokens(self, logits, rows, requests, paths) -> list[int]:
        # logits processors have room for as many rows as an engine has requests
        most = len(self.drafting.state.committed)
        if not any(request.has_processors for request in requests):
            most = len(rows)
        tokens: list[int] = []
        for first in range(0, len(rows), most):
            part = slice(first, first + most)
            output = self.sampler.after_paths(
                logits[part], self.live, rows[part], requests[part], paths[part], logprobs=False
            )
            tokens += output.sampled_token_ids[:, 0].tolist()
        return tokens

    def _find_branches(
        self,
        slots: list[int],
        rows: list[int],
        logits: torch.Tensor,
        paths: list[list[int]],
        tokens: list[int],
    ) -> None:
        """Note the tokens that the same noise would choose were the chosen ones not there."""
        branches = self.drafting.state.branches
        depths = [len(path) for path in paths]
        part = [
            j
            for j, (slot, depth) in enumerate(zip(slots, depths, strict=True))
            if self.drafts[slot].branches and depth < len(BRANCHES)
        ]
        gone = {j: tokens[j] for j in part}
        rank = 0
        while part:
            logits[part, [gone[j] for j in part]] = float("-inf")
            found = self._tokens(
                logits[part],
                [rows[j] for j in part],
                [self.drafts[slots[j]].before[-1].with_noise_copy() for j in part],
                [paths[j] for j in part],
            )
            for j, token in zip(part, found, strict=True):
                branches[slots[j], depths[j], rank] = token
                gone[j] = token
            rank += 1
            part = [j for j in part if rank < BRANCHES[depths[j]]]

    def follow(
        self, slots: np.ndarray, rows: np.ndarray, which: np.ndarray, logits: torch.Tensor
    ) -> None:
        """Note the token after each branch.

        Args:
            slots: int64 [R].
            rows: int64 [R], their rows in the runner's batch.
            which: int32 [M, 3], request, place and rank of each branch.
            logits: [M, vocab].
        """
        state = self.drafting.state
        requests, paths, where = [], [], []
        for r, place, rank in which.tolist():
            slot = int(slots[r])
            draft = self.drafts[slot]
            later = draft.before[place + 1 : place + 2]
            requests.append((later[0] if later else draft.request).with_noise_copy())
            paths.append([*state.chain[slot, :place], int(state.branches[slot, place, rank])])
            where.append(int(rows[r]))
        tokens = self._tokens(logits, where, requests, paths)
        for (r, place, rank), token in zip(which.tolist(), tokens, strict=True):
            state.branch_next[slots[r], place, rank] = token
