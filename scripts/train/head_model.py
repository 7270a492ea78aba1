"""Draft heads in plain PyTorch, as they are trained: EAGLE, FSPAD and what lies between them.

A head reads the target's feature f_i (its hidden state after the final norm at position i) and the
embedding e_{i+1} of the token that was chosen there, and predicts f_{i+1}. Parameters are named as
in the checkpoints of FSPAD's authors (arXiv 2408.15562).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pair_model import Attention, Mlp, causal_attention
from torch import Tensor, nn


class Arm(StrEnum):
    """Which head; each differs from `fspad` in what its name leaves out."""

    eagle = "eagle"
    eagle_wide = "eagle-wide"  # EAGLE with as many parameters as FSPAD
    feature_sampling = "feature-sampling"
    partial_alignment = "partial-alignment"
    fspad = "fspad"

    @property
    def samples_features(self) -> bool:
        """Whether the chosen token gates the feature."""
        return self in (Arm.feature_sampling, Arm.fspad)

    @property
    def splits_output(self) -> bool:
        """Whether features and confidence are aligned on vectors of their own."""
        return self in (Arm.partial_alignment, Arm.fspad)


@dataclass(frozen=True)
class HeadShape:
    """Sizes of a head, most of them the target's."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    arm: Arm = Arm.fspad

    @property
    def mlp_size(self) -> int:
        """Intermediate size of the decoder layer's MLP."""
        wider = self.arm == Arm.eagle_wide
        return self.intermediate_size * 7 // 3 if wider else self.intermediate_size


class Output(NamedTuple):
    """What a head predicts at each position, [rows, tokens, hidden] each."""

    logit: Tensor  # goes through the target's LM head
    feature: Tensor  # is fed back as the next feature


class Sampler(nn.Module):
    """Feature sampling: x0 = W [e; f] + b, then x0 + W_d (SiLU(W_g e) * W_u norm(x0))."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size)
        if shape.arm.samples_features:
            sizes = shape.hidden_size, shape.intermediate_size
            self.mlp = Mlp(*sizes, shape.hidden_size)
            self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.gated = shape.arm.samples_features

    def forward(self, embedding: Tensor, feature: Tensor) -> Tensor:
        x = self.fc(torch.cat((embedding, feature), -1))
        if self.gated:
            up = self.mlp.up_proj(self.post_attention_layernorm(x))
            x = x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(embedding)) * up)
        return x


class SelfAttention(Attention):
    """Causal attention; a position may see its last few predecessors as the head predicted them."""

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], earlier: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Attend, and append this pass's keys and values to those of the passes before it."""
        q, k, v = self.project(x, rope)
        earlier.append((k, v))
        out = causal_attention(q, k, v) if len(earlier) == 1 else _mixed_attention(q, earlier)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A decoder layer without an input norm; its MLP may have two outputs."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        outputs = 2 if shape.arm.splits_output else 1
        self.outputs = outputs
        self.self_attn = SelfAttention(shape)
        self.mlp = Mlp(shape.hidden_size, shape.mlp_size, outputs * shape.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], earlier: list[tuple[Tensor, Tensor]]
    ) -> Output:
        residual = x + self.self_attn(x, rope, earlier)
        change = self.mlp(self.post_attention_layernorm(residual))
        parts = [residual + part for part in change.chunk(self.outputs, -1)]
        return Output(parts[0], parts[-1])


class Head(nn.Module):
    """A draft head; embeddings and LM head are the target's and not part of it.

    It begins with little more than the feature it reads, so that its output is at home in the space
    of features from the first step on.

    Embeddings are often far smaller than features: a head that reads them as they are takes long
    to see its tokens. So it multiplies them by a scale, which checkpoints have in the weights.

    Args:
        shape: sizes.
        embedding_scale: what embeddings are multiplied by.
    """

    def __init__(self, shape: HeadShape, embedding_scale: float = 1.0) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("embedding_scale", torch.tensor(embedding_scale))
        self.fc = Sampler(shape)
        self.layers = nn.ModuleList([Layer(shape)])
        with torch.no_grad():
            nn.init.eye_(self.fc.fc.weight[:, shape.hidden_size :])
            for name, weight in self.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.zero_()

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        earlier: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Output:
        """Predictions for the position after each row.

        Args:
            embeddings: [rows, tokens, hidden], of consecutive tokens.
            features: [rows, tokens, hidden], of the position before each.
            earlier: keys and values of earlier passes over the same rows, the first of them with
                the target's features; this pass appends its own.
        """
        rope = self._rope(embeddings.shape[1], embeddings)
        passes = [] if earlier is None else earlier
        scaled = embeddings * self.embedding_scale
        return self.layers[0](self.fc(scaled, features), rope, passes)

    def weights(self) -> dict[str, Tensor]:
        """All weights of a head that reads embeddings as they are."""
        tensors = dict(self.state_dict())
        self._multiply(tensors, tensors.pop("embedding_scale"))
        return tensors

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Take what `weights` gave; the scale stays this head's.

        Raises:
            RuntimeError: they are those of another shape.
        """
        scaled = dict(tensors)
        self._multiply(scaled, 1 / self.embedding_scale)
        self.load_state_dict({**scaled, "embedding_scale": self.embedding_scale})

    def _multiply(self, tensors: dict[str, Tensor], factor: Tensor) -> None:
        """Replace what reads embeddings, multiplied by a factor."""
        for name in ("fc.fc.weight", "fc.mlp.gate_proj.weight"):
            if name in tensors:
                tensors[name] = tensors[name].clone()
                tensors[name][:, : self.shape.hidden_size] *= factor

    def _rope(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.shape.head_dim, 2, device=like.device)
        rates = self.shape.rope_theta ** (-half / self.shape.head_dim)
        angles = torch.arange(tokens, device=like.device)[:, None] * rates
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _mixed_attention(q: Tensor, passes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of the n-th pass, as in drafting.

    Position i sees the newest pass's key at i, the one's before it at i - 1 and so on, and the
    first pass's at all positions before those.
    """
    group = q.shape[1] // passes[0][0].shape[1]
    keys, values = (
        [tensors[which].repeat_interleave(group, 1) for tensors in passes] for which in (0, 1)
    )
    tokens, own = q.shape[2], len(passes) - 1
    mask = q.new_full((tokens, tokens), -torch.inf).triu(1 - own)
    scores = [q @ keys[0].transpose(2, 3) * q.shape[3] ** -0.5 + mask]
    shifted = []
    for back, (key, value) in enumerate(zip(keys[:0:-1], values[:0:-1], strict=True)):
        k, v = (F.pad(one, (0, 0, back, 0))[:, :, :tokens] for one in (key, value))
        score = (q * k).sum(-1, keepdim=True) * q.shape[3] ** -0.5
        missing = torch.arange(tokens, device=q.device) < back
        scores.append(score.masked_fill(missing[:, None], -torch.inf))
        shifted.append(v)
    weights = torch.cat(scores, -1).softmax(-1)
    out = weights[..., :tokens] @ values[0]
    for n, value in enumerate(shifted):
        out = out + weights[..., tokens + n, None] * value
    return out
