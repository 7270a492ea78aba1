"""Weights of an inflated Llama model, one tensor at a time (see scripts/inflate/inflate.py)."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from inflate_dims import Dims, InflateError, Widening, kv_copies
from safetensors import safe_open

SPREAD = 0.02  # standard deviation of the weights that fill up
# One channel that the source does not use holds CONSTANT for every token. Its square is lost in the
# norms' float32 sums, and the last norm multiplies it back to 1 / rms, so that the logit of an
# added token is about -PENALTY / rms: softmax makes it 0.
CONSTANT = 2.0**-40
PENALTY = 2.0**20

Index = tuple[torch.Tensor, torch.Tensor]  # places in the new tensor [n], in the source's [n]


class Source:
    """A Hugging Face directory with safetensors, read tensor by tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.config: dict = json.loads((directory / "config.json").read_text())
            index = directory / "model.safetensors.index.json"
            self._files: dict[str, str] = {}
            if index.exists():
                self._files = json.loads(index.read_text())["weight_map"]
            elif not (directory / "model.safetensors").exists():
                raise FileNotFoundError("no model.safetensors")
        except (OSError, ValueError, KeyError) as error:
            raise InflateError(
                f"--source: '{directory}' is no model directory ({error}); it needs config.json "
                "and safetensors, and a pair has them in target/ and draft/"
            ) from error
        self.dims = Dims.from_config(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        path = self.directory / self._files.get(name, "model.safetensors")
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)


class Inflation:
    """Makes the tensors of the new model.

    Every entry is either the source's, or zero where it would change the residual stream, or
    random: rows of added heads and feed-forward channels, columns that read channels which the
    norms set to zero, and added layers but for their output projections. A tensor depends on its
    name, its shape and `seed` alone.
    """

    def __init__(self, source: Source, dims: Dims, dtype: torch.dtype, seed: int = 0) -> None:
        self.source, self.dims, self.dtype, self.seed = source, dims, dtype, seed
        old = source.dims
        self.widening = Widening.of(old.hidden_size, dims.hidden_size)
        queries, values = head_rows(old, dims)
        hidden = first(old.hidden_size)
        places = torch.arange(old.hidden_size * self.widening.copies)
        copies = (places, places % old.hidden_size)
        ffn = first(old.intermediate_size)
        self._places: dict[str, tuple[Index, Index]] = {  # rows, columns
            "embed_tokens": (first(old.vocab_size), copies),
            "lm_head": (first(old.vocab_size), copies),
            "q_proj": (queries, hidden),
            "k_proj": (values, hidden),
            "v_proj": (values, hidden),
            "o_proj": (copies, queries),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (copies, ffn),
        }

    @property
    def norm_eps(self) -> float:
        return self.source.config.get("rms_norm_eps", 1e-6) / self.widening.zeros

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor `name` [shape], of the inflation's dtype."""
        parts = name.split(".")
        kind = parts[-2]
        added = parts[1] == "layers" and int(parts[2]) >= self.source.dims.num_hidden_layers
        if kind.endswith("norm"):
            return self._norm(name, shape, added)
        if kind in ("o_proj", "down_proj", "embed_tokens", "lm_head"):
            result = torch.zeros(shape, dtype=self.dtype)
        else:
            result = self._random(name, shape)
        if added:
            return result
        (rows, old_rows), (columns, old_columns) = self._places[kind]
        old = self.source.tensor(name).to(self.dtype)
        result[rows[:, None], columns] = old[old_rows[:, None], old_columns]
        if kind in ("embed_tokens", "lm_head"):
            self._add_tokens(result, name)
        return result

    def _norm(self, name: str, shape: tuple[int, ...], added: bool) -> torch.Tensor:
        if added:
            return torch.ones(shape, dtype=self.dtype)
        result = torch.zeros(shape, dtype=self.dtype)
        scale = self.widening.norm_scale
        result[: self.widening.old] = self.source.tensor(name).to(self.dtype) * scale
        if name == "model.norm.weight" and self._adds_tokens:
            result[self.widening.free_channel] = scale / CONSTANT
        return result

    @property
    def _adds_tokens(self) -> bool:
        return self.dims.vocab_size > self.source.dims.vocab_size

    def _add_tokens(self, result: torch.Tensor, name: str) -> None:
        """Fills the rows of added tokens so that none of them is ever chosen."""
        if not self._adds_tokens:
            return
        known, old = self.source.dims.vocab_size, self.widening.old
        channel = self.widening.free_channel
        result[known:, :old] = self._random(name, (self.dims.vocab_size - known, old))
        if "embed_tokens" in name:
            result[:known, channel] = CONSTANT
        if "lm_head" in name or self.dims.tie_word_embeddings:
            result[known:, channel] = -PENALTY

    def _random(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.empty(shape, dtype=self.dtype).normal_(0.0, SPREAD, generator=generator)


def first(count: int) -> Index:
    """The first places, in order."""
    return torch.arange(count), torch.arange(count)


def head_rows(old: Dims, new: Dims) -> tuple[Index, Index]:
    """Rows of query heads and of KV heads.

    Query head h reads KV head h // group, in the source as in the new model, so heads that shared
    a KV head must stand together again, or each with a copy of it.
    """
    copies = kv_copies(old, new)
    queries = []
    for head in range(old.num_attention_heads):
        kv_head, member = divmod(head, old.group)
        place = kv_head * copies + member // new.group
        queries.append((place * new.group + member % new.group, head))
    values = [(place, place // copies) for place in range(old.num_key_value_heads * copies)]
    return _rows(queries, old.head_dim), _rows(values, old.head_dim)


def _rows(heads: list[tuple[int, int]], head_dim: int) -> Index:
    places = torch.tensor(heads)[:, :, None] * head_dim + torch.arange(head_dim)
    return places[:, 0].flatten(), places[:, 1].flatten()
