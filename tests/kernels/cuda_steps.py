"""Steps of host arrays."""

from __future__ import annotations

import numpy as np
import torch

from vllm_ouroboros.verify.cuda.tree_step import CUDATreeStep
from vllm_ouroboros.verify.host_arrays import to_device


def step_of(
    device: str,
    starts: np.ndarray,
    contexts: np.ndarray,
    block_table: torch.Tensor,
    mask: np.ndarray,
) -> CUDATreeStep:
    """A step on a device."""
    tensors = to_device(torch.device(device), starts, contexts, mask)
    step = CUDATreeStep.of(starts, contexts, tuple(tensors))
    step.block_table = block_table
    return step
