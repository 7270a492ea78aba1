"""A draft head for an inflated target, of the size that goes with it and with the same drafts.

The inflated target's features are the source's, then zeros; embeddings stand there once or several
times. So the head reads the first channels of both, its residual stream keeps zeros in the others,
and the norms, which see a smaller mean square, are rescaled. All that is added is zero.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from inflate_dims import Dims, InflateError
from inflate_weights import Index, first, head_rows
from safetensors.torch import load_file

from vllm_ouroboros.cli.weights import save_weights


def inflate_head(source: Path, old: Dims, new: Dims, dtype: torch.dtype, out: Path) -> None:
    """Write the head of a target of size ``old`` for that target at size ``new``.

    Args:
        source: a head as `train_head.py export` writes it.
        old: sizes of the source's target.
        new: sizes of the inflated target.
        dtype: of the weights.
        out: directory, made.

    Raises:
        InflateError: it is no such head.
    """
    try:
        config = json.loads((source / "config.json").read_text())
        tensors = load_file(source / "model.safetensors")
    except (OSError, ValueError) as error:
        raise InflateError(
            f"--head: '{source}' is no head ({error}); name a directory with config.json and "
            "model.safetensors"
        ) from None
    if config.get("hidden_size") != old.hidden_size:
        raise InflateError(
            f"--head: '{source}' reads features of {config.get('hidden_size')} and the source's "
            f"target has {old.hidden_size}; name a head of this target"
        )
    ids = tensors.pop("d2t", None)
    if ids is None:  # it must not draft a token that was added
        ids = torch.zeros(old.vocab_size, dtype=torch.long)
    widths = {
        key: config[key] * new.intermediate_size // old.intermediate_size
        for key in ("intermediate_size", "sampler_size")
        if config.get(key)
    }
    grow = _Growth(old, new, config, widths)
    try:
        result = {name: grow.tensor(name, value).to(dtype) for name, value in tensors.items()}
    except KeyError as error:
        raise InflateError(f"--head: '{source}' has a tensor {error} that no head has") from None
    result["d2t"] = ids
    out.mkdir(parents=True)
    contiguous = {name: value.contiguous() for name, value in result.items()}
    save_weights(contiguous, out / "model.safetensors")
    facts = config | widths | {
        "hidden_size": new.hidden_size,
        "num_attention_heads": new.num_attention_heads,
        "num_key_value_heads": new.num_key_value_heads,
        "vocab_size": new.vocab_size,
        "draft_vocab_size": len(ids),
        "rms_norm_eps": config["rms_norm_eps"] * old.hidden_size / new.hidden_size,
        "dtype": str(dtype).removeprefix("torch."),
        "inflated_from": {
            "source": "/".join(source.resolve().parts[-2:]), "hidden_size": old.hidden_size,
        },
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


class _Growth:
    """Where the rows and columns of each tensor go."""

    def __init__(self, old: Dims, new: Dims, config: dict, widths: dict[str, int]) -> None:
        self.scale = math.sqrt(old.hidden_size / new.hidden_size)
        hidden = first(old.hidden_size), new.hidden_size
        both = _twice(old.hidden_size, new.hidden_size), 2 * new.hidden_size
        queries, values = head_rows(old, new)
        query = queries, new.num_attention_heads * new.head_dim
        value = values, new.num_key_value_heads * new.head_dim
        inner, sampler = (
            (first(config[key]), widths[key]) if key in widths else hidden
            for key in ("intermediate_size", "sampler_size")
        )
        self.places = {
            "fc.fc": (hidden, both),
            "fc.mlp.gate_proj": (sampler, hidden),
            "fc.mlp.up_proj": (sampler, hidden),
            "fc.mlp.down_proj": (hidden, sampler),
            "layers.0.self_attn.q_proj": (query, hidden),
            "layers.0.self_attn.k_proj": (value, hidden),
            "layers.0.self_attn.v_proj": (value, hidden),
            "layers.0.self_attn.o_proj": (hidden, query),
            "layers.0.mlp.gate_proj": (inner, hidden),
            "layers.0.mlp.up_proj": (inner, hidden),
            "layers.0.mlp.down_proj": (both if config.get("split_output") else hidden, inner),
            "fc.post_attention_layernorm": (hidden, None),
            "layers.0.post_attention_layernorm": (hidden, None),
        }

    def tensor(self, name: str, old: torch.Tensor) -> torch.Tensor:
        """The tensor ``name`` for the new sizes; raises KeyError for one that no head has."""
        layer, _, kind = name.rpartition(".")
        ((places, sources), size), columns = self.places[layer]
        if kind == "bias" or columns is None:
            result = old.new_zeros(size)
            result[places] = old[sources]
            return result * self.scale if columns is None else result
        (column_places, column_sources), width = columns
        result = old.new_zeros(size, width)
        result[places[:, None], column_places] = old[sources[:, None], column_sources]
        return result


def _twice(old: int, new: int) -> Index:
    """Two vectors one behind the other."""
    places = torch.cat([torch.arange(old), new + torch.arange(old)])
    return places, torch.arange(2 * old)
