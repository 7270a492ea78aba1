"""vLLM's runner and worker for CUDA devices, with trees.

Three ways for a forward's attention, as vLLM's CUDA graphs have it. Without a graph, or with
piecewise ones, attention runs between the graphs: branching requests bring a new `CUDATreeStep`.
With a full graph (all requests have as many rows as a tree can have), the captured kernel reads
the buffers of `StaticSteps`, which every step fills, chains included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft.cuda_graphs import MAX_GRAPH_ROWS, DraftGraphs
from vllm_ouroboros.integration.runner import TreeBatch, TreeRunner
from vllm_ouroboros.integration.worker import OuroborosWorkerMixin, replace_backend
from vllm_ouroboros.kernels.kv_compact import KVLayers
from vllm_ouroboros.trees.draft_tree import step_mask
from vllm_ouroboros.verify.cuda.acceptance import walk_on_device
from vllm_ouroboros.verify.cuda.attention import TreeRows, layer_tables
from vllm_ouroboros.verify.cuda.tree_step import CUDATreeStep, StaticSteps


class OuroborosCUDARunner(TreeRunner):
    """vLLM's runner for CUDA devices, with tree verification."""

    def profile_run(self, *args, **kwargs) -> None:
        super().profile_run(*args, **kwargs)
        self.drafter.warm_up(self.max_num_tokens)  # its activations take memory too

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
            self.device, self.max_num_reqs, self.max_num_reqs * self.uniform_decode_query_len,
            self.uniform_decode_query_len, self.max_model_len,
        )  # fmt: skip

    def capture_model(self) -> int:
        """vLLM's graphs, then those of the draft model; bytes that they take."""
        taken = super().capture_model()
        draft = self.drafter.draft
        rounds = self.drafter.rounds
        if draft is None or rounds is None:
            return taken
        if self.compilation_config.cudagraph_mode == CUDAGraphMode.NONE:  # as with enforce_eager
            return taken
        free = torch.cuda.mem_get_info()[0]
        table = self.input_batch.block_table[draft.kv_cache_gid].block_table.gpu
        requests = min(rounds.most_requests(self.max_num_reqs), MAX_GRAPH_ROWS)
        static = StaticSteps(self.device, requests, MAX_GRAPH_ROWS, rounds.widest, draft.max_len)
        draft.graphs = DraftGraphs(
            static, table.shape[1], draft.masked, draft.further_inputs(MAX_GRAPH_ROWS)
        )
        draft.graphs.capture()
        return taken + max(0, free - torch.cuda.mem_get_info()[0])

    def tree_step(self, rows, query_start_loc, context_lens, mask, num_rows, **_) -> CUDATreeStep:
        return CUDATreeStep.of(
            self.device, None if len(rows) == num_rows else rows, query_start_loc, context_lens,
            torch.empty(0), mask,
        )  # fmt: skip

    def graph_tree_nodes(self, num_requests: int) -> int:
        settings, width = self.compilation_config, self.uniform_decode_query_len
        full = settings.cudagraph_mode.has_full_cudagraphs()
        return width - 1 if full and num_requests * width <= self.most_captured else 0

    @property
    def most_captured(self) -> int:
        """Rows of the largest graph."""
        return self.compilation_config.max_cudagraph_capture_size or 0

    # -- full graphs ---------------------------------------------------------------------------

    def _build_attention_metadata(self, *args, **kwargs):
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        dummy = self.trees is None  # capture, or the runs that warm up for it
        full = kwargs.get("num_tokens_padded") is not None
        if kwargs["max_query_len"] == self.uniform_decode_query_len and (full or dummy):
            self._attach_static(metadata, kwargs["num_reqs"])
        return metadata, common

    def _attach_static(self, metadata: dict[str, Any], num_requests: int) -> None:
        """Let all rows attend by the masks in the static buffers."""
        target = {id(m): m for name, m in metadata.items() if name in self.target_layers}
        num_rows = next(iter(target.values())).num_actual_tokens
        width = self.uniform_decode_query_len
        starts = np.minimum(np.arange(num_requests + 1) * width, num_rows).astype(np.int32)
        parents = np.tile(np.arange(-1, width - 1, dtype=np.int32), num_requests)
        contexts = np.zeros(num_requests, np.int32)
        if self.trees is not None:
            contexts[:] = self.input_batch.num_computed_tokens_cpu[:num_requests]
            for r, tree in enumerate(self.trees.trees):
                if tree is not None:  # a row behind the tree's sees what it would see in a chain
                    first = r * width + 1
                    parents[first : first + len(tree.tokens)] = tree.parents + 1
        self.static.fill(starts, contexts, step_mask(parents, starts))
        for built in target.values():
            built.tree = self.static.step(
                len(built.query_start_loc) - 1, num_rows, built.block_table
            )

    def _attach_trees(self, trees: TreeBatch, metadata: dict[str, Any]) -> None:
        super()._attach_trees(trees, metadata)
        names: dict[int, list[str]] = {}
        for name, built in metadata.items():
            tree = getattr(built, "tree", None)
            if tree is not None and name in self.target_layers:  # a head's may share it
                names.setdefault(id(tree), []).append(name)
        step: Any
        for step in trees.steps:
            step.layers = self._tables(names[id(step)])

    def _tables(self, names: list[str]) -> list[KVLayers]:
        """Where the KV of some layers lies; made once, since caches stay where they are."""
        key = frozenset(names)
        if key not in self.tables:
            self.tables[key] = layer_tables([self.target_layers[name] for name in names])
        return self.tables[key]

    # -- acceptance ----------------------------------------------------------------------------

    def _sample(self, logits, spec_decode_metadata) -> SamplerOutput:
        trees, live = self.trees, self.input_batch.sampling_metadata
        sampled = [self.drafter.requests[r].sampling for r in self.input_batch.req_ids]
        assert trees is not None
        if not (live.all_greedy and any(trees.trees) and all(q.argmax_only for q in sampled)):
            return super()._sample(logits, spec_decode_metadata)
        with self.drafter.clock.phase("accept"):
            walked = walk_on_device(logits, trees.rows, trees.trees, [q.stops for q in sampled])
            if trees.branching:
                index = torch.tensor(trees.branching, device=logits.device)
                paths = walked.path[index]
                step: Any
                for step in trees.steps:
                    step.compact(paths)
            found = walked.to_host(trees.rows, trees.trees)
        self.verified = {
            r: v for r, v in zip(self.input_batch.req_ids, found, strict=True) if v is not None
        }
        self.trees = None
        return SamplerOutput(sampled_token_ids=walked.tokens, logprobs_tensors=None)


class OuroborosCUDAWorker(OuroborosWorkerMixin, Worker):
    """vLLM's GPU worker with our runner and attention backends."""

    def init_device(self) -> None:
        for backend, name in (
            (AttentionBackendEnum.FLASH_ATTN, "TreeFlashBackend"),
            (AttentionBackendEnum.TRITON_ATTN, "TreeTritonBackend"),
        ):
            replace_backend(backend, f"vllm_ouroboros.verify.cuda.attention.{name}")
        super().init_device()

    def _make_model_runner(self) -> OuroborosCUDARunner:
        return OuroborosCUDARunner(self.vllm_config, self.device)
