"""A draft head changes the speed and nothing else: under stock vLLM and under Ouroboros.

Most of it is tested with a head of random weights, of which hardly any token is accepted, and the
rest with the shipped one, of which many are.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams

from vllm_ouroboros.cli.inputs import PAIR

from ...unit.helpers.head_reference import head_config, random_head

TRAINED = str(PAIR / "head")
GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


@pytest.fixture(scope="module")
def some(prompts) -> list[list[int]]:
    return prompts[:16]


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
def test_greedy_equals_vanilla(one_by_one, head, some, vanilla, ouroboros, tools) -> None:
    llm = ouroboros(options={"draft_model": head})
    expected = tools.tokens_of(vanilla(some, GREEDY))
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, some, GREEDY, one_by_one)
    assert tools.tokens_of(outputs) == expected
    assert used["draft_forwards"] > 0
    assert used["verified_nodes"] > used["steps"]


def test_seeded_sampling_equals_vanilla(head, some, vanilla, ouroboros, tools) -> None:
    params = [
        SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=24) for i in range(len(some))
    ]
    llm = ouroboros(options={"draft_model": head})
    expected = tools.tokens_of(vanilla(some, params))
    assert tools.tokens_of(tools.generate(llm, some, params)) == expected


def test_chunks_and_cached_prefixes(head, some, vanilla, ouroboros, tools) -> None:
    """Features of a prompt come in pieces, or not at all."""
    llm = ouroboros(
        options={"draft_model": head}, enable_prefix_caching=True, max_num_batched_tokens=64
    )
    expected = tools.tokens_of(vanilla(some, GREEDY))
    for _ in range(2):  # the second time prompts are cached
        assert tools.tokens_of(tools.generate(llm, some, GREEDY)) == expected


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


# -- the shipped head --------------------------------------------------------------------------


def test_the_shipped_head_is_worth_its_forwards(some, vanilla, ouroboros, tools) -> None:
    """Of its chains of three tokens nearly one is accepted on average, at least.

    A cached prefix costs hardly any of that: the head's own KV comes with the blocks.
    """
    llm = ouroboros(
        options={"draft_model": TRAINED, "draft_tokens": 3, "pool_scope": "request"},
        enable_prefix_caching=True,
    )
    llm.reset_prefix_cache()
    expected = tools.tokens_of(vanilla(some, GREEDY))
    accepted = []
    for _ in range(2):
        with tools.Used(llm) as used:
            outputs = tools.generate(llm, some, GREEDY, one_by_one=True)
        assert tools.tokens_of(outputs) == expected
        assert used["accepted_from_draft"] > used["steps"] * 0.8
        accepted.append(used["accepted_from_draft"])
    assert accepted[1] > 0.9 * accepted[0]


def test_trees_of_the_policy(some, vanilla, ouroboros, tools) -> None:
    """Whatever it makes of the head: how much that drafts depends on what forwards cost here."""
    llm = ouroboros(options={"draft_model": TRAINED, "adaptive": True})
    expected = tools.tokens_of(vanilla(some, GREEDY))
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, some, GREEDY)
    assert tools.tokens_of(outputs) == expected
    assert used["draft_forwards"] > 0


def test_stock_vllm_accepts_what_the_shipped_head_drafts(some, vanilla, ouroboros, tools) -> None:
    method = {"method": "eagle", "model": TRAINED, "num_speculative_tokens": 3}
    llm = ouroboros(speculative_config=method, additional_config={})
    expected = tools.tokens_of(vanilla(some, GREEDY))
    names = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens"
    before = [tools.metric(llm, name) for name in names]
    assert tools.tokens_of(tools.generate(llm, some, GREEDY)) == expected
    drafts, accepted = (
        tools.metric(llm, name) - was for name, was in zip(names, before, strict=True)
    )
    assert accepted > 0.5 * drafts > 0
