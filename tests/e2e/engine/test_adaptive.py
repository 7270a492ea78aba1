"""Whatever the policy decides, the text is the target's own."""

from __future__ import annotations

import json

import pytest
from forked_scripts import printed
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

GREEDY = {"temperature": 0.0, "max_tokens": 48}
SEEDED = [{"temperature": 0.9, "seed": i, "max_tokens": 32} for i in range(8)]
PATTERN = r"(\n    [a-z]{1,8} = [0-9]{1,4}){2,4}"

# The engine lives in the process of this script, which tells its policy other costs: as if rows of
# the target were nearly free, and one of its forwards a hundred of the draft model's.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
import vllm_ouroboros

job = json.load(sys.stdin)
llm = LLM(**job["engine"])
from vllm_ouroboros.policy.forward_costs import Costs, CostCurve

class Known(CostCurve):
    def observe(self, rows, seconds):
        pass

worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
policy = worker.model_runner.drafter.policy
policy.costs = Costs(Known([1, 512], [0.1, 0.1001]), Known([1], [0.001]))
# nor does it see how fast steps and rounds really are, which hangs on what else runs here
policy.end_step = policy.observe_drafting = policy.costs.observe_round = lambda *seen: None
runs = []
for prompts, params in job["runs"]:
    before = vllm_ouroboros.stats(llm)
    params = [SamplingParams(**one) for one in params]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    after = vllm_ouroboros.stats(llm)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    runs.append({"tokens": tokens, "used": {key: after[key] - before[key] for key in after}})
print(json.dumps(runs))
"""


@pytest.fixture(scope="module")
def engine(ouroboros):
    return ouroboros(26, {"adaptive": True})


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


def test_drafts_where_the_target_is_dear(pair, prompts, vanilla, tools, tmp_path) -> None:
    """Greedy and seeded batches of eight."""
    runs = [(prompts[:24], [GREEDY] * 24), (prompts[: len(SEEDED)], SEEDED)]
    options = {"draft_model": str(pair / "draft")}
    job = {
        "engine": {
            **tools.BASE,
            "speculative_config": {"model": tools.PROPOSER, "num_speculative_tokens": 26},
            "additional_config": {"ouroboros": options},
        },
        "runs": runs,
    }
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    output = tmp_path / "output"
    results = json.loads(printed(SCRIPT, output=output, given=json.dumps(job), **alone)[-1])
    for (some, params), result in zip(runs, results, strict=True):
        expected = vanilla(some, [SamplingParams(**one) for one in params])
        assert result["tokens"] == tools.tokens_of(expected)
        assert result["used"]["emitted_tokens"] > 1.7 * result["used"]["steps"]
        assert result["used"]["accepted_from_draft"] > 0
        assert result["used"]["accepted_from_suffix"] > 0
