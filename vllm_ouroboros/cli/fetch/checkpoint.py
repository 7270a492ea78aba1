"""A Llama model from a GGUF file as a Hugging Face checkpoint in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_ouroboros.cli.fetch.tokenizer import write_tokenizer
from vllm_ouroboros.cli.inputs import InputError
from vllm_ouroboros.cli.weights import save_weights

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf: Path, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files into a folder.

    Raises:
        InputError: the file is not a Llama model.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise InputError(f"{gguf.name}: is not a Llama model in GGUF")
    tensors = weights(reader.tensors, fields)
    save_weights(tensors, folder / "model.safetensors")
    config = configuration(fields, tied="lm_head.weight" not in tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    write_tokenizer(fields, folder)


def configuration(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """``config.json`` of a model, from the metadata of its GGUF file."""
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    token = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    heads = llama["attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("attention.head_count_kv", heads),
        "head_dim": llama["embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": llama["context_length"],
        "rms_norm_eps": float(f"{llama['attention.layer_norm_rms_epsilon']:.4g}"),  # a float32
        "rope_parameters": {"rope_theta": llama["rope.freq_base"], "rope_type": "default"},
        "vocab_size": llama["vocab_size"],
        "bos_token_id": token["bos_token_id"],
        "eos_token_id": token["eos_token_id"],
        "pad_token_id": token["padding_token_id"],
        "tie_word_embeddings": tied,
        "dtype": "bfloat16",
    }


def weights(tensors: Any, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights by their Hugging Face names, dequantized, bfloat16."""
    from gguf import dequantize

    heads = fields["llama.attention.head_count"]
    rotated = {"attn_q": heads, "attn_k": fields.get("llama.attention.head_count_kv", heads)}
    found = {}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{LAYER[parts[2]]}"
            if parts[2] in rotated:
                values = halves_of_heads(values, rotated[parts[2]])
        else:
            name = OUTSIDE[parts[0]]
        found[f"{name}.weight"] = torch.from_numpy(np.array(values, np.float32)).bfloat16()
    return found


def halves_of_heads(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection [heads * D, hidden], each head's rotary pairs as halves.

    GGUF keeps the two rows that rotate together beside each other, Hugging Face D / 2 apart.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
