"""Classes of the plugin that extend vLLM's."""

from __future__ import annotations

from vllm_ouroboros.integration.cpu_worker import OuroborosCPURunner, OuroborosCPUWorker
from vllm_ouroboros.integration.cuda_runner import OuroborosCUDARunner
from vllm_ouroboros.integration.cuda_worker import OuroborosCUDAWorker
from vllm_ouroboros.integration.scheduler import OuroborosScheduler
from vllm_ouroboros.verify.cpu import attention as cpu_attention
from vllm_ouroboros.verify.cuda import attention as cuda_attention

CLASSES = (
    OuroborosCPURunner, OuroborosCPUWorker, OuroborosCUDARunner, OuroborosCUDAWorker,
    OuroborosScheduler, cpu_attention.TreeAttentionMetadataBuilder,
    cpu_attention.TreeAttentionImpl, cpu_attention.TreeAttentionBackend,
    cuda_attention.TreeFlashBuilder, cuda_attention.TreeFlashImpl, cuda_attention.TreeFlashBackend,
    cuda_attention.TreeTritonBuilder, cuda_attention.TreeTritonImpl,
    cuda_attention.TreeTritonBackend,
)  # fmt: skip
