"""Texts that are drawn without a seed have the distribution of the target.

A target and a draft model with random weights and eight tokens: all probabilities of a text of
three tokens are known exactly.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from forked_scripts import printed

VOCAB, LENGTH, PROMPT = 8, 3, [2, 5, 3]
MAX_TOKENS = 5  # more than are looked at, so that trees of three nodes fit behind the first
ALL = "ALL_PROMPTS" in os.environ
KINDS = {
    "temperature 1": ({}, 20_000 if ALL else 6_000),
    "top_p 0.8": ({"top_p": 0.8}, 10_000 if ALL else 3_000),
}
SMALL = {
    "draft_tokens": 2, "window_size": 2, "phrase_len": 2, "guess_set_size": 2, "num_suffixes": 1,
    "adaptive": False,
}  # fmt: skip

# The engine lives in the process of this script: it has all requests before its first step, so that
# its seed decides everything.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
import vllm_ouroboros

given = json.loads(sys.argv[1])
llm = LLM(**given["engine"])
result = {}
for name, (params, count) in given["kinds"].items():
    before = vllm_ouroboros.stats(llm)
    prompts = [{"prompt_token_ids": given["prompt"]}] * count
    params = SamplingParams(
        temperature=1, max_tokens=given["max_tokens"], ignore_eos=True, detokenize=False, **params
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    after = vllm_ouroboros.stats(llm)
    result[name] = {
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "accepted": after["accepted_from_draft"] - before["accepted_from_draft"],
    }
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Folders of a target and a draft model with weights so large that some tokens are likely."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}
    for name, seed in (("target", 1), ("draft", 2)):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=1, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
            bos_token_id=0, eos_token_id=1, tie_word_embeddings=False, initializer_range=0.3,
            dtype="float32",
        )  # fmt: skip
        folders[name] = str(tmp_path_factory.mktemp(name))
        LlamaForCausalLM(config).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def drawn(models, tools, tmp_path_factory) -> dict[str, dict]:
    """By kind of parameters, texts and the number of accepted tokens."""
    engine = {
        **tools.BASE,
        "model": models["target"],
        "skip_tokenizer_init": True,
        "max_model_len": 32,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "seed": 0,
        "speculative_config": {"model": tools.PROPOSER, "num_speculative_tokens": 8},
        "additional_config": {"ouroboros": {"draft_model": models["draft"], **SMALL}},
    }
    given = {"engine": engine, "kinds": KINDS, "prompt": PROMPT, "max_tokens": MAX_TOKENS}
    output = tmp_path_factory.mktemp("drawn") / "output"
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return json.loads(printed(SCRIPT, json.dumps(given), output=output, **alone)[-1])


def conditionals(folder: str, top_p: float) -> dict[tuple[int, ...], np.ndarray]:
    """By the beginning of a text, probabilities of its next token; with top_p as in vLLM: a token
    goes if it and all less probable ones together have at most 1 - top_p.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = {}
    for length in range(LENGTH):
        starts = list(itertools.product(range(VOCAB), repeat=length))
        with torch.no_grad():
            logits = model(torch.tensor([[*PROMPT, *start] for start in starts])).logits[:, -1]
        for start, row in zip(starts, logits.double().softmax(-1).numpy(), strict=True):
            order = np.argsort(row)
            gone = np.cumsum(row[order]) <= 1 - top_p
            row[order[gone]] = 0
            result[start] = row / row.sum()
    return result


def p_value(found: Counter, expected: dict[tuple[int, ...], float]) -> float:
    """Chi-square test; texts that are expected fewer than 5 times count as one."""
    total = sum(found.values())
    cells = [(found[text], total * p) for text, p in expected.items() if total * p >= 5]
    rare = (total - sum(n for n, _ in cells), total - sum(e for _, e in cells))
    if rare[1] < 5:  # too few even together: they join the last cell
        cells[-1] = (cells[-1][0] + rare[0], cells[-1][1] + rare[1])
    else:
        cells.append(rare)
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution_is_that_of_the_target(kind, drawn, models):
    params, count = KINDS[kind]
    known = conditionals(models["target"], params.get("top_p", 1.0))
    assert max(known[()]) > 2 / VOCAB, "all but uniform: drafts and noise hardly matter"
    expected = {
        text: float(np.prod([known[text[:i]][text[i]] for i in range(LENGTH)]))
        for text in itertools.product(range(VOCAB), repeat=LENGTH)
    }
    found = Counter(tuple(text[:LENGTH]) for text in drawn[kind]["texts"])
    assert sum(found.values()) == count
    assert drawn[kind]["accepted"] > count // 4
    assert p_value(found, expected) > 0.01
