"""Feature sampling of FSPAD: the chosen token picks one point out of a feature's uncertainty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)


class GatedProjection(nn.Module):
    """W_d (SiLU(W_g e) * W_u x): gate and value read different inputs, so they stay apart."""

    def __init__(self, hidden: int, size: int, prefix: str) -> None:
        super().__init__()
        self.gate_proj = ColumnParallelLinear(
            hidden, size, bias=False, prefix=f"{prefix}.gate_proj"
        )
        self.up_proj = ColumnParallelLinear(hidden, size, bias=False, prefix=f"{prefix}.up_proj")
        self.down_proj = RowParallelLinear(size, hidden, bias=False, prefix=f"{prefix}.down_proj")

    def forward(self, embedding: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.gate_proj(embedding)[0], self.up_proj(x)[0]
        return self.down_proj(F.silu(gate) * value)[0]


class FeatureSampling(nn.Module):
    """x0 = W [e; f] + b, then x0 + W_d (SiLU(W_g e) * W_u RMSNorm(x0)) (arXiv 2408.15562).

    Args:
        hidden: size of embeddings and features.
        size: intermediate size; None for x0 alone, as in EAGLE.
        eps: of the norm.
        prefix: of the weights' names.
    """

    def __init__(self, hidden: int, size: int | None, eps: float, prefix: str) -> None:
        super().__init__()
        self.fc = ReplicatedLinear(2 * hidden, hidden, bias=True, prefix=f"{prefix}.fc")
        self.mlp: GatedProjection | None = None
        if size is not None:
            self.mlp = GatedProjection(hidden, size, f"{prefix}.mlp")
            self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def forward(self, embedding: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
        """Sampled features [T, hidden] of embeddings and features [T, hidden]."""
        x = self.fc(torch.cat((embedding, feature), dim=-1))[0]
        if self.mlp is not None:
            x = x + self.mlp(embedding, self.post_attention_layernorm(x))
        return x
