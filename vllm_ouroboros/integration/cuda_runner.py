"""vLLM's runner for CUDA devices, with trees.

In a step with trees, the rows of all requests at the front of the batch attend by masks; vLLM puts
those of few rows there, long prompts behind them. If there are no long prompts, a full CUDA graph
serves the step (`TreeDispatcher`): the captured kernel reads the buffers of `StaticSteps`, which
every step fills, be its rows of trees, of chains or plain decodes. Else, and with
``enforce_eager``, attention runs between piecewise graphs or without any, and a step with branches
brings a new `CUDATreeStep`; one without is vLLM's alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.distributed.parallel_state import graph_capture
from vllm.model_executor.layers.attention import Attention
from vllm.v1.outputs import SamplerOutput

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft.cuda_graphs import (
    MAX_GRAPH_ROWS,
    SIZES,
    Capture,
    DraftGraphs,
    capture_cuda,
)
from vllm_ouroboros.integration.runner import TreeBatch, TreeRunner
from vllm_ouroboros.integration.tree_graphs import TreeDispatcher
from vllm_ouroboros.kernels.kv_compact import KVLayers
from vllm_ouroboros.trees.draft_tree import step_mask
from vllm_ouroboros.verify.cuda.acceptance import walk_on_device
from vllm_ouroboros.verify.cuda.attention import MaskedFirst, TreeRows, layer_tables
from vllm_ouroboros.verify.cuda.device_timer import DeviceTimer
from vllm_ouroboros.verify.cuda.tree_step import CUDATreeStep, StaticSteps
from vllm_ouroboros.verify.cuda.warm_up import warm_up_acceptance, warm_up_attention
from vllm_ouroboros.verify.host_arrays import to_device

GRAPH_BYTES = 2**21
"""What the driver takes for a graph of a small model, about."""


class OuroborosCUDARunner(TreeRunner):
    """vLLM's runner for CUDA devices, with tree verification."""

    forwards_overlap = True
    uniform_decode_query_len: int  # most rows of a request that attend by masks

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.cudagraph_dispatcher = TreeDispatcher(self.vllm_config)

    def profile_run(self, *args, **kwargs) -> None:
        """As vLLM does, with what else takes memory: the draft model's activations and logits, and
        the target's logits of as many rows as trees may have."""
        super().profile_run(*args, **kwargs)
        self.drafter.warm_up(self.max_num_tokens)
        size = min(self.max_num_tokens, self.max_masked_rows), self.model_config.get_hidden_size()
        with torch.inference_mode():
            hidden = torch.zeros(size, dtype=self.model_config.dtype, device=self.device)
            self.model.compute_logits(hidden)
        draft, rounds = self.drafter.draft, self.drafter.rounds
        if draft is not None and rounds is not None:
            draft.profile(rounds.rows_of_forward(self.max_num_reqs))

    def initialize_kv_cache(self, *args, **kwargs) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        for name, layer in layers.items():
            if not isinstance(layer.impl, TreeRows):
                raise ConfigError(
                    f"attention backend {layer.get_attn_backend().get_name()!r} (layer {name}) is "
                    "not supported with Ouroboros yet: use --attention-backend FLASH_ATTN or "
                    "TRITON_ATTN"
                )
        drafts = set(self.drafter.draft.layer_names) if self.drafter.draft else set()
        self.target_layers = {n: layer for n, layer in layers.items() if n not in drafts}
        self.tables: dict[frozenset[str], list[KVLayers]] = {}
        self.static = StaticSteps(
            self.device, self.max_num_reqs, self.max_masked_rows, self.uniform_decode_query_len,
            self.max_model_len,
        )  # fmt: skip

    @property
    def max_masked_rows(self) -> int:
        """Most rows of a step that attend by masks."""
        return self.max_num_reqs * self.uniform_decode_query_len

    # -- graphs --------------------------------------------------------------------------------

    def _check_and_update_cudagraph_mode(self, *args, **kwargs) -> None:
        settings, width = self.compilation_config, self.uniform_decode_query_len
        sizes = settings.cudagraph_capture_sizes
        if sizes and self.max_masked_rows < sizes[-1]:  # the largest step of trees is one of them
            settings.cudagraph_capture_sizes = sorted({*sizes, self.max_masked_rows})
        self.uniform_decode_query_len = 1  # sizes need be no multiples of it
        try:
            super()._check_and_update_cudagraph_mode(*args, **kwargs)
        finally:
            self.uniform_decode_query_len = width

    def _is_uniform_decode(
        self,
        max_num_scheduled_tokens: int,
        uniform_decode_query_len: int,
        num_tokens: int,
        num_reqs: int,
        force_uniform_decode: bool | None = None,
    ) -> bool:
        """Whether all rows of a batch may attend by masks, so that a full graph can serve it."""
        if force_uniform_decode is not None:
            return force_uniform_decode
        if max_num_scheduled_tokens > uniform_decode_query_len:
            return False
        return self._num_masked(np.full(num_reqs, max_num_scheduled_tokens)) == num_reqs

    def _num_masked(self, lengths: np.ndarray) -> int:
        """Requests at the front of the batch whose rows may attend by masks.

        Args:
            lengths: int [R], rows of each request.
        """
        able = lengths <= self.uniform_decode_query_len
        if self.is_mm_prefix_lm:  # rows of an image see what comes behind them
            batch, num_reqs = self.input_batch, len(lengths)
            prompts = batch.num_prompt_tokens[:num_reqs]
            able &= batch.num_computed_tokens_cpu[:num_reqs] >= prompts
        return len(able) if able.all() else int(able.argmin())

    @property
    def _captures_draft(self) -> bool:
        """Whether the draft model gets graphs; not with ``enforce_eager``."""
        none = self.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
        return self.drafter.draft is not None and not none

    def profile_cudagraph_memory(self) -> int:
        """vLLM's estimate with the draft model's graphs, whose activations lie where those of the
        target's graphs lie."""
        own = len(SIZES) * GRAPH_BYTES if self._captures_draft else 0
        return super().profile_cudagraph_memory() + own

    def capture_model(self) -> int:
        """vLLM's graphs, then those of the draft model; bytes that they take."""
        taken = super().capture_model()
        if not self._captures_draft:
            return taken
        free = torch.cuda.mem_get_info()[0]
        draft = self.drafter.draft
        if draft is not None and draft.is_shared:  # messages between ranks are part of its graphs
            with graph_capture(self.device) as context:
                self._graph_draft(partial(capture_cuda, self.vllm_config, context.stream))
        else:
            self._graph_draft(partial(capture_cuda, self.vllm_config, None))
        return taken + max(0, free - torch.cuda.mem_get_info()[0])

    def _graph_draft(self, capture: Capture) -> None:
        draft, rounds = self.drafter.draft, self.drafter.rounds
        assert draft is not None and rounds is not None
        table = self.input_batch.block_table[draft.kv_cache_gid].block_table.gpu
        graphs = DraftGraphs(
            self.device, rounds.most_requests(self.max_num_reqs), rounds.widest, draft.max_len,
            table, capture, draft.masked, draft.padding,
        )  # fmt: skip
        graphs.capture()
        draft.graphs = graphs

    # -- costs ---------------------------------------------------------------------------------

    def make_timer(self) -> DeviceTimer:
        return DeviceTimer()

    @property
    def graph_sizes(self) -> list[int]:
        keys = self.cudagraph_dispatcher.cudagraph_keys[CUDAGraphMode.FULL]
        return sorted({key.num_tokens for key in keys})

    def warm_up_kernels(self) -> None:
        """Compile what the steps of this engine launch outside graphs."""
        model, width = self.model_config, self.uniform_decode_query_len
        layers = [*self.target_layers.values()]
        warm_up_attention(layers, width, self.max_model_len, self.device)
        warm_up_acceptance(model.get_vocab_size(), width - 1, model.dtype, self.device)

    def _idle_target(self, rows: int) -> None:
        self._dummy_run(rows, uniform_decode=rows <= self.max_masked_rows)
        torch.accelerator.synchronize()

    def _idle_draft(self, rows: int) -> None:
        draft = self.drafter.draft
        if draft is not None and draft.graphs is not None and rows <= MAX_GRAPH_ROWS:
            draft.graphs.run_again(rows)
        else:
            super()._idle_draft(rows)
        torch.accelerator.synchronize()

    # -- attention -----------------------------------------------------------------------------

    def masked_step(self, query_start_loc, context_lens, mask, on_device) -> CUDATreeStep:
        return CUDATreeStep.of(query_start_loc, context_lens, on_device)

    def _build_attention_metadata(self, *args, **kwargs):
        num_reqs, trees = kwargs["num_reqs"], self.trees
        num_tokens = kwargs.get("num_tokens_padded")  # of a full graph
        uniform = kwargs["max_query_len"] == self.uniform_decode_query_len
        if num_tokens is None and trees is None and uniform:  # a dummy run before a capture
            num_tokens = kwargs["num_tokens"]
        masked = 0
        if num_tokens is not None:
            masked = kwargs.get("num_reqs_padded") or num_reqs
        elif trees is not None and trees.branching:
            masked = self._num_masked(np.diff(self.query_start_loc.np[: num_reqs + 1]))
        builders = [
            builder
            for groups in self.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]
        for builder in builders:
            builder.masked = masked
        try:
            metadata, common = super()._build_attention_metadata(*args, **kwargs)
        finally:
            for builder in builders:
                builder.masked = 0
        if masked:
            with self.drafter.clock.phase("tree"):
                self._attach_masks(metadata, min(masked, num_reqs), num_tokens)
        return metadata, common

    def _attach_masks(
        self, metadata: dict[str, Any], num_reqs: int, graph_rows: int | None
    ) -> None:
        """Say what the first rows of a step see.

        Args:
            metadata: by layer.
            num_reqs: requests whose rows attend by masks.
            graph_rows: rows of the full graph; None: there is none.
        """
        starts, contexts, mask = self._masks(num_reqs)
        layers: dict[int, tuple[MaskedFirst, list[str]]] = {}
        for name, built in metadata.items():
            if name in self.target_layers:  # a draft model's may share the metadata
                layers.setdefault(id(built), (built, []))[1].append(name)
        if graph_rows is not None:
            self.static.fill(starts, contexts, mask)
        else:
            on_device = to_device(self.device, starts, contexts, mask)
            step = CUDATreeStep.of(starts, contexts, tuple(on_device))
        steps = []
        for built, names in layers.values():
            if graph_rows is not None:
                step = self.static.step(len(built.block_table), graph_rows, built.block_table)
            moved = self._tables(names) if self.trees is not None else []  # of no dummy run
            built.tree = replace(step, block_table=built.block_table, layers=moved)
            steps.append(built.tree)
        if self.trees is not None:
            self.trees.steps = [*steps]

    def _masks(self, num_reqs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First rows int32 [R + 1], contexts int32 [R] and masks int32 [T, words] of the first
        requests of a step; those without branches see what they see in a chain.
        """
        starts = self.query_start_loc.np[: num_reqs + 1].astype(np.int32)
        parents = np.arange(-1, starts[-1] - 1, dtype=np.int32)
        parents -= np.repeat(starts[:-1], np.diff(starts))
        contexts = np.zeros(num_reqs, np.int32)
        if self.trees is not None:
            contexts[:] = self.input_batch.num_computed_tokens_cpu[:num_reqs]
            for r in self.trees.branching:
                below = self.trees.trees[r].parents + 1  # type: ignore[union-attr]
                root = self.trees.starts[r]
                parents[root + 1 : root + 1 + len(below)] = below + (root - starts[r])
        return starts, contexts, step_mask(parents, starts)

    def _tables(self, names: list[str]) -> list[KVLayers]:
        """Where the KV of some layers lies; made once, since caches stay where they are."""
        key = frozenset(names)
        if key not in self.tables:
            self.tables[key] = layer_tables([self.target_layers[name] for name in names])
        return self.tables[key]

    # -- acceptance ----------------------------------------------------------------------------

    def _roots(self, trees: TreeBatch) -> list[tuple[int, int]]:
        return [(r, int(trees.starts[r])) for r in trees.branching]

    def _sample(self, logits, spec_decode_metadata) -> SamplerOutput:
        trees, live = self.trees, self.input_batch.sampling_metadata
        sampled = [self.drafter.requests[r].sampling for r in self.input_batch.req_ids]
        assert trees is not None
        if not (live.all_greedy and any(trees.trees) and all(q.argmax_only for q in sampled)):
            output = super()._sample(logits, spec_decode_metadata)
            self._observe_forward()
            return output
        with self.drafter.clock.phase("accept"):
            stops = [q.stops for q in sampled]
            walked = walk_on_device(logits, trees.rows, trees.trees, stops, self.num_spec_tokens)
            if trees.branching:
                step: Any
                for step in trees.steps:
                    step.compact(walked.path[: len(step.context_lens)])
            found = walked.to_host(trees.rows, trees.trees)
        self._observe_forward()
        self.verified = {
            r: v for r, v in zip(self.input_batch.req_ids, found, strict=True) if v is not None
        }
        self.trees = None
        return SamplerOutput(sampled_token_ids=walked.tokens, logprobs_tensors=None)
