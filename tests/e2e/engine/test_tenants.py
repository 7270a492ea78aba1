"""Who shares phrases with whom: tenants, adapters and single requests."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

import vllm_ouroboros

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)
COUNTS = ("steps", "verified_nodes", "accepted_tokens", "pool_lookups", "pool_hits")


def run(llm, tools, prompts, salt: str | None) -> tuple[list, dict[str, int]]:
    """Outputs, and what drafting did, for requests of one tenant, one after the other."""
    outputs = []
    with tools.Used(llm) as used:
        for ids in prompts:
            prompt = {"prompt_token_ids": ids}
            if salt is not None:
                prompt["cache_salt"] = salt
            outputs += llm.generate([prompt], GREEDY, use_tqdm=False)
    return tools.tokens_of(outputs), {name: used[name] for name in COUNTS}


def test_phrases_stay_with_their_tenant(ouroboros, prompts, tools):
    """Drafts come from the pool alone here. A second tenant with the very same requests drafts,
    node for node, as if the first had never been there; within a tenant phrases are shared.
    """
    llm = ouroboros(options={"draft_model": None}, max_num_seqs=1)
    vllm_ouroboros.reset_pool(llm)  # other tests had this engine
    some = prompts[:6]
    texts, cold = run(llm, tools, some, "one")
    assert run(llm, tools, some, "two") == (texts, cold)
    again, warm = run(llm, tools, some, "one")
    assert again == texts
    assert warm["accepted_tokens"] > cold["accepted_tokens"]
    assert run(llm, tools, some, None) == (texts, cold)
    assert run(llm, tools, some, "three") == (texts, cold)


def test_a_private_scope_shares_nothing(ouroboros, prompts, tools):
    options = {"draft_model": None, "pool_scope": "request"}
    llm = ouroboros(options=options, max_num_seqs=1)
    some = prompts[:6]
    texts, cold = run(llm, tools, some, None)
    assert run(llm, tools, some, None) == (texts, cold)
    assert run(llm, tools, some, "salt") == (texts, cold)


@pytest.mark.parametrize("salt", [None, "mine"])
def test_tenants_in_one_batch(salt, ouroboros, prompts, vanilla, tools):
    """Half of a batch is a tenant's own: texts are those of vanilla vLLM."""
    llm = ouroboros()
    vllm_ouroboros.reset_pool(llm)
    given = [
        {"prompt_token_ids": ids, **({"cache_salt": f"{salt}{i % 3}"} if i % 2 else {})}
        for i, ids in enumerate(prompts[:16])
    ]
    outputs = llm.generate(given, GREEDY, use_tqdm=False)
    assert tools.tokens_of(outputs) == tools.tokens_of(vanilla(prompts[:16], GREEDY))
