"""Llama in plain PyTorch for CPU training: parameters named as in Hugging Face checkpoints.

The transformers model computes the same; this one attends 1.3 times as fast in training on two CPU
cores and decodes batches over one preallocated KV cache.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pair_data import BOS_ID, EOS_ID, SPECIAL_TOKENS, PairError
from safetensors.torch import load_file
from torch import Tensor, nn

from vllm_ouroboros.cli.weights import save_weights


@dataclass(frozen=True)
class Shape:
    """The entries of config.json that differ between the models of a pair."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int = 4096
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


TARGET_SHAPE = Shape(256, 6, 4, 2, 704)
DRAFT_SHAPE = Shape(128, 2, 2, 1, 352)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face's Llama."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention [rows, heads, tokens, head size] as two batched products.

    On two CPU cores and 170 tokens a training step is 1.3 times as fast as with PyTorch's fused
    kernel, whose backward pass is slow there.
    """
    rows, heads, tokens, size = q.shape
    group = heads // k.shape[1]
    mask = q.new_full((tokens, tokens), -torch.inf).triu(1).repeat(group, 1)
    q = q.reshape(-1, group * tokens, size)
    k, v = k.reshape(-1, tokens, size), v.reshape(-1, tokens, size)
    scores = torch.baddbmm(mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=size**-0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(rows, heads, tokens, size)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        query, key = (
            heads * shape.head_dim
            for heads in (shape.num_attention_heads, shape.num_key_value_heads)
        )
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [rows, heads, tokens, head size], turned by their places."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (
            p(x).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, *rope), rotate(k, *rope), v

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None, layer: int
    ) -> Tensor:
        q, k, v = self.project(x, rope)
        if cache is None:
            out = causal_attention(q, k, v)
        else:
            k, v, mask = cache.extend(layer, k, v)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, inputs: int, size: int, outputs: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(inputs, size, bias=False)
        self.up_proj = nn.Linear(inputs, size, bias=False)
        self.down_proj = nn.Linear(size, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Mlp(shape.hidden_size, shape.intermediate_size, shape.hidden_size)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], cache: Cache | None, layer: int
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Tokens to final hidden states; logits are `hidden @ embed_tokens.weight.T` (tied)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        exponents = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(
            torch.arange(shape.max_position_embeddings), shape.rope_theta**-exponents
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.embed_tokens(tokens)
        if cache is None:
            cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        else:
            positions = cache.advance(tokens.shape[1])
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        rope = (cos.to(x.dtype), sin.to(x.dtype))
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, cache, i)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)


class Cache:
    """Keys and values of a batch of left-padded rows in one preallocated tensor."""

    def __init__(self, model: Llama, padding: Tensor, capacity: int) -> None:
        shape, weight = model.shape, model.embed_tokens.weight
        size = (len(padding), shape.num_key_value_heads, capacity, shape.head_dim)
        self._kv = [weight.new_zeros(2, *size) for _ in range(shape.num_hidden_layers)]
        self._padding = padding  # [rows], padding tokens at the left of each row
        self._length = self._start = 0

    def advance(self, count: int) -> Tensor:
        """Makes room for `count` tokens and returns their positions [rows, count]."""
        self._start, self._length = self._length, self._length + count
        columns = torch.arange(self._start, self._length, device=self._padding.device)
        return (columns - self._padding[:, None]).clamp(min=0)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kv = self._kv[layer]
        kv[0, :, :, self._start : self._length] = k
        kv[1, :, :, self._start : self._length] = v
        columns = torch.arange(self._length, device=kv.device)
        queries = columns[self._start :, None]
        visible = (columns <= queries) & (columns >= self._padding[:, None, None])
        # A padding query sees itself, so that no softmax is empty.
        mask = (visible | (columns == queries)).unsqueeze(1)
        return kv[0, :, :, : self._length], kv[1, :, :, : self._length], mask

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows` (indices)."""
        self._padding = self._padding[rows]
        self._kv = [kv[:, rows] for kv in self._kv]


def save_model(model: Llama, directory: Path, tokenizer_json: str) -> None:
    """Writes a bfloat16 Hugging Face directory; each file is replaced atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    shape = asdict(model.shape)
    rope_theta = shape.pop("rope_theta")
    config = shape | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "tie_word_embeddings": True,
    }
    special = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "model_max_length": model.shape.max_position_embeddings,
    }
    texts = {
        "config.json": json.dumps(config, indent=2, sort_keys=True) + "\n",
        "generation_config.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
        "tokenizer.json": tokenizer_json,
    }
    for name, text in texts.items():
        replace_text(directory / name, text)
    state = {f"model.{k}": v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    partial = directory / "model.safetensors.part"
    save_weights(state, partial)
    partial.replace(directory / "model.safetensors")


def replace_text(path: Path, text: str) -> None:
    """Writes a text file so that readers see the old or the new one, never half of it."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)


def load_model(directory: Path) -> Llama:
    """Loads a Llama directory with tied embeddings into float32."""
    try:
        config = json.loads((directory / "config.json").read_text())
        state = load_file(directory / "model.safetensors")
    except (OSError, ValueError) as error:
        raise PairError(
            f"'{directory}' is no model directory ({error}); it needs config.json and "
            "model.safetensors as this script writes them"
        ) from error
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    model = Llama(Shape(**{key: config[key] for key in Shape.__dataclass_fields__}))
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in state.items()})
    return model
