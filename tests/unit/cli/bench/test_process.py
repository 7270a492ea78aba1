"""Engines of the benchmark without vLLM: what the parent asks, what an engine does."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_ouroboros.cli import engine_process
from vllm_ouroboros.cli.bench import engine as bench_engine
from vllm_ouroboros.cli.bench.engine import EngineSpec, Place, RunResult, RunSpec
from vllm_ouroboros.cli.bench.process import MeasuredEngine
from vllm_ouroboros.config import PROPOSER

from ...helpers.engine_children import CHILD

SPEC = EngineSpec("m", "auto", None, None, 64, 4, 2048, False)
RUN = RunSpec(("a", "b", "c"), 2, 8)


# -- the parent's side -------------------------------------------------------------------------


def test_an_engine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        'from vllm_ouroboros.cli.bench.engine import RunResult\nevents.send(("ready", {}))\n'
        "run = events.recv()\n"
        'events.send(("result", RunResult([(1, 2.0)], [list(run.prompts)], [], [])))\n'
        'events.recv(); events.send(("result", 0.25)); events.recv()\n'
    )
    monkeypatch.setattr(engine_process, "child_code", lambda module: CHILD + code)
    engine = MeasuredEngine(SPEC, timeout=30, verbose=False)
    try:
        assert engine.run(RUN, print).outputs == [["a", "b", "c"]]
        assert 2**20 < engine.peak() < 2**31
        assert engine.gap(Place("a", (), 6, 5)) == 0.25
    finally:
        engine.end()


# -- the child's side --------------------------------------------------------------------------


class FakeLLM:
    """As much of vllm.LLM as the benchmark asks; it writes down what happens."""

    def __init__(self, **options: Any) -> None:
        self.options, self.log, self.drafts = options, [], 0
        config = SimpleNamespace(model_config=SimpleNamespace(dtype="torch.float32"))
        self.llm_engine = SimpleNamespace(
            vllm_config=config, add_request=self.add_request, step=self.step
        )
        self.live: list[tuple[str, str]] = []
        self.asked: list[int] = []  # most tokens, of each request

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(encode=list)

    def get_metrics(self) -> list[Any]:
        return [
            SimpleNamespace(name="vllm:spec_decode_num_drafts", value=self.drafts),
            SimpleNamespace(name="vllm:iteration_tokens_total", count=2 * self.drafts, sum=0.0),
            SimpleNamespace(name="vllm:other", value=7),
        ]

    def collective_rpc(self, name: str) -> list[dict[str, int]]:
        self.log.append(name)
        return [{"steps": 10 * self.drafts}]

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
        self.log.append((prompts, params.max_tokens))
        said = {5: SimpleNamespace(logprob=-0.5), 6: SimpleNamespace(logprob=-0.75)}
        return [SimpleNamespace(outputs=[SimpleNamespace(logprobs=[said])])]

    def add_request(self, request_id: str, prompt: str, params: Any) -> None:
        self.live.append((request_id, prompt))
        self.asked.append(params.max_tokens)
        self.past_the_end = params.ignore_eos
        self.drafts += 1

    def step(self) -> list[Any]:
        """The newest of the requests ends; of the others nothing is heard, or that they go on."""
        self.log.append([prompt for _, prompt in self.live])
        (request_id, prompt), times = self.live.pop(), SimpleNamespace(
            first_token_latency=0.5, first_token_ts=1.0, last_token_ts=3.0
        )  # fmt: skip
        going = [SimpleNamespace(finished=False)] * len(self.live)
        ended = SimpleNamespace(request_id=request_id, finished=True, metrics=times)
        ended.outputs = [SimpleNamespace(token_ids=[ord(prompt[0]), 1, 2])]
        return [*going[:1], ended]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace
    params: Any = ModuleType("vllm.sampling_params")
    params.RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    monkeypatch.setattr(bench_engine, "usable_length", lambda _, wanted: wanted)


@pytest.mark.usefixtures("vllm")
def test_a_run_of_our_engine() -> None:
    speculative = {"model": PROPOSER, "num_speculative_tokens": 26}
    engine = bench_engine.Engine(
        EngineSpec("m", "auto", speculative, {"draft_model": None}, 4096, 4, 2048, True)
    )
    assert engine.facts == {"dtype": "float32", "max_model_len": 4096}
    llm: Any = engine.llm
    assert llm.options["additional_config"] == {"ouroboros": {"draft_model": None}}
    assert llm.options["max_num_batched_tokens"] == 4096
    assert llm.options["enable_prefix_caching"] is False
    assert llm.options["tensor_parallel_size"] == 1
    assert llm.options["disable_log_stats"] is False
    done: list[int] = []
    run = RunSpec(("a", "b", "c"), 2, 8, ("x",))
    result = engine.run(run, done.append)
    # a warm-up that teaches nothing, an empty pool, other prompts, then what is measured
    first, second = bench_engine.warm_up_prompts(2)
    assert llm.log == [
        [first, second], [first], "ouroboros_reset_pool", ["x"], "ouroboros_stats",
        ["a", "b"], ["a", "c"], ["a"], "ouroboros_stats", "ouroboros_costs",
    ]  # fmt: skip
    assert llm.asked == [bench_engine.WARM_UP_TOKENS] * 2 + [8] * 4
    assert done == [1, 1, 1]
    assert [tokens for tokens, _ in result.groups] == [9]
    assert result.outputs == [[97, 1, 2], [98, 1, 2], [99, 1, 2]]
    assert (result.first, result.each) == ([0.5] * 3, [1.0] * 3)
    assert result.counters == {"drafts": 3, "engine_steps": 6, "steps": 30}
    llm.log.clear()
    assert not llm.past_the_end
    engine.run(RunSpec(("a",), 2, 8, ignore_eos=True), done.append)
    assert llm.past_the_end
    assert llm.log[:2] == ["ouroboros_reset_pool", "ouroboros_stats"]  # warm already


@pytest.mark.usefixtures("vllm")
def test_a_run_of_vllms_own() -> None:
    engine = bench_engine.Engine(SPEC)
    result = engine.run(RUN, print)
    llm: Any = engine.llm
    assert llm.options["speculative_config"] is None
    assert not any(isinstance(entry, str) for entry in llm.log)
    assert result.counters == {"drafts": 3, "engine_steps": 6}
    with pytest.raises(ValueError, match="a prompt has 64 tokens, max_model_len is 64"):
        engine.run(RunSpec(("x" * 64,), 1, 8), print)


@pytest.mark.usefixtures("vllm")
def test_how_close_a_call_was() -> None:
    engine = bench_engine.Engine(SPEC)
    assert engine.gap(Place("ab", (7, 8), found=6, vanilla=5)) == 0.25
    llm: Any = engine.llm
    assert llm.log == [([{"prompt_token_ids": ["a", "b", 7, 8]}], 1)]
    assert engine.gap(Place("ab", (), found=9, vanilla=5)) is None


def test_one_token_has_no_time_per_token() -> None:
    times = SimpleNamespace(first_token_ts=1.0, last_token_ts=1.0)
    one = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])], metrics=times)
    untold = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1, 2])], metrics=None)
    assert bench_engine.time_per_token(one) is None
    assert bench_engine.time_per_token(untold) is None


@pytest.mark.usefixtures("vllm")
def test_what_an_engine_answers() -> None:
    engine = bench_engine.Engine(SPEC)
    assert isinstance(engine.answer(RUN, print), RunResult)
    assert engine.answer(Place("ab", (7, 8), found=6, vanilla=5), print) == 0.25
