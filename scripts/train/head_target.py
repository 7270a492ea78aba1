"""What a draft head takes from its target: features of texts, embeddings and LM head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from head_loss import Batch, Teacher
from head_model import Arm, Head, HeadShape
from pair_samples import Samples
from torch import Tensor


def head_shape(config: Any, arm: Arm) -> HeadShape:
    """Sizes of a head for a target of this transformers configuration."""
    rope = getattr(config, "rope_parameters", None) or {}
    heads = config.num_attention_heads
    return HeadShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rms_norm_eps=config.rms_norm_eps,
        arm=arm,
    )


def fast_dtype(device: str) -> torch.dtype:
    """What a device multiplies matrices in fastest: a CPU without AMX takes float32."""
    tiles = device != "cpu" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if tiles else torch.float32


def load_target(path: str, device: str) -> Any:
    """The target in `fast_dtype`, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=fast_dtype(device))
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def begin_as_last_layer(head: Head, model: Any) -> None:
    """Let a head look at features as the target's last layer looks at what it reads.

    What the head's layer adds to its input is zero at first and stays so.
    """
    layer, own = model.model.layers[-1], head.layers[0]
    scale = layer.input_layernorm.weight / model.model.norm.weight  # features have the final norm's
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer.self_attn, name).weight * scale
        getattr(own.self_attn, name).weight.copy_(weight)
    own.post_attention_layernorm.weight.copy_(layer.post_attention_layernorm.weight)
    for name in ("gate_proj", "up_proj"):
        weight = getattr(layer.mlp, name).weight
        getattr(own.mlp, name).weight[: len(weight)].copy_(weight)


def frequent_tokens(samples: Samples, vocabulary: int, size: int) -> Tensor:
    """Ids int64 [size], ascending, of the tokens that are most frequent in answers."""
    counts = np.zeros(vocabulary, np.int64)
    for i, given in enumerate(samples.prompt_lengths.tolist()):
        np.add.at(counts, samples[i][given:], 1)
    order = np.argsort(-counts, kind="stable")[:size]
    return torch.from_numpy(np.sort(order))


def teacher_of(model: Any, ids: Tensor) -> Teacher:
    """The frozen ends of a target, for a head that drafts the tokens ``ids``."""
    embeddings, lm_head = (
        layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    ids = ids.to(embeddings.device)
    return Teacher(embeddings, lm_head[ids].contiguous(), ids)


class Features:
    """Features of all tokens of some samples, in a file of bfloat16 rows.

    Args:
        path: the file; ``write`` goes on where it ends.
        samples: the texts.
        hidden: sizes of a feature.
    """

    def __init__(self, path: Path, samples: Samples, hidden: int) -> None:
        self.path, self.samples, self.hidden = path, samples, hidden

    @property
    def written(self) -> int:
        """Tokens that have features."""
        size = self.path.stat().st_size if self.path.exists() else 0
        return size // (2 * self.hidden)

    @torch.no_grad()
    def write(self, model: Any, batch_tokens: int) -> None:
        """Run the target over the texts that have none yet, so many tokens at a time."""
        samples = self.samples
        first = int(np.searchsorted(samples.offsets, self.written, side="right")) - 1
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.truncate(int(samples.offsets[first]) * 2 * self.hidden)
            file.seek(0, 2)
            while first < len(samples):
                rows = [samples[first]]
                while first + len(rows) < len(samples):
                    longest = max(len(row) for row in [*rows, samples[first + len(rows)]])
                    if longest * (len(rows) + 1) > batch_tokens:
                        break
                    rows.append(samples[first + len(rows)])
                hidden = model.model(input_ids=_padded(rows).to(model.device)).last_hidden_state
                hidden = hidden.to("cpu", torch.bfloat16)
                for row, states in zip(rows, hidden, strict=True):
                    file.write(states[: len(row)].view(torch.int16).numpy().tobytes())
                first += len(rows)

    def batch(self, indices: list[int], device: str, *, prompts: bool = False) -> Batch:
        """Some texts with their features; predictions of prompts count if ``prompts``."""
        samples = self.samples
        rows = [samples[i] for i in indices]
        shape = -1, self.hidden
        stored = np.memmap(self.path, np.int16, "r").reshape(shape)
        tokens = _padded(rows)
        features = torch.zeros(*tokens.shape, self.hidden)
        counts = torch.zeros(tokens.shape, dtype=torch.bool)
        for n, (i, row) in enumerate(zip(indices, rows, strict=True)):
            start = int(samples.offsets[i])
            states = torch.from_numpy(np.array(stored[start : start + len(row)]))
            features[n, : len(row)] = states.view(torch.bfloat16)
            given = 0 if prompts else int(samples.prompt_lengths[i])
            counts[n, max(given, 1) : len(row)] = True
        return Batch(tokens.to(device), features.to(device), counts[:, 1:].to(device))


def _padded(rows: list[np.ndarray]) -> Tensor:
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = torch.from_numpy(row.astype(np.int64))
    return tokens
