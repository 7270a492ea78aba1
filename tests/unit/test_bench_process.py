"""Processes of the benchmark without vLLM: the dialogue with an engine, memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_ouroboros import bench_engine, bench_process
from vllm_ouroboros.bench_engine import EngineSpec, Place, RunResult, RunSpec
from vllm_ouroboros.bench_process import EngineError, EngineProcess
from vllm_ouroboros.config import PROPOSER

SPEC = EngineSpec("m", "auto", None, None, 64, 4, 2048, False)
RUN = RunSpec(("a", "b", "c"), 2, 8)
CHILD = """
import os, signal, subprocess, sys, time
from multiprocessing.connection import Connection
from vllm_ouroboros.bench_engine import RunResult
events = Connection(int(sys.argv[1]))
spec = events.recv()
"""
READY = 'events.send(("ready", {"dtype": spec.dtype})); run = events.recv()\n'


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    started: list[EngineProcess] = []

    def start(code: str, timeout: float = 30) -> EngineProcess:
        monkeypatch.setattr(bench_process, "_CHILD", CHILD + code)
        started.append(EngineProcess(SPEC, timeout=timeout, verbose=False))
        return started[-1]

    yield start
    for engine in started:
        if not engine._log.closed:
            engine.end()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def state(pid: int, wanted: str) -> bool:
    for _ in range(100):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in wanted:
            return True
        time.sleep(0.05)
    return False


# -- the parent's side -------------------------------------------------------------------------


def test_an_engine_answers_runs(start: Any) -> None:
    engine = start(
        READY + 'events.send(("done", run.batch))\n'
        'events.send(("result", RunResult([(1, 2.0)], [list(run.prompts)], [], [])))\n'
        "events.recv()\n"
    )
    assert engine.facts == {"dtype": "auto"}
    seen: list[int] = []
    result = engine.run(RUN, seen.append)
    assert result.outputs == [["a", "b", "c"]]
    assert seen == [2]
    assert 2**20 < engine.peak() < 2**31
    began = time.monotonic()
    engine.end()
    assert time.monotonic() - began < 10


def test_pausing_stops_all_processes_and_ends_none(start: Any) -> None:
    engine = start(
        'child = subprocess.Popen(["sleep", "600"])\n'
        'events.send(("ready", {"child": child.pid})); run = events.recv()\n'
        'events.send(("result", RunResult([(1, 2.0)], [], [], []))); events.recv()\n'
    )
    pid, child = engine._child.pid, engine.facts["child"]
    assert {pid, child} <= set(bench_process.group_members(pid))
    engine.pause()
    assert state(pid, "T") and state(child, "T")
    engine.resume()
    assert engine.run(RUN, print).groups == [(1, 2.0)]
    engine.pause()
    engine.end()
    assert gone(pid) and gone(child)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('events.send(("error", "ValueError: no"))', "ValueError: no (--verbose"),
        (
            'print("(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] a.b.MyError: deep")\n'
            "sys.stdout.flush()\n"
            'events.send(("error", "RuntimeError: Engine core initialization failed. See"))',
            "MyError: deep (--verbose",
        ),
        ("sys.exit(3)", "ended with status 3"),
        ("os.abort()", "ended with status -6"),
    ],
)
def test_an_engine_that_does_not_start(start: Any, code: str, message: str) -> None:
    with pytest.raises(EngineError) as found:
        start(code)
    assert message in str(found.value)


def test_a_run_that_fails_or_hangs(start: Any) -> None:
    engine = start(READY + 'events.send(("error", "OutOfMemoryError: big"))')
    with pytest.raises(EngineError, match="OutOfMemoryError: big"):
        engine.run(RUN, print)
    engine = start(READY + "time.sleep(600)", timeout=5)
    with pytest.raises(EngineError, match=r"silent for 5 s \(--timeout\)"):
        engine.run(RUN, print)
    engine.end()
    assert gone(engine._child.pid)


def test_a_stopped_engine_ends_with_its_parent(tmp_path: Path) -> None:
    """Even when the parent is killed, which nothing in a stopped process could notice."""
    code = (
        "import os, sys, time\n"
        "from vllm_ouroboros import bench_process as b\n"
        "from vllm_ouroboros.bench_engine import EngineSpec\n"
        f"b._CHILD = {CHILD + READY!r}\n"
        "e = b.EngineProcess(EngineSpec('m', 'auto', None, None, 64, 4, 64, False),"
        " timeout=30, verbose=False)\n"
        "e.pause(); print(e._child.pid, flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert state(pid, "T")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if gone(pid):
            break
        time.sleep(0.1)
    assert gone(pid)


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
    assert llm.options["disable_log_stats"] is False
    done: list[int] = []
    run = RunSpec(("a", "b", "c"), 2, 8, "warm", ("x",))
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
    engine.run(RunSpec(("a",), 2, 8, "cold", (), ignore_eos=True), done.append)
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
    assert bench_engine.time_per_token([one, untold]) == []


@pytest.mark.usefixtures("vllm")
def test_the_dialogue_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    wanted = iter([SPEC, RUN, Place("a", (), 6, 5), RunSpec(("x" * 64,), 1, 8)])
    fake = SimpleNamespace(recv=lambda: next(wanted), send=sent.append)
    monkeypatch.setattr(bench_engine, "Connection", lambda _: fake)
    monkeypatch.setattr(bench_engine, "end_with_parent", lambda: None)
    bench_engine.main(0)
    assert [kind for kind, _ in sent] == ["ready", *["done"] * 3, "result", "result", "error"]
    assert isinstance(sent[4][1], RunResult)
    assert sent[5] == ("result", 0.25)
    assert sent[6][1].startswith("ValueError: a prompt has 64 tokens")
