"""Adapters on the target: drafts come from a draft model without any, the text is the adapter's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

RANK = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
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


@pytest.fixture(scope="module")
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


def generate(llm, prompts, requests: list[LoRARequest | None]) -> list:
    """Outputs of prompts, each with an adapter or none."""
    given = [{"prompt_token_ids": ids} for ids in prompts]
    return llm.generate(given, GREEDY, lora_request=requests, use_tqdm=False)


@pytest.fixture(scope="module")
def some(prompts):
    return prompts[:12]


@pytest.fixture(scope="module")
def expected(adapters, some, vanilla, tools) -> dict[str, list[list[int]]]:
    """What each adapter writes in vanilla vLLM, one adapter at a time."""
    llm = vanilla.engines.get(**{**tools.BASE, **ENGINE})
    return {
        name: tools.tokens_of(generate(llm, some, [adapter] * len(some)))
        for name, adapter in adapters.items()
    }


def test_the_adapters_matter(expected):
    for one, other in (("none", "linear"), ("none", "everywhere"), ("linear", "everywhere")):
        same = sum(a == b for a, b in zip(expected[one], expected[other], strict=True))
        assert same <= len(expected[one]) // 4


@pytest.mark.parametrize("name", ["none", "linear", "everywhere"])
def test_equals_vanilla(name, ouroboros, adapters, some, expected, tools):
    llm = ouroboros(**ENGINE)
    with tools.Used(llm) as used:
        outputs = generate(llm, some, [adapters[name]] * len(some))
    assert tools.tokens_of(outputs) == expected[name]
    assert used["accepted_from_draft"] > 0
    alone = [generate(llm, [ids], [adapters[name]])[0] for ids in some[:4]]
    assert tools.tokens_of(alone) == expected[name][:4]


def test_adapters_in_one_batch(ouroboros, adapters, some, expected, tools):
    names = [list(adapters)[i % 3] for i in range(len(some))]
    llm = ouroboros(**ENGINE)
    with tools.Used(llm) as used:
        outputs = generate(llm, some, [adapters[name] for name in names])
    assert tools.tokens_of(outputs) == [expected[name][i] for i, name in enumerate(names)]
    assert used["accepted_tokens"] > 0


def test_cached_prefixes(ouroboros, adapters, some, expected, tools):
    """A cached prefix serves its own adapter only, and costs no exactness."""
    long = [i for i, ids in enumerate(some) if len(ids) > 2 * tools.BASE["block_size"]]
    assert len(long) >= 4
    llm = ouroboros(**ENGINE)
    llm.reset_prefix_cache()
    for cached in (False, True):
        for name, adapter in adapters.items():
            outputs = generate(llm, [some[i] for i in long], [adapter] * len(long))
            assert tools.tokens_of(outputs) == [expected[name][i] for i in long]
            assert all((output.num_cached_tokens > 0) == cached for output in outputs)
