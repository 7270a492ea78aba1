"""vLLM's worker for CUDA devices, with our runner and attention backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_ouroboros.integration.cuda_runner import OuroborosCUDARunner
from vllm_ouroboros.integration.worker import OuroborosWorkerMixin


class OuroborosCUDAWorker(OuroborosWorkerMixin, Worker):
    """vLLM's GPU worker with our runner and attention backends."""

    backends: ClassVar = {
        AttentionBackendEnum.FLASH_ATTN: "vllm_ouroboros.verify.cuda.attention.TreeFlashBackend",
        AttentionBackendEnum.TRITON_ATTN: "vllm_ouroboros.verify.cuda.attention.TreeTritonBackend",
    }
    _weights_of_draft: Sequence[torch.Tensor] = ()  # while the device has lost them

    def compile_or_warm_up_model(self):
        """As vLLM does, and our kernels; first these, for at its end vLLM begins to warn of
        kernels that are compiled."""
        self.model_runner.warm_up_kernels()
        return super().compile_or_warm_up_model()

    def sleep(self, level: int = 1) -> None:
        """As vLLM does. Level 2 discards weights, and nobody loads a draft model's again: they
        are kept on the host."""
        draft = self.model_runner.drafter.draft
        if level == 2 and draft is not None:
            self._weights_of_draft = [one.to("cpu", copy=True) for one in draft.own_tensors()]
        super().sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        super().wake_up(tags)
        draft = self.model_runner.drafter.draft
        if draft is None or not (tags is None or "weights" in tags):
            return
        if self._weights_of_draft:
            kept = zip(draft.own_tensors(), self._weights_of_draft, strict=True)
            self._weights_of_draft = []
            for one, value in kept:
                one.data.copy_(value)
        draft.target_changed()

    def _make_model_runner(self) -> OuroborosCUDARunner:
        return OuroborosCUDARunner(self.vllm_config, self.device)
