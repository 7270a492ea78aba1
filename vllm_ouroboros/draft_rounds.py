"""The draft model's forwards of one step: catching up on text, then the rounds of drafting."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_ouroboros.counters import Counters, StepClock
from vllm_ouroboros.draft_model import DraftModel
from vllm_ouroboros.drafting import Drafting
from vllm_ouroboros.rounds import Round
from vllm_ouroboros.sampler import greedy
from vllm_ouroboros.token_sampler import Sampled, TokenSampler
from vllm_ouroboros.tree import ROOT, child_of, step_mask
from vllm_ouroboros.tree_step import TreeStep

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

MAX_KNOWN = 16
"""Tokens that the draft model may catch up on inside a round; more go ahead of the rounds."""


class Behind(NamedTuple):
    """A request whose text should have draft KV."""

    slot: int
    row: int  # of the runner's batch
    end: int  # tokens that the draft model should know
    in_prompt: bool  # prompts are cached at once, outputs when enough have gathered


class DraftRounds:
    """Runs the draft model for the requests of a batch.

    Args:
        draft: the loaded draft model.
        drafting: chains and pool.
        max_rows: rows that one forward may have.
        counters: counts the forwards.
        clock: keeps model time apart from host time.
    """

    def __init__(
        self,
        draft: DraftModel,
        drafting: Drafting,
        max_rows: int,
        counters: Counters,
        clock: StepClock,
    ) -> None:
        self.draft, self.drafting, self.max_rows = draft, drafting, max_rows
        self.counters, self.clock = counters, clock
        self.sampler: TokenSampler | None = None  # the runner's, once there is one

    def capacity(self, runner: GPUModelRunner, row: int) -> int:
        """Positions of a request that have a draft KV slot."""
        table = runner.input_batch.block_table[self.draft.kv_cache_gid]
        return min(int(table.num_blocks_per_row[row]) * table.block_size, self.draft.max_len)

    def catch_up(self, runner: GPUModelRunner, behind: list[Behind], token_ids: np.ndarray) -> None:
        """Fill draft KV that is too far behind for the rounds, in plain causal forwards.

        A request that does not speculate is kept up to date as well, less often: its blocks may
        serve another request as a cached prefix.
        """
        cached = self.drafting.state.cached
        chunks: list[list[tuple[int, int, int, int]]] = [[]]  # slot, row, start, end
        room = self.max_rows
        for slot, row, end, in_prompt in behind:
            start, end = int(cached[slot]), min(end, self.capacity(runner, row))
            if end - start <= (0 if in_prompt else MAX_KNOWN):
                continue
            while start < end:
                take = min(end - start, room)
                chunks[-1].append((slot, row, start, start + take))
                start, room = start + take, room - take
                if room == 0:
                    chunks.append([])
                    room = self.max_rows
        for chunk in filter(None, chunks):
            positions = np.concatenate([np.arange(s, e) for _, _, s, e in chunk])
            lengths = [end - start for _, _, start, end in chunk]
            self._forward(
                runner,
                np.array([row for _, row, _, _ in chunk], np.int64),
                np.concatenate([token_ids[row, s:e] for _, row, s, e in chunk]),
                positions,
                positions,
                np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                np.array([s for _, _, s, _ in chunk], np.int32),
                None,
            )
            for slot, _, _, end in chunk:
                cached[slot] = end

    def run(
        self,
        runner: GPUModelRunner,
        slots: np.ndarray,
        rows: np.ndarray,
        token_ids: np.ndarray,
        sampled: dict[int, Sampled],
    ) -> None:
        """Draft chains until every request has enough.

        Requests near the end of the draft model's context get none: the pool drafts for them.

        Args:
            runner: holds the block tables.
            slots: int64 [R], slots of the requests in ``drafting``.
            rows: int64 [R], their rows in the runner's batch.
            token_ids: int32 [*, max_model_len].
            sampled: by slot, the requests that do more than take the argmax, with noise of which
                each drafted token takes one draw.
        """
        state, drafting = self.drafting.state, self.drafting
        able = state.known[slots] + drafting.budget < self.draft.max_len
        able &= state.known[slots] - state.cached[slots] <= MAX_KNOWN + 1
        slots, rows = slots[able], rows[able]
        widest = drafting.rows_per_request + drafting.budget + MAX_KNOWN
        most = max(1, self.max_rows // widest)
        while True:
            active = ~state.done[slots]
            slots, rows = slots[active], rows[active]
            if not len(slots):
                return
            for first in range(0, len(slots), most):
                part = slice(first, first + most)
                self._round(runner, slots[part], rows[part], token_ids, sampled)

    def _round(
        self,
        runner,
        slots: np.ndarray,
        rows: np.ndarray,
        token_ids: np.ndarray,
        sampled: dict[int, Sampled],
    ) -> None:
        """One masked draft forward for some requests."""
        with self.clock.phase("plan"):
            out, total, wanted = self.drafting.plan(slots, rows, token_ids)
            tree = TreeStep(
                rows=torch.arange(total),
                query_start_loc=out.query_start_loc.tolist(),
                context_lens=out.context_lens.tolist(),
                block_table=torch.empty(0),  # the draft model's own, see its forward
                mask=torch.from_numpy(step_mask(out.parents, out.query_start_loc)),
                num_rows=total,
                keep=False,
            )
        hidden = self._forward(
            runner, rows, out.tokens[:total], out.positions[:total], out.writes[:total],
            out.query_start_loc, out.context_lens, tree,
        )  # fmt: skip
        predicted = np.zeros(total, np.int64)
        wanted_rows = out.logits_rows[:wanted]
        with self.clock.model():
            logits = self.draft.logits(hidden, wanted_rows)
        with self.clock.phase("choose"):
            predicted[wanted_rows] = greedy(logits)
            if sampled:
                self._sample(runner, slots, rows, out, logits, predicted, sampled)
        with self.clock.phase("absorb"):
            self.drafting.absorb(slots, out, predicted)

    def _sample(
        self,
        runner,
        slots: np.ndarray,
        rows: np.ndarray,
        out: Round,
        logits: torch.Tensor,
        predicted: np.ndarray,
        sampled: dict[int, Sampled],
    ) -> None:
        """Choose as the target will: put sampled tokens in place of the most probable ones.

        The guesses of a request are walked like a tree in verification, a wave of rows for each
        depth; only the rows that a walk comes to are sampled.
        """
        assert self.sampler is not None
        state, live = self.drafting.state, runner.input_batch.sampling_metadata
        wanted = out.logits_rows[: logits.shape[0]]
        firsts = np.searchsorted(wanted, out.query_start_loc[:-1] + out.num_known - 1)
        nodes = {i: ROOT for i, slot in enumerate(slots.tolist()) if slot in sampled}
        paths = {i: state.chain[slots[i], : state.chain_len[slots[i]]].tolist() for i in nodes}
        while nodes:
            index = torch.tensor([int(firsts[i]) + 1 + node for i, node in nodes.items()])
            chosen = self.sampler.after_paths(
                logits[index],
                live,
                [int(rows[i]) for i in nodes],
                [sampled[int(slots[i])] for i in nodes],
                [paths[i] for i in nodes],
                logprobs=False,
            )
            going = {}
            tokens = chosen.sampled_token_ids[:, 0].tolist()
            for (i, node), token in zip(nodes.items(), tokens, strict=True):
                current = int(out.query_start_loc[i] + out.num_known[i]) - 1
                predicted[current + 1 + node] = token
                size = int(out.num_guesses[i])
                part = slice(current + 1, current + 1 + size)
                child = child_of(out.tokens[part], out.guesses[part], size, node, token)
                if child >= 0:
                    going[i] = child
                    paths[i].append(token)
            nodes = going

    def _forward(self, *args) -> torch.Tensor:
        self.counters.draft_forwards += 1
        with self.clock.phase("draft_inputs"):
            return self.draft.forward(self.clock, *args)
