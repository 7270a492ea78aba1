"""Two tensor-parallel ranks: the text of two ranks without speculation, whoever drafts.

An engine of two ranks takes long to start: `ALL_ENGINES=1` in the environment tries them all.
"""

from __future__ import annotations

import os
import sys
import time

import cloudpickle
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError

from ..adapters import ENGINE as WITH_ADAPTERS

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)
ONE = {name: WITH_ADAPTERS[name] for name in ("enable_lora", "max_loras", "max_lora_rank")}
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **ONE}
ENGINES = {
    "whole draft": ({"adaptive": False}, None),  # run by the first rank
    "sharded draft": ({"adaptive": False, "num_suffixes": 0, "window_size": 0}, 2),  # chains
    "head": ({"adaptive": False, "draft_model": "head"}, None),
    "adaptive": ({"adaptive": True, "draft_model": None}, None),
}


@pytest.fixture(scope="module", autouse=True)
def _cores():
    """A core for each rank: vLLM binds ranks to NUMA nodes, of which there may be one."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        context.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send functions, by value:
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # engines cannot import this
        yield


TRIED = list(ENGINES) if "ALL_ENGINES" in os.environ else ["whole draft"]


@pytest.fixture(scope="module", params=TRIED)
def engine(request, ouroboros, pair, tools):
    options, share = ENGINES[request.param]
    if options.get("draft_model") == "head":
        options = {**options, "draft_model": str(pair / "head")}
    speculative = {"model": tools.PROPOSER, "num_speculative_tokens": 26}
    if share is not None:
        speculative["draft_tensor_parallel_size"] = share
    return request.param, ouroboros(options=options, speculative_config=speculative, **TWO)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batch 8", "batch 1"])
def test_greedy_equals_vanilla(engine, one_by_one, judged, vanilla, tools):
    name, llm = engine
    expected = tools.tokens_of(vanilla(judged, GREEDY, **TWO))
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, judged, GREEDY, one_by_one)
    assert tools.tokens_of(outputs) == expected
    assert used["emitted_tokens"] >= sum(map(len, expected)), "of one rank, not of both"
    if name != "adaptive":  # it may find that nothing pays here
        assert used["accepted_tokens"] > used["emitted_tokens"] // 10
        assert used["accepted_from_draft"] > 0


def test_seeds_give_what_one_rank_gives(engine, prompts, vanilla, tools):
    _, llm = engine
    params = [SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=32) for i in range(12)]
    expected = tools.tokens_of(vanilla(prompts[:12], params, **ONE))
    assert tools.tokens_of(tools.generate(llm, prompts[:12], params)) == expected


def seeds(worker) -> list[int]:
    """Where the source of seeds for requests without one stands."""
    return worker.model_runner.drafter.requests.seeds.get_state().tolist()


def test_requests_without_a_seed_draw_alike(engine, prompts, tools):
    """Ranks that drew other noise would accept other paths, and their KV would part for good."""
    _, llm = engine
    before = llm.collective_rpc(seeds)
    params = SamplingParams(temperature=1.0, max_tokens=32, n=2)
    assert len(tools.generate(llm, prompts[:8], params)) == 8
    one, other = llm.collective_rpc(seeds)
    assert one == other != before[0]


def test_adapters_and_grammars(engine, adapters, prompts, vanilla, tools):
    _, llm = engine
    bound = StructuredOutputsParams(regex=r"(\n    [a-z]{1,8} = [0-9]{1,4}){2,4}")
    params = [
        SamplingParams(temperature=0.0, max_tokens=32, structured_outputs=bound if i % 2 else None)
        for i in range(8)
    ]
    names = [None, adapters["linear"], adapters["linear"], None] * 2
    plain = vanilla.engine(**TWO)

    def run(engine) -> list[list[int]]:
        given = [{"prompt_token_ids": ids} for ids in prompts[:8]]
        outputs = engine.generate(given, params, lora_request=names, use_tqdm=False)
        return tools.tokens_of(outputs)

    assert run(llm) == run(plain)


def skew(worker) -> int:
    """Let the clock of the second rank run seventeen times as fast, for whoever decides by it."""
    runner = worker.model_runner
    if runner.drafter.ranks.follows:
        real, clock = time.perf_counter, runner.drafter.clock
        clock.now = time.perf_counter = lambda: 17 * real()
    return int(runner.drafter.ranks.follows)


def test_the_clock_of_another_rank_changes_nothing(engine, judged, vanilla, tools):
    _, llm = engine
    assert llm.collective_rpc(skew) == [0, 1]
    expected = tools.tokens_of(vanilla(judged, GREEDY, **TWO))[:16]
    assert tools.tokens_of(tools.generate(llm, judged[:16], GREEDY)) == expected


def fail_next(worker) -> None:
    """Let the second rank fail when it takes the next trees."""
    drafter = worker.model_runner.drafter
    if drafter.ranks.follows:
        drafter.ranks._follow = lambda orders: 1 / 0


def test_a_rank_that_fails_ends_the_engine(engine, prompts, tools):
    """It would go on with other trees than the first rank; the last test, for that reason."""
    _, llm = engine
    llm.collective_rpc(fail_next)
    with pytest.raises(EngineDeadError):
        tools.generate(llm, prompts[:4], GREEDY)
