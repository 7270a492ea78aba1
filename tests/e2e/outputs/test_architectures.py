"""Other dense decoder families, as target and as draft: Qwen2 (biases) and Qwen3 (q/k norms);
heads for them, under Ouroboros and under stock vLLM; and Gemma 4, whose last layers read the KV
cache of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams

from ...unit.helpers.head_reference import head_config, random_head

SIZES = {
    "vocab_size": 4096,
    "num_hidden_layers": 2,
    "intermediate_size": 160,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    # weights this large keep the two best logits of a step well apart
    "initializer_range": 0.3,
}
HEADS = {
    "Qwen2": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    "Qwen3": {
        "hidden_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}


GEMMA = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "global_head_dim": 32,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 48,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 4096,
}


def make_pair(family: str, folder, tokenizer_folder) -> tuple[str, str]:
    """A target of random weights, and a draft that is the target with noise on its weights."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES, **HEADS[family])
    model = random_model(getattr(transformers, f"{family}ForCausalLM"), config)
    paths = []
    for part, noise in (("target", 0.0), ("draft", 0.03)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + noise * torch.randn_like(weight))
        paths.append(save(model, folder / family / part, tokenizer_folder))
    return paths[0], paths[1]


def random_model(kind: type, config: object) -> torch.nn.Module:
    """A model of large weights, its norms and biases random as well."""
    torch.manual_seed(20240213)
    model = kind(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.normal_(std=0.5)
            elif weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
    return model


def save(model: torch.nn.Module, path: Path, tokenizer_folder: Path) -> str:
    """Write a model that shares the tokenizer of another one."""
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / file, path / file)
    return str(path)


def make_head(family: str, folder) -> str:
    """A head of random weights for the target of `make_pair`."""
    torch.manual_seed(0)
    sizes = HEADS[family]
    weights = random_head(sizes["hidden_size"], 160, 2, 1, 64)
    save_file(weights, folder / "model.safetensors")
    config = head_config(
        weights, 64, vocab_size=4096, model_type=family.lower(),
        architectures=[f"EagleFSPAD{family}ForCausalLM"],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module", params=list(HEADS))
def models(request, tmp_path_factory, pair) -> tuple[str, str, str]:
    """A family, its target and its draft."""
    folder = tmp_path_factory.mktemp("models")
    return (request.param, *make_pair(request.param, folder, pair / "target"))


GREEDY = SamplingParams(temperature=0.0, max_tokens=28, ignore_eos=True)


def test_greedy_equals_vanilla(models, prompts, ouroboros, vanilla, tools):
    _, target, draft = models
    some = prompts[:12]
    expected = tools.tokens_of(vanilla(some, GREEDY, model=target))
    assert len({tuple(ids) for ids in expected}) > 6, "the texts must differ to mean anything"
    llm = ouroboros(model=target, options={"draft_model": draft})
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, some, GREEDY)
    assert tools.tokens_of(outputs) == expected
    # drafts were accepted, and rejected
    assert used["accepted_from_draft"] > used["emitted_tokens"] // 10
    assert used["accepted_tokens"] < used["verified_nodes"]
    alone = tools.generate(llm, some[:4], GREEDY, one_by_one=True)
    assert tools.tokens_of(alone) == expected[:4]


def test_a_head_changes_no_text(models, tmp_path, prompts, ouroboros, vanilla, tools):
    """Of one family under Ouroboros, of the other under stock vLLM."""
    family, target, _ = models
    head, some = make_head(family, tmp_path), prompts[:12]
    expected = tools.tokens_of(vanilla(some, GREEDY, model=target))
    if family == "Qwen3":
        method = {"method": "eagle", "model": head, "num_speculative_tokens": 3}
        llm = ouroboros(model=target, speculative_config=method, additional_config={})
        drafts = tools.metric(llm, "vllm:spec_decode_num_drafts")
        assert tools.tokens_of(tools.generate(llm, some, GREEDY)) == expected
        assert tools.metric(llm, "vllm:spec_decode_num_drafts") > drafts
        return
    llm = ouroboros(model=target, options={"draft_model": head})
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, some, GREEDY)
    assert tools.tokens_of(outputs) == expected
    assert used["draft_forwards"] > 0


def test_layers_that_read_another_layers_cache(tmp_path, pair, prompts, ouroboros, vanilla, tools):
    """Phrases alone; prompts arrive in chunks beside trees, and alone."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(**{**SIZES, **GEMMA, "tie_word_embeddings": True})
    target = save(random_model(Gemma4ForCausalLM, config), tmp_path, pair / "target")
    some = prompts[:12]
    expected = tools.tokens_of(vanilla(some, GREEDY, model=target))
    assert len({tuple(ids) for ids in expected}) > 6, "the texts must differ to mean anything"
    llm = ouroboros(model=target, options={"draft_model": None})
    with tools.Used(llm) as used:
        for batch in (some, some[:4]):  # the second time phrases know the text
            assert tools.tokens_of(tools.generate(llm, batch, GREEDY)) == expected[: len(batch)]
    assert used["accepted_from_suffix"] > used["emitted_tokens"] // 10
    assert used["accepted_tokens"] < used["verified_nodes"]
