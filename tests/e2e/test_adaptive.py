"""Whatever the policy decides, the text is the target's own."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
SEEDED = [SamplingParams(temperature=0.9, seed=i, max_tokens=32) for i in range(16)]


@pytest.fixture(scope="module")
def engine(ouroboros):
    return ouroboros(26, {"adaptive": True})


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batch 8", "batch 1"])
def test_greedy_equals_vanilla(engine, one_by_one, prompts, vanilla, tools) -> None:
    expected = tools.tokens_of(vanilla(prompts, GREEDY))
    with tools.Used(engine) as used:
        outputs = tools.generate(engine, prompts, GREEDY, one_by_one)
    assert tools.tokens_of(outputs) == expected
    assert used["emitted_tokens"] == used["accepted_tokens"] + used["steps"]
    assert 0 < used["verified_nodes"] < 26 * used["steps"]  # it chooses
    assert used["accepted_tokens"] > 0


def test_seeds_give_the_tokens_of_vanilla(engine, prompts, vanilla, tools) -> None:
    some = prompts[: len(SEEDED)]
    expected = tools.tokens_of(vanilla(some, SEEDED))
    assert tools.tokens_of(tools.generate(engine, some, SEEDED)) == expected


def test_costs_can_be_seen(engine) -> None:
    """Measured at the start for both models, in milliseconds by rows, never falling."""
    [costs] = engine.collective_rpc("ouroboros_costs")
    for model in ("target", "draft"):
        values = list(costs[model].values())
        assert values == sorted(values)
        assert values[0] > 0
    assert costs["overhead"] > 0
