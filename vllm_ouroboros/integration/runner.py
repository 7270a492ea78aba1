"""The model runner: where trees enter vLLM's step and leave it again, on any platform.

vLLM's step is kept whole. Four of its stages are extended: after the batch is updated, requests
are made known to the proposer; after the inputs are prepared, tree nodes get their positions;
after the attention metadata is built, the tree mask is attached (by each platform's own runner);
sampling walks the trees and moves the accepted KV.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample import logits_processor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ouroboros.integration.proposer import OuroborosProposer
from vllm_ouroboros.integration.stat_logger import attach
from vllm_ouroboros.metrics.forward_timer import ForwardTimer, HostTimer
from vllm_ouroboros.policy.controller import Policy
from vllm_ouroboros.policy.forward_costs import Costs, measure
from vllm_ouroboros.trees.draft_tree import DraftTree, depths
from vllm_ouroboros.verify.acceptance import Verified, verify
from vllm_ouroboros.verify.host_arrays import to_device
from vllm_ouroboros.verify.token_sampler import TokenSampler, build_processors
from vllm_ouroboros.verify.tree_step import MaskTensors, TreeStep

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import SamplerOutput


class TreeBatch:
    """The trees of one target forward, in the order of the runner's batch.

    Attributes:
        trees: the tree of each request, or None.
        rows: int64 [R], first sampled row of each request among the logits.
        starts: int64 [R], row of the root of each tree in the forward.
        branching: requests whose tree is no chain; their rows attend by mask.
        steps: one step for each kind of attention metadata, once the metadata is built.
    """

    def __init__(self, trees: list[DraftTree | None], drafted: np.ndarray, ends: np.ndarray):
        self.trees = trees
        self.rows = np.cumsum(drafted + 1) - (drafted + 1)
        self.starts = ends - (drafted + 1)
        self.branching = [r for r, t in enumerate(trees) if t is not None and not t.is_chain]
        self.steps: list[TreeStep] = []

    @cached_property
    def layout(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows int64 [T] in the forward of all branching trees, their row parents int32 [T]
        within the request, and the first of each request int32 [R + 1].
        """
        sizes = [1 + len(self.trees[r].tokens) for r in self.branching]  # type: ignore[union-attr]
        query_start_loc = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        rows = np.concatenate(
            [self.starts[r] + np.arange(n) for r, n in zip(self.branching, sizes, strict=True)]
        )
        parents = np.concatenate(
            [np.concatenate([[-1], self.trees[r].parents + 1]) for r in self.branching]  # type: ignore[union-attr]
        )
        return rows, parents.astype(np.int32), query_start_loc


class TreeRunner(GPUModelRunner):
    """What vLLM's runner of any platform needs for tree verification."""

    drafter: OuroborosProposer
    forwards_overlap = False
    """Whether a forward runs on while the host goes on."""

    def __init__(self, *args, **kwargs) -> None:
        self._init_without_processors(*args, **kwargs)
        # one set that vLLM's batch keeps up to date, and one for the rows of trees
        batch = self.input_batch
        batch.logitsprocs, processors = (
            build_processors(self.vllm_config, self.device) for _ in range(2)
        )
        batch.logitsprocs_need_output_token_ids = bool(self.model_config.logits_processors)
        self.token_sampler = TokenSampler(self.sampler, processors)
        self.drafter.bind(self, self.token_sampler)
        self.trees: TreeBatch | None = None
        self.verified: dict[str, Verified] = {}
        self.scheduled_tokens: dict[str, int] = {}
        self.drafted_tokens: dict[str, int] = {}  # those of them that were drafted
        self.forward_timer = self.make_timer()
        self.hidden_states = torch.zeros(0)  # of the target's last forward, for draft heads

    def make_timer(self) -> ForwardTimer:
        """What takes the time of the target's forwards."""
        return HostTimer()

    def _init_without_processors(self, vllm_config: VllmConfig, *args, **kwargs) -> None:
        """vLLM's set-up, which ends with an error if it sees custom logits processors here."""
        model_config = vllm_config.model_config
        custom, model_config.logits_processors = model_config.logits_processors, None
        logger = logging.getLogger(logits_processor.__name__)
        logger.disabled = True  # it would warn that min_p and logit_bias do not work
        try:
            super().__init__(vllm_config, *args, **kwargs)
        finally:
            model_config.logits_processors, logger.disabled = custom, False

    def initialize_kv_cache(self, *args, **kwargs) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        if self.drafter.rounds is not None:
            self.drafter.rounds.draft.bind_kv_cache(self)
            self.drafter.rounds.cache.allocate(self.kv_cache_config.num_blocks)

    def reload_weights(self, *args, **kwargs) -> None:
        super().reload_weights(*args, **kwargs)
        self.target_changed()

    def target_changed(self) -> None:
        """The target has other weights now."""
        if self.drafter.draft is not None:
            self.drafter.draft.target_changed()

    # -- requests ------------------------------------------------------------------------------

    def _on_request_state_removed(self, req_id, req_state) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.drafter.requests.forget(req_id)

    def _update_states(self, scheduler_output: SchedulerOutput):
        for req_id in scheduler_output.preempted_req_ids or ():
            self.drafter.requests.suspend(req_id)
        result = super()._update_states(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            state, tenant = self.requests[new.req_id], getattr(new, "cache_salt", None)
            self.drafter.requests.admit(new.req_id, state, new.num_computed_tokens, tenant)
        # The proposer has them now. vLLM would rewind those of unfinished prompts by an offset,
        # which CPU generators lack: a seeded request under chunked prefill ends stock 0.32.0.
        self.input_batch.generators.clear()
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if req_id in cached.resumed_req_ids:
                self.drafter.requests.resume(req_id, computed)
        self.scheduled_tokens = scheduler_output.num_scheduled_tokens
        return result

    # -- inputs --------------------------------------------------------------------------------

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens):
        result = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        req_ids = self.input_batch.req_ids
        with self.drafter.clock.phase("tree"):
            flat = [scheduled.get(req_id, []) for req_id in req_ids]
            self.drafted_tokens = {req_id: len(tokens) for req_id, tokens in scheduled.items()}
            trees = [
                self.drafter.requests.tree_of(req_id, tokens) if tokens else None
                for req_id, tokens in zip(req_ids, flat, strict=True)
            ]
            ends = np.cumsum(num_scheduled_tokens)
            self.trees = TreeBatch(trees, np.array([len(tokens) for tokens in flat]), ends)
            total = scheduler_output.total_num_scheduled_tokens
            if any(-1 in tokens for tokens in flat):
                self.input_ids.gpu[:total].clamp_(min=0)  # placeholders of vLLM's scheduler
            if self.trees.branching:
                rows, parents, query_start_loc = self.trees.layout
                depth = np.empty(len(rows), np.int64)
                depths(parents, query_start_loc, depth)
                roots = np.repeat(rows[query_start_loc[:-1]], np.diff(query_start_loc))
                index, root, below = to_device(self.device, rows, roots, depth)
                self.positions[index] = self.positions[root] + below
        return result

    def masked_step(
        self,
        query_start_loc: np.ndarray,
        context_lens: np.ndarray,
        mask: np.ndarray,
        on_device: MaskTensors,
    ) -> TreeStep:
        """A step whose T rows all attend by masks, as this platform's attention reads it; without
        a block table yet, and its KV stays where it is.

        Args:
            query_start_loc: int32 [R + 1], first row of each request.
            context_lens: int32 [R], tokens in the KV cache before the step.
            mask: int32 [T, words] of `step_mask`.
            on_device: all three.
        """
        raise NotImplementedError

    def _model_forward(self, *args, **kwargs):
        drafter = self.drafter
        drafter.counters.target_forwards += 1
        rows = sum(self.scheduled_tokens.values())
        if drafter.policy is not None:  # until it is known
            drafter.forward_seconds = drafter.policy.costs.target.at(rows)
        with drafter.clock.model("target"), self.forward_timer:
            output = super()._model_forward(*args, **kwargs)
        with drafter.clock.model("overlapped"):
            drafter.catch_up()
        self._observe_forward()
        if drafter.head is not None:
            self.hidden_states = output[0] if isinstance(output, tuple) else output
        return output

    def _observe_forward(self) -> None:
        """Tell the policy how long the target's forward of this step took, once that is known."""
        seconds, policy = self.forward_timer.take(), self.drafter.policy
        if seconds is None or policy is None:
            return
        rows, curve = sum(self.scheduled_tokens.values()), policy.costs.target
        if rows <= curve.sizes[-1]:
            curve.observe(rows, seconds)
        self.drafter.forward_seconds = seconds

    def measure_costs(self) -> None:
        """Measure forwards of both models for the policy, if there is to be one."""
        drafter = self.drafter
        if not drafter.config.adaptive:
            return
        ranks, draft, most = drafter.ranks, drafter.draft, self.max_num_tokens
        if ranks.follows:
            ranks.follow({"target": self._idle_target, "draft": self._idle_draft})
            return

        def target(rows: int) -> None:
            ranks.tell("target", rows)
            self._idle_target(rows)

        def drafted(rows: int) -> None:
            assert draft is not None
            draft.ranks.tell("draft", rows)
            self._idle_draft(rows)

        with ranks.deciding():
            of_target = measure(target, most, graphs=self.graph_sizes)
            of_draft = measure(drafted, most) if draft is not None else None
            ranks.end()
        drafter.set_policy(Policy(Costs(of_target, of_draft)))

    @property
    def graph_sizes(self) -> list[int]:
        """Rows of the graphs that steps with trees are padded to, ascending."""
        return []

    def _idle_target(self, rows: int) -> None:
        """Run a forward of the target for nobody, and wait for it."""
        self._dummy_run(rows)

    def _idle_draft(self, rows: int) -> None:
        """The same for the draft model."""
        self.drafter.warm_up(rows)

    # -- outputs -------------------------------------------------------------------------------

    def execute_model(self, *args, **kwargs):
        with self.drafter.ranks.ending_engine():
            return super().execute_model(*args, **kwargs)

    def sample_tokens(self, *args, **kwargs):
        with self.drafter.ranks.ending_engine():
            output = super().sample_tokens(*args, **kwargs)
        if isinstance(output, ModelRunnerOutput) and output.req_ids:
            attach(output, self.drafter.exported.read())
        return output

    def _sample(self, logits, spec_decode_metadata) -> SamplerOutput:
        trees, req_ids = self.trees, self.input_batch.req_ids
        assert trees is not None
        self.input_batch.update_async_output_token_ids()
        with self.drafter.clock.phase("accept"):
            unfinished = np.nonzero(self.discard_request_mask.np[: len(req_ids)])[0]
            verified, output = verify(
                self.token_sampler,
                logits,
                trees.rows,
                trees.trees,
                [self.drafter.requests[req_id].sampling for req_id in req_ids],
                set(unfinished.tolist()),
                self.input_batch.sampling_metadata,
            )
        with self.drafter.clock.phase("compact"):
            self._compact(trees, verified)
        self.verified = {r: v for r, v in zip(req_ids, verified, strict=True) if v is not None}
        self.trees = None
        return output

    def _compact(self, trees: TreeBatch, verified: list[Verified | None]) -> None:
        """Move the KV of accepted nodes that do not stand in their canonical slot yet."""
        if not trees.steps:
            return
        computed = self.input_batch.num_computed_tokens_cpu
        moves = []
        for r, (index, root) in zip(trees.branching, self._roots(trees), strict=True):
            found = verified[r]
            if found is not None:
                base = int(computed[r]) + 1
                moves += [
                    (index, root + 1 + node, base + depth)
                    for depth, node in enumerate(found.path.tolist())
                    if node != depth
                ]
        if moves:
            for step in trees.steps:
                step.write(torch.tensor(moves))

    def _roots(self, trees: TreeBatch) -> list[tuple[int, int]]:
        """For each tree with branches: its request's number and its root's row in the step."""
        raise NotImplementedError

    def _input_fits_in_drafter(self, common_attn_metadata) -> bool:
        return common_attn_metadata is not None  # the limits are kept per request
