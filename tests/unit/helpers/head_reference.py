"""The formulas of arXiv 2408.15562, written down one token at a time, and heads to try them on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

EPS, THETA = 1e-5, 10000.0


def random_head(
    hidden: int = 32, size: int = 48, heads: int = 4, kv_heads: int = 2, head_dim: int = 8,
    *, sampling: bool = True, split: bool = True,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Tensors of a checkpoint, float32."""
    shapes = {
        "fc.fc.weight": (hidden, 2 * hidden),
        "fc.fc.bias": (hidden,),
        "layers.0.self_attn.q_proj.weight": (heads * head_dim, hidden),
        "layers.0.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
        "layers.0.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, heads * head_dim),
        "layers.0.mlp.gate_proj.weight": (size, hidden),
        "layers.0.mlp.up_proj.weight": (size, hidden),
        "layers.0.mlp.down_proj.weight": ((1 + split) * hidden, size),
        "layers.0.post_attention_layernorm.weight": (hidden,),
    }
    if sampling:
        shapes |= {
            "fc.mlp.gate_proj.weight": (size, hidden),
            "fc.mlp.up_proj.weight": (size, hidden),
            "fc.mlp.down_proj.weight": (hidden, size),
            "fc.post_attention_layernorm.weight": (hidden,),
        }
    return {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}


def head_config(weights: dict[str, torch.Tensor], head_dim: int = 8, **more: Any) -> dict[str, Any]:
    """The ``config.json`` of such a checkpoint."""
    hidden = len(weights["fc.fc.bias"])
    size = len(weights["layers.0.mlp.gate_proj.weight"])
    return {
        "architectures": ["EagleFSPADLlamaForCausalLM"], "model_type": "llama",
        "hidden_size": hidden, "intermediate_size": size, "num_hidden_layers": 1,
        "sampler_size": size if "fc.mlp.up_proj.weight" in weights else None,
        "split_output": len(weights["layers.0.mlp.down_proj.weight"]) == 2 * hidden,
        "num_attention_heads": len(weights["layers.0.self_attn.q_proj.weight"]) // head_dim,
        "num_key_value_heads": len(weights["layers.0.self_attn.k_proj.weight"]) // head_dim,
        "head_dim": head_dim, "hidden_act": "silu", "max_position_embeddings": 2048,
        "rms_norm_eps": EPS, "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
        "vocab_size": 64, "tie_word_embeddings": False, "dtype": "float32",
    } | more  # fmt: skip


def reference(
    weights: dict[str, torch.Tensor],
    e: torch.Tensor,
    f: torch.Tensor,
    head_dim: int = 8,
    eps: float = EPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(h_logit, h_reg), float64 [T, hidden] each, for embeddings and features [T, hidden]."""
    w = {name: value.double() for name, value in weights.items()}
    e, f, tokens = e.double(), f.double(), len(e)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    x = torch.cat((e, f), -1) @ w["fc.fc.weight"].T + w["fc.fc.bias"]
    if "fc.mlp.gate_proj.weight" in w:
        gate = F.silu(e @ w["fc.mlp.gate_proj.weight"].T)
        value = norm(x, w["fc.post_attention_layernorm.weight"]) @ w["fc.mlp.up_proj.weight"].T
        x = x + (gate * value) @ w["fc.mlp.down_proj.weight"].T
    angle = torch.arange(tokens).double()[:, None] * THETA ** (
        -torch.arange(0, head_dim, 2).double() / head_dim
    )

    def turned(y: torch.Tensor) -> torch.Tensor:
        first, second = y.view(tokens, -1, head_dim).chunk(2, -1)
        c, s = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    layer = "layers.0."
    q, k, v = (x @ w[f"{layer}self_attn.{n}_proj.weight"].T for n in "qkv")
    q, k, v = turned(q), turned(k), v.view(tokens, -1, head_dim)
    group = q.shape[1] // k.shape[1]
    attended = torch.zeros_like(q)
    for i in range(tokens):
        for h in range(q.shape[1]):
            scores = k[: i + 1, h // group] @ q[i, h] / head_dim**0.5
            attended[i, h] = scores.softmax(0) @ v[: i + 1, h // group]
    r = x + attended.reshape(tokens, -1) @ w[f"{layer}self_attn.o_proj.weight"].T
    m = norm(r, w[f"{layer}post_attention_layernorm.weight"])
    gated = F.silu(m @ w[f"{layer}mlp.gate_proj.weight"].T)
    out = (gated * (m @ w[f"{layer}mlp.up_proj.weight"].T)) @ w[f"{layer}mlp.down_proj.weight"].T
    hidden = r.shape[-1]
    return r + out[:, :hidden], r + out[:, -hidden:]
