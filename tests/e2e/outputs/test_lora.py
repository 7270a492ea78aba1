"""Adapters on the target: drafts come from a draft model without any, the text is the adapter's."""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from ..adapters import ENGINE

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


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
    llm = vanilla.engine(**ENGINE)
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
