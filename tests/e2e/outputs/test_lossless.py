"""Greedy output is the target's own, token for token."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

NEW_TOKENS = 32
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
SETTINGS = {
    "small": (
        14,
        {
            "draft_tokens": 4,
            "num_suffixes": 2,
            "phrase_len": 3,
            "window_size": 5,
            "guess_set_size": 4,
            "pool_scope": "request",
        },
    ),
    "one token": (
        1,
        {
            "draft_tokens": 1,
            "num_suffixes": 0,
            "phrase_len": 1,
            "window_size": 0,
            "guess_set_size": 1,
        },
    ),
    "no draft model": (26, {"draft_model": None}),
    "paper": (26, {}),  # the defaults: γ = 8, K = 3, β = 6, W = G = 10
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def engine(request, ouroboros):
    nodes, options = SETTINGS[request.param]
    return request.param, nodes, ouroboros(nodes, options)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batch 8", "batch 1"])
def test_greedy_equals_vanilla(engine, one_by_one, judged, vanilla, tools):
    name, nodes, llm = engine
    expected = tools.tokens_of(vanilla(judged, GREEDY))
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, judged, GREEDY, one_by_one)
    assert tools.tokens_of(outputs) == expected
    # and it was speculation that gave it
    total = sum(map(len, expected))
    assert used["emitted_tokens"] >= total
    assert used["steps"] < used["emitted_tokens"]
    assert used["accepted_tokens"] > total // 10
    assert used["accepted_tokens"] == used["accepted_from_draft"] + used["accepted_from_suffix"]
    assert used["emitted_tokens"] == used["accepted_tokens"] + used["steps"]
    assert used["accepted_tokens"] <= used["verified_nodes"] <= nodes * used["steps"]
    assert (used["draft_forwards"] == 0) == (name == "no draft model")
    assert (used["accepted_from_draft"] == 0) == (name == "no draft model")
    if name in ("paper", "small", "no draft model"):
        assert used["accepted_from_suffix"] > 0
    if one_by_one:
        assert used["target_forwards"] == used["steps"]


def test_same_answers_again(engine, judged, vanilla, tools):
    """A pool full of the very texts that come next changes the speed only."""
    _, _, llm = engine
    some = judged[:16]
    expected = tools.tokens_of(vanilla(judged, GREEDY))[:16]
    assert tools.tokens_of(tools.generate(llm, some, GREEDY)) == expected
