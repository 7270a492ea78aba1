"""LoRA adapters of random weights for the shipped target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

RANK = 8
ENGINE = {
    "enable_lora": True,
    # One more than the adapters of this test: on the CPU vLLM 0.32 adds the adapter in the last
    # slot to requests without one that share a batch (vLLM pull request 48421).
    "max_loras": 3,
    "max_lora_rank": RANK,
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 256,
    "long_prefill_token_threshold": 64,  # cuts most prompts
}


def make_adapter(folder: Path, config: dict, seed: int, more: bool = False) -> str:
    """An adapter of random weights for all linear layers; ``more`` adds both ends of the model."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys, vocab = config["num_key_value_heads"] * config["head_dim"], config["vocab_size"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    layers = range(config["num_hidden_layers"])
    shapes = {f"model.layers.{i}.{name}": size for i in layers for name, size in sizes.items()}
    if more:
        shapes["lm_head"] = (hidden, vocab)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.06

    weights = {}
    for name, (inputs, outputs) in shapes.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = random(RANK, inputs)
        weights[f"base_model.model.{name}.lora_B.weight"] = random(outputs, RANK)
    if more:
        weights["base_model.model.model.embed_tokens.lora_embedding_A"] = random(RANK, vocab)
        weights["base_model.model.model.embed_tokens.lora_embedding_B"] = random(hidden, RANK)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    modules = sorted({name.split(".lora_")[0].rsplit(".", 1)[-1] for name in weights})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="session")
def adapters(pair, tmp_path_factory) -> dict[str, LoRARequest | None]:
    folder = tmp_path_factory.mktemp("adapters")
    config = json.loads((pair / "target" / "config.json").read_text())
    linear = make_adapter(folder / "linear", config, seed=1)
    everywhere = make_adapter(folder / "everywhere", config, seed=2, more=True)
    return {
        "none": None,
        "linear": LoRARequest("linear", 1, linear),
        "everywhere": LoRARequest("everywhere", 2, everywhere),
    }
