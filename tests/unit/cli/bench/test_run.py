"""The benchmark without an engine: order of runs, failures, rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_ouroboros.cli.bench import methods as bench_methods
from vllm_ouroboros.cli.bench import report as bench_report
from vllm_ouroboros.cli.bench import run as bench
from vllm_ouroboros.cli.bench.engine import Place, RunResult, RunSpec
from vllm_ouroboros.cli.bench.methods import Method, build
from vllm_ouroboros.cli.bench.plan import Plan, visits
from vllm_ouroboros.cli.bench.process import Engines
from vllm_ouroboros.cli.bench.rows import Load
from vllm_ouroboros.cli.engine_process import EngineError

ABOUT = {
    "commit": "c0ffee", "time": "now", "hardware": {"cpu": "a CPU", "cores": 2},
    "versions": {"vllm": "0.32.0"}, "inflated": {"model": None, "draft_model": None},
}  # fmt: skip
PROMPTS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def without_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here, what vLLM's suffix decoding needs is not."""
    monkeypatch.setattr(bench_methods, "find_spec", lambda _: None)


def methods(*names: str, others: int = 2) -> list[Method]:
    return build(
        names, draft_model="draft", draft_tokens=[3, 5], ngrams=[(2, 4, 3)],
        suffixes=[(1, 0.1)], configs=[{}],
        nodes=None, others=others,
    )  # fmt: skip


def plan(tmp_path: Path, found: list[Method], **changed: Any) -> Plan:
    options: dict[str, Any] = {
        "model": "target", "draft_model": "draft", "methods": tuple(found), "prompts": PROMPTS,
        "others": ("x", "y"), "loads": (Load(1), Load(2)), "rounds": 3, "max_tokens": 8,
        "max_model_len": 64, "dtype": "auto", "enforce_eager": False, "alive": 1, "timeout": 1.0,
        "out": tmp_path / "rows.jsonl",
    }  # fmt: skip
    return Plan(**(options | changed))


class Fake:
    """An engine that takes a second a token, half of one when it speculates."""

    def __init__(self, method: Method, log: list[Any], fail: Callable[[RunSpec], bool]) -> None:
        self.method, self.log, self.fail = method, log, fail
        self.facts = {"dtype": "float32", "max_model_len": 64}
        self.log.append(("start", method.name, method.setting))

    def run(self, run: RunSpec, done: Callable[[int], None]) -> RunResult:
        self.log.append(("run", self.method.name, self.method.setting, run.batch, run.before))
        if self.fail(run):
            raise EngineError("ValueError: broken")
        speed = 1.0 if self.method.speculative is None else 0.5
        groups = [run.prompts[i : i + run.batch] for i in range(0, len(run.prompts), run.batch)]
        for group in groups:
            done(len(group))
        return RunResult(
            groups=[(4 * len(group), 4 * len(group) * speed) for group in groups],
            outputs=[self.answer(prompt) for prompt in run.prompts],
            first=[0.01] * 3,
            each=[0.1] * 3,
            counters={"accepted": 6, "draft_nodes": 9, "engine_steps": 6},
        )

    def answer(self, prompt: str) -> list[int]:
        return [1, 2, 3, 4]

    def gap(self, place: Place) -> float | None:
        self.log.append(("gap", self.method.name, place))
        return 0.25 if place.found == 9 else None

    def peak(self) -> int:
        return 3 * 2**20

    def pause(self) -> None:
        self.log.append(("pause", self.method.name, self.method.setting))

    def resume(self) -> None:
        self.log.append(("resume", self.method.name, self.method.setting))

    def end(self) -> None:
        self.log.append(("end", self.method.name, self.method.setting))


def run(given: Plan, fail: Callable[[Method, RunSpec], bool] = lambda *_: False) -> Any:
    log: list[Any] = []
    found = bench.Bench(
        given, ABOUT, start=lambda m: Fake(m, log, lambda spec: fail(m, spec)), serve=None
    )
    found.run(lambda *_: None)
    return found, log


class Astray(Fake):
    """One whose answers are not vanilla's, but for the first prompt."""

    def answer(self, prompt: str) -> list[int]:
        wrong = {"b": [1, 9, 9, 4], "c": [8, 2]}.get(prompt, [1, 2, 3, 4])
        return [1, 2, 3, 4] if self.method.name == "vanilla" else wrong


def test_vanilla_says_how_close_a_call_it_was_where_outputs_differ(tmp_path: Path) -> None:
    log: list[Any] = []
    given = plan(tmp_path, methods("vanilla", "ngram"))
    found = bench.Bench(given, ABOUT, start=lambda m: Astray(m, log, lambda _: False), serve=None)
    found.run(lambda *_: None)
    asked = [entry[1:] for entry in log if entry[0] == "gap"]
    # each place once, whatever the batch and the round
    assert asked == [("vanilla", Place("b", (1,), 9, 2)), ("vanilla", Place("c", (), 8, 1))]
    vanilla, ngram = found.rows()[:2]
    assert vanilla["differences"] == []
    assert [one["gap"] for one in ngram["differences"]] == [0.25, None]
    assert (ngram["outputs_equal"], ngram["outputs_total"]) == (1, 3)
    assert not bench_report.all_well(bench._with_dtype(found.rows(), given))


# -- order -------------------------------------------------------------------------------------


def test_each_round_starts_one_method_later(tmp_path: Path) -> None:
    found = methods("vanilla", "draft_model", "ngram")
    order = [(n, m.name, m.setting) for n, m in visits(found, 5)]
    names = [(m.name, m.setting) for m in found]
    for number in range(5):
        first = number % 4
        assert [o[1:] for o in order if o[0] == number] == names[first:] + names[:first]
    _, log = run(plan(tmp_path, found))
    runs = [entry for entry in log if entry[0] == "run"]
    assert len(runs) == 4 * 2 * 3
    assert [entry[3] for entry in runs[:2]] == [1, 2]  # both batches while the engine is there


def test_one_engine_at_a_time_is_alive(tmp_path: Path) -> None:
    names = "vanilla", "ngram", "ouroboros-cold", "ouroboros-warm", "ouroboros-seen"
    _, log = run(plan(tmp_path, methods(*names), loads=(Load(1), Load(2, prompts=2))))
    alive = 0
    for entry in log:
        alive += {"start": 1, "end": -1}.get(entry[0], 0)
        assert alive <= 1
    assert alive == 0
    # pools in any state share an engine, and say what fills them
    at = log.index(("run", "ouroboros-cold", methods("ouroboros-cold")[0].setting, 2, ()))
    assert [entry[0] for entry in log[at + 1 : at + 9]] == ["resume", "run"] * 4
    filled = [entry[4] for entry in log[at + 2 : at + 9 : 2]]
    assert filled == [("x", "y"), ("x", "y"), PROMPTS, PROMPTS[:2]]


def test_engines_that_stay_are_stopped_while_another_works(tmp_path: Path) -> None:
    found = methods("vanilla", "ngram")
    _, log = run(plan(tmp_path, found, alive=2, loads=(Load(1),)))
    assert sum(entry[0] == "start" for entry in log) == 2
    running: set[Any] = set()
    for entry in log:
        if entry[0] in ("start", "resume"):
            running.add(entry[1])
        elif entry[0] in ("pause", "end"):
            running.discard(entry[1])
        else:
            assert running == {entry[1]}


def test_the_engine_needed_last_makes_room() -> None:
    log: list[Any] = []
    engines = Engines(2, lambda m: Fake(m, log, lambda _: False))
    one, two, three = methods("draft_model", "ngram")
    engines.get(one, [])
    engines.get(two, [])
    engines.get(three, [two.engine, one.engine, three.engine])
    assert ("end", one.name, one.setting) in log
    engines.end()
    assert sum(entry[0] == "end" for entry in log) == 3


def test_a_fresh_engine_for_each_run(tmp_path: Path) -> None:
    fresh = Method("suffix", fresh=True, speculative={"method": "suffix"})
    _, log = run(plan(tmp_path, [Method("vanilla"), fresh], alive=2, rounds=2))
    assert sum(entry[:2] == ("start", "suffix") for entry in log) == 4
    assert sum(entry[:2] == ("start", "vanilla") for entry in log) == 1


def test_what_engines_are_started_with(tmp_path: Path) -> None:
    vanilla, three, _, ngram, lookahead, cold, warm = methods(
        "vanilla", "draft_model", "ngram", "lookahead", "ouroboros-cold", "ouroboros-warm"
    )
    given = plan(tmp_path, [vanilla, three, ngram, cold], loads=(Load(1), Load(128)))
    assert given.engine(vanilla).speculative is None
    assert given.engine(three).speculative == {
        "method": "draft_model", "model": "draft", "num_speculative_tokens": 3,
    }  # fmt: skip
    assert given.engine(ngram).speculative == {
        "method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4,
        "num_speculative_tokens": 3,
    }  # fmt: skip
    ours = given.engine(cold)
    assert ours.speculative == {
        "model": "vllm_ouroboros.OuroborosProposer", "num_speculative_tokens": 26,
    }  # fmt: skip
    assert ours.ouroboros == {"draft_model": "draft"}
    assert ours.max_num_seqs == 128
    # vLLM needs room for every request's tree; all engines get the same
    assert ours.max_num_batched_tokens == 128 * 27 == given.engine(vanilla).max_num_batched_tokens
    assert plan(tmp_path, [vanilla]).engine(vanilla, server=True).max_num_seqs == 32
    assert lookahead.ouroboros == {"draft_model": None}
    assert "phrase pool only" in lookahead.title
    assert (lookahead.pool, cold.pool, warm.pool) == ("cold", "cold", "warm")
    assert "2 other prompts" in warm.rule
    assert cold.engine == warm.engine != lookahead.engine


# -- rows --------------------------------------------------------------------------------------


def test_rows_of_a_whole_benchmark(tmp_path: Path) -> None:
    given = plan(tmp_path, methods("vanilla", "draft_model", "suffix"))
    found, _ = run(given)
    runs = [json.loads(line) for line in given.out.read_text().splitlines()]
    assert len(runs) == 3 * 2 * 3
    assert {row["kind"] for row in runs} == {"run"}
    assert runs[0]["groups"] == [[4, 4.0]] * 3
    rows = found.rows()
    assert len(rows) == 4 * 2
    row = next(r for r in rows if r["setting"] == "K=5" and r["batch"] == 2)
    expected = {
        "kind": "cell", "method": "draft_model", "status": "ok", "reason": None, "rounds": 3,
        "prompts": 3, "tokens_per_second": 2.0, "tokens_per_second_min": 2.0,
        "tokens_per_second_max": 2.0, "ratio": 2.0, "first_token_ms": 10.0,
        "time_per_token_ms": 100.0, "tokens_per_target_forward": 2.0,
        "draft_forwards_per_token": 2.5, "verified_nodes_per_token": 0.75,
        "peak_memory_mib": 3, "outputs_equal": 3, "outputs_total": 3,
        "dtype": "float32", "commit": "c0ffee", "rate": None,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == pytest.approx(expected)
    assert row["differences"] == []
    assert row["rule"] and row["hardware"]["cores"] == 2
    assert row["ratio_low"] <= 2.0 <= row["ratio_high"]
    skipped = next(r for r in rows if r["method"] == "suffix")
    assert (skipped["status"], skipped["ratio"]) == ("skipped", None)
    assert skipped["reason"] == "arctic-inference is not installed"
    assert set(skipped) >= set(row) - {"dtype", "max_model_len"}
    assert bench_report.all_well(bench._with_dtype(rows, given))


def test_a_load_may_take_fewer_prompts(tmp_path: Path) -> None:
    given = plan(tmp_path, methods("vanilla", "ngram"), loads=(Load(1, prompts=1), Load(2)))
    rows = run(given)[0].rows()
    assert [row["prompts"] for row in rows] == [1, 1, len(PROMPTS), len(PROMPTS)]
    assert all(row["outputs_equal"] == row["prompts"] for row in rows)


def test_a_failed_run_fails_its_cell_alone(tmp_path: Path) -> None:
    given = plan(tmp_path, methods("vanilla", "ngram"))
    found, log = run(given, lambda m, spec: m.name == "ngram" and spec.batch == 1)
    rows = bench._with_dtype(found.rows(), given)
    status = {(r["method"], r["batch"]): (r["status"], r["reason"]) for r in rows}
    assert status[("ngram", 1)] == ("failed", "round 1: ValueError: broken")
    assert status[("ngram", 2)] == ("ok", None)
    assert status[("vanilla", 1)] == ("ok", None)
    assert sum(entry[:2] == ("run", "ngram") and entry[3] == 1 for entry in log) == 1
    assert not bench_report.all_well(rows)


def test_an_engine_that_does_not_start_fails_all_its_cells(tmp_path: Path) -> None:
    tried = []

    def start(method: Method) -> Any:
        tried.append(method.name)
        if method.pool:
            raise EngineError("ValueError: no")
        return Fake(method, [], lambda _: False)

    given = plan(tmp_path, methods("vanilla", "ouroboros-cold", "ouroboros-warm"))
    found = bench.Bench(given, ABOUT, start=start)
    found.run(lambda *_: None)
    failed = [row for row in found.rows() if row["status"] == "failed"]
    assert len(failed) == 4
    assert {row["reason"] for row in failed} == {"round 1: does not start: ValueError: no"}
    assert tried.count("ouroboros-cold") + tried.count("ouroboros-warm") == 1


def test_without_vanilla_there_is_no_ratio(tmp_path: Path) -> None:
    found, _ = run(plan(tmp_path, methods("vanilla", "ngram")), lambda m, _: m.name == "vanilla")
    for row in found.rows():
        assert (row["ratio"], row["outputs_equal"]) == (None, None)


def test_servers_run_alone(tmp_path: Path) -> None:
    asked = []

    def serve(spec: Any, **options: Any) -> tuple[RunResult, int]:
        asked.append((spec.speculative, options["rate"], options["others"]))
        return RunResult([(20, 4.0)], ["text"] * 3, [0.1], [0.2], {}), 2**20

    given = plan(
        tmp_path, methods("vanilla", "ouroboros-warm"), loads=(Load(1), Load(rate=2.0)), rounds=1
    )
    log: list[Any] = []
    found = bench.Bench(
        given, ABOUT, start=lambda m: Fake(m, log, lambda _: False), serve=serve
    )  # fmt: skip
    found.run(lambda *_: None)
    assert [entry[0] for entry in log] == ["start", "run", "end"] * 2
    assert [(rate, others) for _, rate, others in asked] == [(2.0, ()), (2.0, ("x", "y"))]
    rows = [r for r in bench._with_dtype(found.rows(), given) if r["rate"] == 2.0]
    assert [r["tokens_per_second"] for r in rows] == [5.0, 5.0]
    assert {r["dtype"] for r in rows} == {"float32"}  # as the other engines told


def test_an_interrupt_leaves_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    def stop(spec: RunSpec) -> bool:
        if sum(entry[0] == "run" for entry in log) == 4:
            raise KeyboardInterrupt
        return False

    monkeypatch.setattr(
        bench, "MeasuredEngine", lambda spec, **_: Fake(Method("vanilla"), log, stop)
    )
    given = plan(tmp_path, methods("vanilla", "ngram"))
    with pytest.raises(KeyboardInterrupt):
        bench.run(given, plain=True)
    rows = [json.loads(line) for line in given.out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["run"] * 3 + ["cell"] * 4
    assert [row["status"] for row in rows[3:]] == ["ok", "ok", "ok", "not run"]
    assert log[-1][0] == "end"
