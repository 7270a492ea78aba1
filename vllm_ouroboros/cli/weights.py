"""Weights in files that everybody may read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def save_weights(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write contiguous tensors as a checkpoint's file."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors writes files for their owner only
