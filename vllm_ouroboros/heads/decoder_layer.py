"""The decoder layer of a draft head: no input norm, and an MLP that may have two outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaAttention


class HeadMLP(nn.Module):
    """The MLP of Llama with as many outputs as wanted."""

    def __init__(self, hidden: int, size: int, outputs: int, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [size, size], bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.act_fn = SiluAndMul()
        self.down_proj = RowParallelLinear(size, outputs, bias=False, prefix=f"{prefix}.down_proj")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class HeadDecoderLayer(nn.Module):
    """r = x + Attn(x), then [r; r] + MLP(RMSNorm(r)), its two halves apart.

    Args:
        config: of the head.
        cache_config: vLLM's.
        split: whether the halves differ; else there is one, told twice.
        prefix: of the weights' names; holds the layer's index, which follows the target's.
    """

    def __init__(self, config: Any, cache_config: Any, split: bool, prefix: str) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.self_attn = LlamaAttention(
            config=config,
            hidden_size=hidden,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            cache_config=cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.parts = 2 if split else 1
        self.mlp = HeadMLP(hidden, config.intermediate_size, self.parts * hidden, f"{prefix}.mlp")
        self.post_attention_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features for the LM head and features to feed back, [T, hidden] each."""
        residual = x + self.self_attn(positions=positions, hidden_states=x)
        change = self.mlp(self.post_attention_layernorm(residual))
        parts = [residual + part for part in change.chunk(self.parts, dim=-1)]
        return parts[0], parts[-1]
