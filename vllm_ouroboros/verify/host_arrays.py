"""Arrays of the host on a device: many of them by one copy, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 16  # bytes: Triton compiles a kernel anew for pointers that are no multiples of it


def to_device(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Tensors of arrays; those of the CPU share their memory."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    starts, size = layout(arrays)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=True)  # of torch's cache of such
    return unpack(pack(packed, arrays, starts).to(device, non_blocking=True), arrays, starts)


def layout(arrays: Sequence[np.ndarray]) -> tuple[list[int], int]:
    """Where each array begins, in bytes, and how many bytes all take."""
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays])
    return [0, *ends[:-1].tolist()], int(ends[-1])


def pack(into: torch.Tensor, arrays: Sequence[np.ndarray], starts: list[int]) -> torch.Tensor:
    """Write arrays to their places in bytes."""
    flat = into.numpy()
    for array, start in zip(arrays, starts, strict=True):
        flat[start : start + array.nbytes].view(array.dtype)[:] = array.ravel()
    return into


def unpack(
    packed: torch.Tensor, arrays: Sequence[np.ndarray], starts: list[int]
) -> list[torch.Tensor]:
    """Tensors of the types and shapes of ``arrays``, in bytes that `pack` wrote."""
    return [
        packed[start : start + array.nbytes]
        .view(torch.from_numpy(array[:0].ravel()).dtype)
        .view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]
