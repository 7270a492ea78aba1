"""Arrays on a device that keep their places, as graphs need it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_ouroboros.verify.host_arrays import layout, pack, unpack


class StaticArrays:
    """Several arrays in one piece of memory, written anew by one copy that nobody waits for.

    Args:
        device: where they lie.
        first: what they hold at first; shapes and types stay.

    Attributes:
        tensors: the arrays, on the device.
    """

    def __init__(self, device: torch.device, first: Sequence[np.ndarray]) -> None:
        self._starts, size = layout(first)
        self._packed = torch.zeros(size, dtype=torch.uint8, device=device)
        self.tensors = unpack(self._packed, first, self._starts)
        self.fill(*first)

    def fill(self, *arrays: np.ndarray) -> None:
        """Write all of them; the last one may have fewer rows, those behind stay as they are."""
        size = self._starts[-1] + arrays[-1].nbytes
        pinned = self._packed.device.type == "cuda"  # of torch's cache of such memory
        packed = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._packed[:size].copy_(pack(packed, arrays, self._starts), non_blocking=True)
