"""vLLM's runner and worker for the CPU, with trees."""

from __future__ import annotations

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_ouroboros.integration.runner import TreeRunner
from vllm_ouroboros.integration.worker import OuroborosWorkerMixin, replace_backend
from vllm_ouroboros.verify.cpu.argmax import argmax
from vllm_ouroboros.verify.cpu.attention_kernel import share_threads
from vllm_ouroboros.verify.cpu.tree_step import CPUTreeStep

logger = init_logger(f"vllm.{__name__}")


class OuroborosCPURunner(TreeRunner, CPUModelRunner):
    """vLLM's runner for the CPU, with tree verification."""

    def warming_up_model(self) -> None:
        super().warming_up_model()
        if self.compilation_config.mode:
            self.drafter.warm_up(self.max_num_tokens)

    def tree_step(
        self, rows, query_start_loc, context_lens, mask, num_rows, *, save_kv=True
    ) -> CPUTreeStep:
        return CPUTreeStep(
            rows=torch.from_numpy(rows),
            starts=query_start_loc.astype(np.int64),
            contexts=context_lens.astype(np.int64),
            block_table=torch.empty(0),
            mask=mask,
            num_rows=num_rows,
            save_kv=save_kv,
        )


class OuroborosCPUWorker(OuroborosWorkerMixin, CPUWorker):
    """vLLM's CPU worker with our runner and attention backend."""

    def init_device(self) -> None:
        replace_backend(
            AttentionBackendEnum.CPU_ATTN,
            "vllm_ouroboros.verify.cpu.attention.TreeAttentionBackend",
        )
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
