"""The benchmark on the task set: conversations, prompts of later turns, figures by task."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vllm_ouroboros.cli.bench import options as bench_options
from vllm_ouroboros.cli.bench import run as bench
from vllm_ouroboros.cli.bench.engine import Engine, EngineSpec, Place, RunResult, RunSpec, Turns
from vllm_ouroboros.cli.bench.methods import Method, build
from vllm_ouroboros.cli.bench.plan import Plan
from vllm_ouroboros.cli.bench.report import show_report
from vllm_ouroboros.cli.bench.rows import Cell, Load, by_task
from vllm_ouroboros.cli.tasks import Task

from ...helpers import cli_fakes

TASKS = (
    Task("chat-01", "chat", ("hello", "shorter", "once more")),
    Task("chat-02", "chat", ("hi", "and now?")),
    Task("math-01", "math", ("1 + 1",)),
)
ABOUT = {
    "commit": "c0ffee", "time": "now", "hardware": {"cpu": "a CPU", "cores": 2},
    "versions": {"vllm": "0.32.0"}, "inflated": {"model": None},
}  # fmt: skip


def user(text: str) -> tuple[str, str]:
    return ("user", text)


def plan(tmp_path: Path, **changed: Any) -> Plan:
    found = build(
        ["vanilla", "ngram"], draft_model=None, draft_tokens=[3], ngrams=[(2, 4, 3)],
        suffixes=[(1, 0.1)], configs=[{}],
        nodes=None, others=0,
    )  # fmt: skip
    options: dict[str, Any] = {
        "model": "m", "draft_model": None, "methods": tuple(found),
        "prompts": tuple((user(one.turns[0]),) for one in TASKS), "others": (),
        "loads": (Load(1), Load(2)), "rounds": 2, "max_tokens": 8, "max_model_len": 64,
        "dtype": "float32", "enforce_eager": False, "alive": 1, "timeout": 1.0,
        "out": tmp_path / "rows.jsonl", "tasks": tuple(one.task for one in TASKS),
        "later": tuple(one.turns[1:] for one in TASKS),
    }  # fmt: skip
    return Plan(**(options | changed))


class Fake:
    """An engine that answers in capitals; speculation helps with numbers alone."""

    facts: dict[str, Any] = {"dtype": "float32", "max_model_len": 64}  # noqa: RUF012

    def __init__(self, method: Any) -> None:
        self.method = method

    def texts(self, turns: Turns) -> list[str]:
        assert self.method.name == "vanilla"
        return [prompt[-1][1].upper() for prompt in turns.prompts]

    def run(self, run: RunSpec, done: Any) -> RunResult:
        groups = []
        for first in range(0, len(run.prompts), run.batch):
            part = run.prompts[first : first + run.batch]
            helps = self.method.speculative is not None and part[0][-1][1] == "1 + 1"
            groups.append((4 * len(part), 4 * len(part) * (0.5 if helps else 1.0)))
        if run.batch > 1:
            groups = [(sum(t for t, _ in groups), sum(s for _, s in groups))]
        count = len(run.prompts)
        each = [0.2 if prompt[-1][1] == "1 + 1" else 0.1 for prompt in run.prompts]
        apart = [{"drafts": 2, "draft_nodes": 8, "engine_steps": 2}] * count
        return RunResult(
            groups, [[1, 2, 3, 4]] * count, [0.1] * count, [*each],
            group_counters=apart if run.batch == 1 else [],
        )  # fmt: skip

    def peak(self) -> int:
        return 2**20

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def end(self) -> None: ...


def test_later_turns_hold_vanillas_answers(tmp_path: Path) -> None:
    found = bench.Bench(plan(tmp_path), ABOUT, start=Fake, serve=None)
    found.run(lambda *_: None)
    hello = (user("hello"), ("assistant", "HELLO"), user("shorter"))
    assert found.plan.prompts == (
        (user("hello"),),
        hello,
        (*hello, ("assistant", "SHORTER"), user("once more")),
        (user("hi"),),
        (user("hi"), ("assistant", "HI"), user("and now?")),
        (user("1 + 1"),),
    )
    assert found.plan.tasks == ("chat",) * 5 + ("math",)
    rows = found.rows()
    ngram = next(row for row in rows if row["method"] == "ngram" and row["batch"] == 1)
    assert ngram["prompts"] == 6
    assert {task: one["ratio"] for task, one in ngram["tasks"].items()} == {"chat": 1, "math": 2}
    assert ngram["tasks"]["chat"]["prompts"] == 5
    assert ngram["tasks"]["math"]["tokens_per_target_forward"] == 2
    assert ngram["tasks"]["math"]["verified_nodes_per_token"] == 2
    for row in rows:
        times = {task: one["time_per_token_ms"] for task, one in row["tasks"].items()}
        assert times == pytest.approx({"chat": 100, "math": 200})
        assert ("ratio" in row["tasks"]["math"]) == (row["batch"] == 1), "else not to be told apart"
    out = io.StringIO()
    show_report(Console(file=out, width=160), rows)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert [line[-2:] for line in lines if line[:2] == ["vLLM", "ngram"]][1] == ["1.00", "2.00"]
    assert "times vanilla vLLM by task" in out.getvalue()


def test_a_plan_without_later_turns_asks_for_no_answers(tmp_path: Path) -> None:
    given = plan(tmp_path, later=((), (), ()))
    found = bench.Bench(given, ABOUT, start=Fake, serve=None)
    found.run(lambda *_: None)
    assert found.plan is given


def test_figures_by_task_need_requests_that_are_told_apart() -> None:
    runs = {0: RunResult([(4, 1.0), (4, 3.0)], [[], []], [0.1, None], [None, None])}
    cell = Cell(Method("vanilla"), Load(batch=1), runs)
    found = by_task(cell, runs, ("a", "b"))
    assert found["b"]["tokens_per_second"] == pytest.approx(4 / 3)
    assert (found["a"]["first_token_ms"], found["b"]["first_token_ms"]) == (100, None)
    together = {0: RunResult([(8, 4.0)], [[], []], [0.1, 0.2], [None, None])}
    assert "ratio" not in by_task(Cell(cell.method, cell.load, together), together, ("a", "b"))["a"]
    assert by_task(Cell(cell.method, cell.load), runs, ("a", "b")) == {}


# -- options -----------------------------------------------------------------------------------


@pytest.fixture
def chat_model(model: str) -> str:
    (Path(model) / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    return model


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    found: list[Plan] = []
    monkeypatch.setattr(bench, "run", lambda plan, **_: found.append(plan) or True)
    monkeypatch.setattr(bench_options, "read_tasks", lambda: TASKS)
    return found


def test_one_of_each_task_in_turn(chat_model: str, plans: list[Plan], tmp_path: Path) -> None:
    args = ["bench", "--model", chat_model, "--out", str(tmp_path / "x"), "--prefix-caching"]
    args += ["-tp", "2"]
    assert cli_fakes.invoke(*args, "--tasks", "all").exit_code == 0
    assert cli_fakes.invoke(*args, "--tasks", "math,chat", "--limit", "2").exit_code == 0
    whole, part = plans
    assert [prompt[0][1] for prompt in whole.prompts] == ["hello", "1 + 1", "hi"]
    assert whole.tasks == ("chat", "math", "chat")
    assert whole.later == (("shorter", "once more"), (), ("and now?",))
    assert whole.prefix_caching
    assert whole.engine(whole.methods[0]).prefix_caching
    assert whole.engine(whole.methods[0]).tensor_parallel_size == 2
    assert [prompt[0][1] for prompt in part.prompts] == ["1 + 1", "hello"]
    assert (part.tasks, part.others) == (("math", "chat"), ((user("hi"),),))


def test_tasks_that_cannot_be_measured(chat_model: str, plans: list[Plan], tmp_path: Path) -> None:
    args = ["--out", str(tmp_path / "x"), "--tasks"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a")
    for more, message in (
        (["cooking"], "'cooking' is unknown; take all, chat, math"),
        (["all", "--prompts", str(prompts)], "--tasks all: excludes --prompts"),
    ):
        result = cli_fakes.invoke("bench", "--model", chat_model, *args, *more)
        assert result.exit_code == 2
        assert message in result.output
    (Path(chat_model) / "tokenizer_config.json").unlink()
    result = cli_fakes.invoke("bench", "--model", chat_model, *args, "all")
    assert "has no chat template; pass a chat model" in result.output
    assert not plans


# -- the engine's side -------------------------------------------------------------------------


def test_a_conversation_goes_through_the_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.__new__(Engine)
    seen: list[Any] = []

    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [int(add_special_tokens), *map(ord, text)]

        def apply_chat_template(self, said: Any, **options: Any) -> str:
            assert options == {"tokenize": False, "add_generation_prompt": True}
            return "".join(f"{one['role'][0]}:{one['content']};" for one in said)

    logprobs = [{5: SimpleNamespace(logprob=-1.0), 6: SimpleNamespace(logprob=-3.0)}]
    output = SimpleNamespace(outputs=[SimpleNamespace(logprobs=logprobs)])
    monkeypatch.setitem(__import__("sys").modules, "vllm", SimpleNamespace(SamplingParams=dict))
    engine.llm = SimpleNamespace(
        get_tokenizer=Tokenizer, generate=lambda given, *_, **__: seen.append(given) or [output]
    )
    engine.max_model_len = 12
    chat = (user("a"), ("assistant", "b"), user("c"))
    assert engine._encode(chat) == [0, *map(ord, "u:a;a:b;u:c;")]
    assert engine._encode("a") == [1, ord("a")]
    assert engine.gap(Place(chat, (7,), 6, 5)) == 2.0
    assert seen == [[{"prompt_token_ids": [*engine._encode(chat), 7]}]]
    with pytest.raises(ValueError, match=r"a prompt has 13 tokens.*'c'"):
        engine._check([chat])
    assert not EngineSpec("m", "auto", None, None, 64, 1, 64, True).prefix_caching
