"""Two tensor-parallel ranks: the text of two ranks without speculation, whoever drafts.

An engine of two ranks takes long to start: `ALL_ENGINES=1` in the environment tries them all.
"""

from __future__ import annotations

import itertools
import os
import sys
import time

import cloudpickle
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError

from .. import known_costs
from ..adapters import ENGINE as WITH_ADAPTERS

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)
ONE = {name: WITH_ADAPTERS[name] for name in ("enable_lora", "max_loras", "max_lora_rank")}
TWO = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "max_num_batched_tokens": 224,  # eight whole trees, and little of a prompt: requests wait
    **ONE,
}
ENGINES = {
    "adaptive draft": ({"adaptive": True}, None),  # run by the first rank
    "adaptive sharded draft": ({"adaptive": True}, 2),
    "adaptive head": ({"adaptive": True, "draft_model": "head"}, None),
    "adaptive phrases": ({"adaptive": True, "draft_model": None}, None),
    "whole draft": ({"adaptive": False}, None),
    "chains": ({"adaptive": False, "num_suffixes": 0, "window_size": 0}, 2),
    "head": ({"adaptive": False, "draft_model": "head"}, None),
}
"""Options of each way to draft, and the ranks that share the draft model."""


@pytest.fixture(scope="module", autouse=True)
def _cores():
    """A core for each rank: vLLM binds ranks to NUMA nodes, of which there may be one."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        context.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send functions, by value:
        for module in (sys.modules[__name__], known_costs):
            cloudpickle.register_pickle_by_value(module)  # engines cannot import them
        yield


TRIED = list(ENGINES) if "ALL_ENGINES" in os.environ else ["adaptive draft"]


@pytest.fixture(scope="module", params=TRIED)
def engine(request, ouroboros, pair, tools):
    options, share = ENGINES[request.param]
    if options.get("draft_model") == "head":
        options = {**options, "draft_model": str(pair / "head")}
    speculative = {"model": tools.PROPOSER, "num_speculative_tokens": 26}
    if share is not None:
        speculative["draft_tensor_parallel_size"] = share
    llm = ouroboros(options=options, speculative_config=speculative, **TWO)
    llm.collective_rpc(known_costs.dear_target)  # so that it drafts
    return request.param, llm


def check_use(name: str, used, emitted: int) -> None:
    """That an engine speculated, and counts for one rank."""
    assert emitted <= used["emitted_tokens"] < 1.5 * emitted
    assert used["accepted_tokens"] > used["emitted_tokens"] // 10
    if "phrases" not in name:
        assert used["accepted_from_draft"] > 0


@pytest.mark.parametrize("one_by_one", [False, True], ids=["batch 8", "batch 1"])
def test_greedy_equals_vanilla(engine, one_by_one, judged, vanilla, tools):
    name, llm = engine
    expected = tools.tokens_of(vanilla(judged, GREEDY, **TWO))
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, judged, GREEDY, one_by_one)
    assert tools.tokens_of(outputs) == expected
    check_use(name, used, sum(map(len, expected)))


def test_seeds_give_what_one_rank_gives(engine, prompts, vanilla, tools):
    name, llm = engine
    params = [SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=32) for i in range(12)]
    expected = tools.tokens_of(vanilla(prompts[:12], params, **ONE))
    with tools.Used(llm) as used:
        assert tools.tokens_of(tools.generate(llm, prompts[:12], params)) == expected
    check_use(name, used, sum(map(len, expected)))


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
    name, llm = engine
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

    expected = run(plain)
    with tools.Used(llm) as used:
        assert run(llm) == expected
    check_use(name, used, sum(map(len, expected)))


def record(worker) -> None:
    """Let a rank keep the trees that it verifies, and what it accepted of those before."""
    runner = worker.model_runner
    requests = runner.drafter.requests
    requests.seen = []

    def tree_of(req_id, scheduled):
        tree = type(requests).tree_of(requests, req_id, scheduled)
        accepted = {known: found.path.tolist() for known, found in runner.verified.items()}
        requests.seen.append((tree.tokens.tolist(), tree.parents.tolist(), accepted))
        return tree

    requests.tree_of = tree_of


def recorded(worker) -> list[tuple]:
    """What `record` let it keep."""
    requests = worker.model_runner.drafter.requests
    del requests.tree_of
    return requests.__dict__.pop("seen")


def skew(worker) -> int:
    """Let the clock of the second rank run seventeen times as fast, for whoever decides by it, and
    the policy of the first one look at its own.
    """
    drafter = worker.model_runner.drafter
    if drafter.ranks.follows:
        real = time.perf_counter
        drafter.clock.now = time.perf_counter = lambda: 17 * real()
    elif drafter.policy is not None:
        del drafter.policy.end_step, drafter.policy.observe_drafting
    return int(drafter.ranks.follows)


def break_drafting(worker) -> None:
    """Let each third step of drafting fail, when the trees of its batch are made."""
    drafter, calls = worker.model_runner.drafter, itertools.count()
    propose, pause = drafter._propose, drafter.pause

    def _propose(*args):
        drafts = propose(*args)
        if next(calls) % 3 == 0:
            pause.__init__(drafter.counters)  # none takes longer
            raise ValueError("put in by a test")
        return drafts

    drafter._propose = _propose


def mend(worker) -> None:
    """Take back `break_drafting`."""
    del worker.model_runner.drafter._propose


@pytest.mark.parametrize("trouble", [skew, break_drafting], ids=["clock", "faults"])
def test_ranks_verify_the_same_trees(trouble, engine, judged, vanilla, tools):
    """Though the clock of one runs wild, or the first one often fails to draft."""
    name, llm = engine
    expected = tools.tokens_of(vanilla(judged, GREEDY, **TWO))
    llm.collective_rpc("ouroboros_reset_pool")  # or it knows these texts by now
    llm.collective_rpc(trouble)
    llm.collective_rpc(record)
    with tools.Used(llm) as used:
        assert tools.tokens_of(tools.generate(llm, judged, GREEDY)) == expected
    one, other = llm.collective_rpc(recorded)
    assert one == other
    assert len(one) > 50
    chains = [parents == [*range(-1, len(parents) - 1)] for _, parents, _ in one]
    assert all(chains) if name == "chains" else not all(chains)
    if trouble is break_drafting:
        assert used["faults"] > 10
        llm.collective_rpc(mend)


def fail_next(worker, log: str) -> None:
    """Let the second rank fail when it takes the next trees, and write what it says to a file."""
    drafter = worker.model_runner.drafter
    if drafter.ranks.follows:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        drafter.ranks._follow = lambda orders: 1 / 0


def test_a_rank_that_fails_ends_the_engine(engine, prompts, tools, tmp_path):
    """It would go on with other trees than the first rank; the last test, for that reason."""
    _, llm = engine
    log = tmp_path / "log"
    llm.collective_rpc(fail_next, args=(str(log),))
    with pytest.raises(EngineDeadError):
        tools.generate(llm, prompts[:4], GREEDY)
    said = log.read_text()
    assert "Tensor-parallel rank 1 failed and ends the engine" in said
    assert "ZeroDivisionError" in said


@pytest.mark.skipif("ALL_ENGINES" not in os.environ, reason="ALL_ENGINES=1 runs it: nine processes")
def test_four_ranks(ouroboros, judged, vanilla, tools, monkeypatch):
    """More than the target has KV heads, and than this machine has cores."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")
    four, some = {**TWO, "tensor_parallel_size": 4}, judged[:12]
    expected = tools.tokens_of(vanilla(some, GREEDY, **four))
    vanilla.engines.close()
    llm = ouroboros(options={"adaptive": True}, **four)
    llm.collective_rpc(known_costs.dear_target)
    llm.collective_rpc(record)
    with tools.Used(llm) as used:
        assert tools.tokens_of(tools.generate(llm, some, GREEDY)) == expected
    check_use("", used, sum(map(len, expected)))
    one, *others = llm.collective_rpc(recorded)
    assert others == [one] * 3
