"""What a device multiplies matrices in fastest."""

from __future__ import annotations

import torch


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16; float32 on a CPU without AMX."""
    tiles = device != "cpu" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if tiles else torch.float32
