"""vLLM's runner and worker for the CPU, with trees."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ouroboros.integration.runner import TreeBatch, TreeRunner
from vllm_ouroboros.integration.worker import OuroborosWorkerMixin
from vllm_ouroboros.trees.draft_tree import step_mask
from vllm_ouroboros.verify.cpu.argmax import argmax
from vllm_ouroboros.verify.cpu.attention_kernel import share_threads
from vllm_ouroboros.verify.cpu.tree_step import CPUTreeStep
from vllm_ouroboros.verify.tree_step import attach

logger = init_logger(f"vllm.{__name__}")


class OuroborosCPURunner(TreeRunner, CPUModelRunner):
    """vLLM's runner for the CPU, with tree verification."""

    def warming_up_model(self) -> None:
        super().warming_up_model()
        if self.compilation_config.mode:
            self.drafter.warm_up(self.max_num_tokens)

    def masked_step(self, query_start_loc, context_lens, mask, on_device) -> CPUTreeStep:
        rows = np.arange(len(mask))
        step = CPUTreeStep.of(rows, query_start_loc, context_lens, torch.empty(0), mask, len(mask))
        step.save_kv = False
        return step

    def _build_attention_metadata(self, *args, **kwargs):
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        trees = self.trees
        if trees is not None and trees.branching:
            with self.drafter.clock.phase("tree"):
                self._attach_trees(trees, metadata)
        return metadata, common

    def _attach_trees(self, trees: TreeBatch, metadata: dict[str, Any]) -> None:
        rows, parents, query_start_loc = trees.layout
        mask = step_mask(parents, query_start_loc)
        requests = torch.tensor(trees.branching)
        contexts = self.input_batch.num_computed_tokens_cpu[trees.branching]
        draft_layers = set(self.drafter.draft.layer_names) if self.drafter.draft else set()
        objects: dict[int, dict[str, Any]] = {}
        for name, built in metadata.items():
            if name not in draft_layers:
                objects.setdefault(id(built), {})[name] = built
        trees.steps = []
        for layers in objects.values():
            built = next(iter(layers.values()))
            step = CPUTreeStep.of(
                rows, query_start_loc, contexts, built.block_table[requests], mask,
                built.num_actual_tokens,
            )  # fmt: skip
            attach(layers, step)
            trees.steps.append(step)

    def _roots(self, trees: TreeBatch) -> list[tuple[int, int]]:
        return [*enumerate(trees.layout[2][:-1].tolist())]


class OuroborosCPUWorker(OuroborosWorkerMixin, CPUWorker):
    """vLLM's CPU worker with our runner and attention backend."""

    backends: ClassVar = {
        AttentionBackendEnum.CPU_ATTN: "vllm_ouroboros.verify.cpu.attention.TreeAttentionBackend"
    }

    def init_device(self) -> None:
        # The worker names its runner's class by a module global and has no hook for another one
        # (GPU workers have `_make_model_runner`): swapped for this call alone, in this process.
        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = OuroborosCPURunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
        if not share_threads(torch.get_num_threads()):
            logger.warning("numba has no OpenMP layer here: tree attention runs on one thread")
        argmax(torch.zeros(1, 1, dtype=torch.bfloat16))  # compiles it
