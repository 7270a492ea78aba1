"""The draft model's forwards of one step: catching up on text, then the rounds of drafting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_ouroboros.draft.alternatives import Choices, record_alternatives
from vllm_ouroboros.draft.expansion import MAX_EXPANDED, Expansion
from vllm_ouroboros.draft.forward_rows import ForwardRows
from vllm_ouroboros.draft.kv_cache import CatchUp, DraftCache
from vllm_ouroboros.draft.model import DraftModel
from vllm_ouroboros.draft.sampling import DraftSampling
from vllm_ouroboros.metrics.counters import Counters
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.policy.controller import Policy
from vllm_ouroboros.trees.draft_tree import step_mask
from vllm_ouroboros.trees.drafting import Drafting, RoundWidth
from vllm_ouroboros.trees.request_state import NUM_FOLLOWING
from vllm_ouroboros.trees.round_rows import Round
from vllm_ouroboros.verify.token_sampler import RequestSampling, TokenSampler

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

MAX_CATCH_UP = 16
"""Uncached tokens that a round may carry for a request; more are read ahead of the rounds."""


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
        self.cache = DraftCache(draft, drafting, max_rows, self._forward)
        self.counters, self.clock = counters, clock
        self.sampler: TokenSampler | None = None  # the runner's, once there is one
        self.policy: Policy | None = None  # once costs are measured
        self.seconds = 0.0  # that the last rounds took
        self.drafted = False  # whether there were any
        self._last_rows = 1  # of the last round
        self._width = RoundWidth.CHAIN if draft.reads_features else RoundWidth.FULL

    @property
    def widest(self) -> int:
        """Most rows that a request has in a round."""
        return self._most_rows(RoundWidth.FULL)

    def most_requests(self, batch: int) -> int:
        """Most requests of a masked forward; each path that expands the tree counts as one."""
        return batch * (1 + MAX_EXPANDED) if self.draft.reads_features else batch

    def rows_of_forward(self, batch: int) -> int:
        """Most rows of one forward for so many requests, whose logits may all be asked for."""
        return min(batch * self.widest, max(self.max_rows, self.widest))

    def _most_rows(self, width: RoundWidth) -> int:
        rows = self.drafting.rows_of(width) + self.drafting.budget + MAX_CATCH_UP
        return rows + (MAX_EXPANDED * NUM_FOLLOWING if self.draft.reads_features else 0)

    def run(
        self,
        runner: GPUModelRunner,
        prompts: list[CatchUp],
        slots: np.ndarray,
        rows: np.ndarray,
        token_ids: np.ndarray,
        requests: dict[int, RequestSampling],
        expected_accepted: np.ndarray,
    ) -> None:
        """Bring the draft model up to date, then draft chains until every request has enough.

        Requests near the end of the draft model's context get none: the pool drafts for them. So
        do those for which drafting does not pay; their text is not read either.

        Args:
            runner: holds the block tables.
            prompts: requests in the middle of their prompt, which may be read ahead.
            slots: int64 [R], slots of the other requests in ``drafting``.
            rows: int64 [R], their rows in the runner's batch.
            token_ids: int32 [*, max_model_len].
            requests: by slot, those that do more than take the argmax, with noise that drafting may
                use up.
            expected_accepted: float64 [R], tokens of trees without the draft model; 0 if there is
                no policy.
        """
        start = self.clock.now()
        self.cache.invalidate(runner)
        state, drafting, batch = self.drafting.state, self.drafting, len(slots)
        able = state.committed[slots] + drafting.budget < self.draft.max_len
        slots, rows, expected_accepted = slots[able], rows[able], expected_accepted[able]
        waiting: list[CatchUp] = []
        if self.policy is not None:
            prompts = [
                one
                for one in prompts
                if self.draft.cannot_wait(one.slot)
                or self.policy.reads_prompt(one.slot, self._lag(one))
            ]
            if len(slots):
                self._width = self._choose_width(self.policy, len(slots))
                rows_of_round = self._expected_rows(len(slots), self._width)
                lags = state.committed[slots] - 1 - state.cached[slots]
                lags[lags <= MAX_CATCH_UP] = 0  # these are read in the rounds
                chosen = self.policy.choose_drafted(
                    slots, expected_accepted, rows_of_round, lags, state.node_limit[slots]
                )
                urgent = np.array([self.draft.cannot_wait(slot) for slot in slots.tolist()])
                urgent &= ~chosen
                waiting = self._unread(slots[urgent], rows[urgent])
                slots, rows = slots[chosen], rows[chosen]
        late = self._unread(slots, rows)
        self.cache.catch_up(runner, late, token_ids, MAX_CATCH_UP)
        self.cache.catch_up(runner, [*prompts, *waiting], token_ids, 0)
        able = state.committed[slots] - state.cached[slots] <= MAX_CATCH_UP + 1
        slots, rows = slots[able], rows[able]
        begin, self.drafted = self.clock.now(), bool(len(slots))
        if self.drafted:
            assert self.sampler is not None
            sampling = DraftSampling(self.sampler, runner, self.drafting, requests)
            self._run(runner, slots, rows, token_ids, sampling, batch)
        end = self.clock.now()
        if self.policy is not None and self.drafted:
            self.policy.observe_drafting(end - begin)
        read = [*late, *prompts, *waiting]
        self.cache.mark_complete(runner, read)
        for one in read:
            self.draft.has_read(one.slot, min(int(state.cached[one.slot]), one.end + 1))
        self.seconds = end - start

    def _unread(self, slots: np.ndarray, rows: np.ndarray) -> list[CatchUp]:
        """What requests would have to read to draft after their last token."""
        return [
            CatchUp(slot, row, int(self.drafting.state.committed[slot]) - 1)
            for slot, row in zip(slots.tolist(), rows.tolist(), strict=True)
        ]

    def _lag(self, one: CatchUp) -> int:
        return one.end - int(self.drafting.state.cached[one.slot])

    def _run(
        self,
        runner: GPUModelRunner,
        slots: np.ndarray,
        rows: np.ndarray,
        token_ids: np.ndarray,
        sampling: DraftSampling,
        batch: int,
    ) -> None:
        """Rounds for requests that are up to date, in a batch of so many."""
        state = self.drafting.state
        most = max(1, self.max_rows // self._most_rows(self._width))
        going, where = slots, rows
        while len(going):
            for first in range(0, len(going), most):
                part = slice(first, first + most)
                self._round(runner, going[part], where[part], token_ids, sampling, batch)
            active = ~state.done[going]
            going, where = going[active], where[active]
            if self.policy is not None and len(going):
                active = self.policy.continues_drafting(
                    going, state.confidence[going], state.chain_len[going], self._last_rows, batch
                )
                going, where = going[active], where[active]
        branching = (state.branches[slots] >= 0).any((1, 2))
        branching &= state.cached[slots] >= state.committed[slots]  # all of the text has a KV slot
        slots, rows = slots[branching], rows[branching]
        for first in range(0, len(slots), most):
            part = slice(first, first + most)
            self._follow_branches(runner, slots[part], rows[part], sampling)

    def _choose_width(self, policy: Policy, requests: int) -> RoundWidth:
        """The widest round that costs little more than one of the chain alone."""
        if self.draft.reads_features:  # guesses and windows have no features
            return RoundWidth.CHAIN
        rows = {width: self._expected_rows(requests, width) for width in RoundWidth}
        fewest = rows[RoundWidth.CHAIN]
        return max(w for w in RoundWidth if policy.affords_rows(requests, rows[w], fewest))

    def _expected_rows(self, requests: int, width: RoundWidth) -> int:
        return requests * (2 + self.drafting.rows_of(width))

    def _round(
        self,
        runner,
        slots: np.ndarray,
        rows: np.ndarray,
        token_ids: np.ndarray,
        sampling: DraftSampling,
        batch: int,
    ) -> None:
        """One masked draft forward for some requests."""
        begin = self.clock.now()
        with self.clock.phase("plan"):
            out, total, wanted = self.drafting.plan(slots, rows, token_ids, self._width)
            expansion = self._expansion(slots, batch)
        start = self.clock.now()
        ids = None if sampling else self.draft.short_ids
        logits = self._logits(
            runner, slots, rows, out, total, wanted, expansion, short=ids is not None
        )
        with self.clock.phase("choose"):
            choices = Choices(logits, wanted, ids, at_once=not logits.is_cpu)
            predicted = np.zeros(total, np.int64)
            index = out.logits_rows[:wanted]
            predicted[index] = choices.tokens
            if sampling:
                sampling.choose(slots, rows, out, logits[:wanted], predicted)
        forward = self.clock.now() - start
        before = self.drafting.state.chain_len[slots]
        with self.clock.phase("absorb"):
            self.drafting.absorb(slots, out, predicted)
        if expansion is not None:
            total += expansion.rows
        self._last_rows = total
        if self.policy is not None:
            with self.clock.phase("alternatives"):
                record_alternatives(
                    self.drafting.state, slots, before, index, choices, sampling.drafts
                )
                if expansion is not None:
                    tokens, probs = choices.alternatives(np.arange(wanted, len(logits)))
                    expansion.record(self.drafting.state, tokens[:, 0], probs[:, 0])
            gained = self.drafting.state.chain_len[slots] - before
            self.policy.observe_round(float(gained.mean()))
            self.policy.costs.observe_round(total, forward, self.clock.now() - begin)

    def _expansion(self, slots: np.ndarray, batch: int) -> Expansion | None:
        """Nodes that a round of some requests expands, in a batch of so many."""
        if self.policy is None or not self.draft.reads_features:
            return None
        fewest = self._expected_rows(len(slots), self._width)
        if not self.policy.affords_rows(batch, fewest + 1, fewest):
            return None
        threshold, most = self.policy.acceptance_threshold(batch), MAX_EXPANDED
        expansion = Expansion.choose(
            self.drafting.state, slots, most, threshold, self.drafting.stops
        )
        while most and not self.policy.affords_rows(batch, fewest + expansion.rows, fewest):
            most //= 2
            expansion = expansion.first(most)
        return expansion if expansion.rows else None

    def _follow_branches(
        self, runner, slots: np.ndarray, rows: np.ndarray, sampling: DraftSampling
    ) -> None:
        """One masked draft forward over chains and branches, for the token after each branch."""
        with self.clock.phase("plan"):
            out, total, which = self.drafting.plan_branches(slots)
        logits = self._logits(runner, slots, rows, out, total, len(which))
        with self.clock.phase("choose"):
            sampling.follow(slots, rows, which, logits)

    def _logits(
        self,
        runner,
        slots,
        rows,
        out: Round,
        total: int,
        wanted: int,
        expansion: Expansion | None = None,
        short: bool = False,
    ) -> torch.Tensor:
        """Logits [M, vocab] of the first ``wanted`` of ``out.logits_rows``, then of an expansion.

        ``short``: see `DraftModel.logits`.
        """
        asked = out.logits_rows[:wanted]
        paths = None
        if expansion is not None:
            out = expansion.add_to(out, total, self.drafting.state)
            chains = np.full(len(slots), -1)
            paths = np.concatenate([chains, expansion.number(self.drafting.state)])
            asked = np.concatenate([asked, total - 1 + np.cumsum(expansion.lengths)])
            slots = np.concatenate([slots, expansion.slots])
            rows = np.concatenate([rows, rows[expansion.requests]])
            total += expansion.rows
        starts, contexts = out.query_start_loc[: len(rows) + 1], out.context_lens[: len(rows)]
        with self.clock.phase("plan"):
            mask = step_mask(out.parents, starts)
        of_forward = ForwardRows(
            slots, rows, out.tokens[:total], out.positions[:total], out.writes[:total], starts,
            contexts, asked, paths,
        )  # fmt: skip
        hidden = self._forward(runner, of_forward, mask)
        with self.clock.model("draft"):
            return self.draft.logits(hidden, short=short)

    def _forward(
        self, runner: GPUModelRunner, rows: ForwardRows, mask: np.ndarray | None
    ) -> torch.Tensor:
        self.counters.draft_forwards += 1
        with self.clock.phase("draft_inputs"):
            return self.draft.forward(self.clock, runner, rows, mask)
