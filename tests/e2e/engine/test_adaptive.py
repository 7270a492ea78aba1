"""Whatever the policy decides, the text is the target's own."""

from __future__ import annotations

import sys

import cloudpickle
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from .. import known_costs

GREEDY = {"temperature": 0.0, "max_tokens": 48}
PATTERN = r"(\n    [a-z]{1,8} = [0-9]{1,4}){2,4}"


@pytest.fixture(scope="module")
def engine(ouroboros):
    with pytest.MonkeyPatch.context() as context:
        context.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send functions, by value
        for module in (known_costs, sys.modules[__name__]):
            cloudpickle.register_pickle_by_value(module)
        yield ouroboros(26, {"adaptive": True})


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batch 8", "batch 1"])
def test_greedy_equals_vanilla(engine, one_by_one, prompts, vanilla, tools) -> None:
    """With the costs of this machine, which may make drafting pay or not."""
    greedy = SamplingParams(**GREEDY)
    some = prompts[:24]
    expected = tools.tokens_of(vanilla(some, greedy))
    with tools.Used(engine) as used:
        outputs = tools.generate(engine, some, greedy, one_by_one)
    assert tools.tokens_of(outputs) == expected
    assert used["emitted_tokens"] == used["accepted_tokens"] + used["steps"]
    assert used["verified_nodes"] < 26 * used["steps"]  # it chooses


def test_grammars_and_greedy_requests_in_one_batch(engine, prompts, vanilla, tools) -> None:
    some, bound = prompts[:8], StructuredOutputsParams(regex=PATTERN)
    params = [
        SamplingParams(temperature=0.0, max_tokens=32, structured_outputs=bound if i % 2 else None)
        for i in range(len(some))
    ]
    expected = tools.tokens_of(vanilla(some, params))
    assert tools.tokens_of(tools.generate(engine, some, params)) == expected


def test_costs_can_be_seen(engine) -> None:
    """Measured at the start for both models, in milliseconds by rows, never falling."""
    [costs] = engine.collective_rpc("ouroboros_costs")
    for model in ("target", "draft"):
        values = list(costs[model].values())
        assert values == sorted(values)
        assert values[0] > 0
    assert costs["overhead"] > 0


def calibration(worker) -> tuple[float, int]:
    """Tokens that the policy expected to be accepted, and those that were."""
    counters = worker.model_runner.drafter.counters
    return counters.expected_tokens, counters.accepted_as_expected


def test_drafts_where_the_target_is_dear(engine, prompts, vanilla, tools) -> None:
    """Greedy and seeded batches of eight; the last test, for the engine keeps those costs."""
    engine.collective_rpc(known_costs.dear_target)
    seeded = [SamplingParams(temperature=0.9, seed=i, max_tokens=32) for i in range(8)]
    for some, params in ((prompts[:24], SamplingParams(**GREEDY)), (prompts[:8], seeded)):
        with tools.Used(engine) as used:
            outputs = tools.generate(engine, some, params)
        assert tools.tokens_of(outputs) == tools.tokens_of(vanilla(some, params))
        assert used["emitted_tokens"] > 1.7 * used["steps"]
        assert used["accepted_from_draft"] > 0
        assert used["accepted_from_suffix"] > 0
    [(expected, accepted)] = engine.collective_rpc(calibration)
    assert 0.5 < accepted / expected < 2, "of what the policy promised itself"
