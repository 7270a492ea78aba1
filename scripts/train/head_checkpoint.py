"""Checkpoints of draft heads: the layout of FSPAD's authors, with an id map for short vocabularies.

Feature sampling is ``fc.fc.*``, ``fc.mlp.*`` and ``fc.post_attention_layernorm.weight``, the
decoder layer ``layers.0.*``. ``d2t`` int64 [draft vocab] is a target id less its place, as in
EAGLE-3.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from head_model import Head
from pair_data import PairError
from safetensors.torch import load_file

from vllm_ouroboros.cli.weights import save_weights


def save_head(head: Head, target: Any, ids: np.ndarray, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` in bfloat16.

    Args:
        head: the trained head.
        target: its target, as transformers loads it.
        ids: int64 [draft vocab], tokens that may be drafted, ascending.
        out: directory, made where there is none.
    """
    arm, config = head.shape.arm, target.config
    tensors = {name: value.to(torch.bfloat16) for name, value in head.weights().items()}
    if len(ids) < config.vocab_size:
        tensors["d2t"] = torch.from_numpy(ids - np.arange(len(ids)))
    family = config.architectures[0].removesuffix("ForCausalLM")
    facts = {
        "architectures": [f"EagleFSPAD{family}ForCausalLM"],
        "model_type": config.model_type,
        "hidden_size": head.shape.hidden_size,
        "intermediate_size": head.shape.mlp_size,
        "sampler_size": head.shape.intermediate_size if arm.samples_features else None,
        "split_output": arm.splits_output,
        "num_hidden_layers": 1,
        "num_attention_heads": head.shape.num_attention_heads,
        "num_key_value_heads": head.shape.num_key_value_heads,
        "head_dim": head.shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": head.shape.rms_norm_eps,
        "rope_parameters": {"rope_theta": head.shape.rope_theta, "rope_type": "default"},
        "vocab_size": config.vocab_size,
        "draft_vocab_size": len(ids),
        "tie_word_embeddings": False,
        "bias": True,
        "dtype": "bfloat16",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_weights(contiguous, out / "model.safetensors")


def load_head(head: Head, path: Path) -> None:
    """Take the weights of a head that `save_head` wrote.

    Raises:
        PairError: it has another shape.
    """
    tensors = load_file(path / "model.safetensors")
    tensors.pop("d2t", None)
    try:
        head.load_weights(tensors)
    except RuntimeError as error:
        raise PairError(f"--start: '{path}' is another kind of head: {error}") from None
