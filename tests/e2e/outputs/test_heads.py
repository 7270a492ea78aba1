"""A draft head changes the speed and nothing else: under stock vLLM and under Ouroboros.

The head is one of random weights, of which hardly any token is accepted: what is tested here is
what must not depend on them.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams

from ...unit.helpers.head_reference import head_config, random_head

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> str:
    """For the shipped target, with a vocabulary of 1024 tokens."""
    folder = tmp_path_factory.mktemp("head")
    torch.manual_seed(0)
    weights = {name: 0.3 * value for name, value in random_head(256, 704, 4, 2, 64).items()}
    weights["d2t"] = 3 * torch.arange(1024)
    save_file(weights, folder / "model.safetensors")
    config = head_config(weights, 64, vocab_size=4096, draft_vocab_size=1024)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batch 8", "batch 1"])
def test_greedy_equals_vanilla(one_by_one, head, prompts, vanilla, ouroboros, tools) -> None:
    llm = ouroboros(options={"draft_model": head})
    expected = tools.tokens_of(vanilla(prompts, GREEDY))
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, prompts, GREEDY, one_by_one)
    assert tools.tokens_of(outputs) == expected
    assert used["draft_forwards"] > 0
    assert used["verified_nodes"] > used["steps"]


def test_seeded_sampling_equals_vanilla(head, prompts, vanilla, ouroboros, tools) -> None:
    some = prompts[:16]
    params = [
        SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=24) for i in range(len(some))
    ]
    llm = ouroboros(options={"draft_model": head})
    expected = tools.tokens_of(vanilla(some, params))
    assert tools.tokens_of(tools.generate(llm, some, params)) == expected


def test_chunks_and_cached_prefixes(head, prompts, vanilla, ouroboros, tools) -> None:
    """Features of a prompt come in pieces, or not at all."""
    llm = ouroboros(
        options={"draft_model": head}, enable_prefix_caching=True, max_num_batched_tokens=64
    )
    expected = tools.tokens_of(vanilla(prompts, GREEDY))
    for _ in range(2):  # the second time prompts are cached
        assert tools.tokens_of(tools.generate(llm, prompts, GREEDY)) == expected


def test_trees_of_the_policy(head, prompts, vanilla, ouroboros, tools) -> None:
    """It drafts with this head now and then only, to see whether that pays by now."""
    llm = ouroboros(options={"draft_model": head, "adaptive": True})
    expected = tools.tokens_of(vanilla(prompts, GREEDY))
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, prompts, GREEDY)
    assert tools.tokens_of(outputs) == expected
    assert used["draft_forwards"] > 0


def test_preempted_requests(head, prompts, vanilla, ouroboros, tools) -> None:
    """Features of a request that was pushed aside are gone; its text is read again."""
    long = [ids for ids in prompts if 100 <= len(ids) <= 200][:12]
    llm = ouroboros(
        options={"draft_model": head}, num_gpu_blocks_override=20, max_num_batched_tokens=256
    )
    before = tools.metric(llm, "vllm:num_preemptions")
    expected = tools.tokens_of(vanilla(long, GREEDY))
    assert tools.tokens_of(tools.generate(llm, long, GREEDY)) == expected
    assert tools.metric(llm, "vllm:num_preemptions") > before


def test_stock_vllm_serves_the_same_head(head, prompts, vanilla, ouroboros, tools) -> None:
    method = {"method": "eagle", "model": head, "num_speculative_tokens": 3}
    llm = ouroboros(speculative_config=method, additional_config={})
    expected = tools.tokens_of(vanilla(prompts, GREEDY))
    assert tools.tokens_of(tools.generate(llm, prompts, GREEDY)) == expected
    assert tools.metric(llm, "vllm:spec_decode_num_drafts") > 0
