"""The trees of one forward, whatever the platform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

MaskTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""First rows int32 [R + 1], context lengths int32 [R] and mask int32 [T, words] on a device."""


class TreeStep(Protocol):
    """The trees of one forward, on any platform."""

    block_table: torch.Tensor  # int32 [R, max_blocks]

    def write(self, moves: torch.Tensor) -> None:
        """Copy accepted rows to their canonical KV slots; see `CPUTreeStep.write`."""


@dataclass
class TreeOnly:
    """Metadata of a forward whose rows all belong to trees: vLLM's kernel sees none of it."""

    tree: TreeStep


def attach(attn_metadata: dict, tree: TreeStep) -> None:
    """Give each distinct metadata object of a forward its tree, as the attribute ``tree``."""
    for metadata in {id(m): m for m in attn_metadata.values()}.values():
        metadata.tree = tree
