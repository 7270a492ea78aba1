"""Other dense decoder families, as target and as draft: Qwen2 (biases) and Qwen3 (q/k norms)."""

from __future__ import annotations

import shutil

import pytest
import torch
from vllm import SamplingParams

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


def make_pair(family: str, folder, tokenizer_folder) -> tuple[str, str]:
    """A target of random weights, and a draft that is the target with noise on its weights."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES, **HEADS[family])
    torch.manual_seed(20240213)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.normal_(std=0.5)
            elif weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
    paths = []
    for part, noise in (("target", 0.0), ("draft", 0.03)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + noise * torch.randn_like(weight))
        path = folder / family / part
        model.save_pretrained(path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer_folder / file, path / file)
        paths.append(str(path))
    return paths[0], paths[1]


@pytest.mark.parametrize("family", list(HEADS))
def test_greedy_equals_vanilla(family, tmp_path, pair, prompts, ouroboros, vanilla, tools):
    target, draft = make_pair(family, tmp_path, pair / "target")
    some = prompts[:12]
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    expected = tools.tokens_of(vanilla(some, greedy, model=target))
    assert len({tuple(ids) for ids in expected}) > 6, "the texts must differ to mean anything"
    llm = ouroboros(model=target, options={"draft_model": draft})
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, some, greedy)
    assert tools.tokens_of(outputs) == expected
    # drafts were accepted, and rejected
    assert used["accepted_from_draft"] > used["emitted_tokens"] // 10
    assert used["accepted_tokens"] < used["verified_nodes"]
    alone = tools.generate(llm, some[:4], greedy, one_by_one=True)
    assert tools.tokens_of(alone) == expected[:4]
