"""Methods, statistics and tables of the benchmark."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rich.console import Console

from vllm_ouroboros.cli.bench import report as bench_report
from vllm_ouroboros.cli.bench import rows as bench_rows
from vllm_ouroboros.cli.bench.engine import RunResult
from vllm_ouroboros.cli.bench.methods import Method, build
from vllm_ouroboros.cli.bench.rows import Cell, Load

ABOUT = {
    "commit": "c0ffee", "time": "now", "hardware": {"cpu": "a CPU", "cores": 2},
    "versions": {"vllm": "0.32.0"}, "inflated": {"model": None, "draft_model": None},
}  # fmt: skip

OPTIONS: dict[str, Any] = {
    "draft_tokens": [3], "ngrams": [], "suffixes": [], "configs": [{}], "nodes": None,
}  # fmt: skip


def methods(*names: str, others: int = 2) -> list[Method]:
    return build(
        names, draft_model="draft", draft_tokens=[3, 5], ngrams=[(2, 4, 3)],
        suffixes=[(1, 0.1)], configs=[{}],
        nodes=None, others=others,
    )  # fmt: skip


# -- methods -----------------------------------------------------------------------------------


def test_methods_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_ouroboros.cli.bench.methods.find_spec", lambda _: None)
    suffix, warm = methods("suffix", "ouroboros-warm", others=0)
    assert suffix.missing == "arctic-inference is not installed"
    assert "--warm-prompts" in (warm.missing or "")
    [found] = build(["draft_model"], draft_model=None, others=1, **OPTIONS)
    assert "--draft-model" in (found.missing or "")
    monkeypatch.setattr("vllm_ouroboros.cli.bench.methods.find_spec", lambda _: object())
    assert methods("suffix")[0].missing is None


def test_without_a_draft_model_ours_are_the_pool_alone_and_lookahead_is_one_of_them() -> None:
    options = OPTIONS | {"draft_model": None, "others": 1}
    names = ["lookahead", "ouroboros-cold", "ouroboros-warm", "ouroboros-seen"]
    found = build(names, **options)
    assert [one.name for one in found] == names[1:]
    assert all(one.missing is None and one.ouroboros == {"draft_model": None} for one in found)
    assert [one.name for one in build(["lookahead"], **options)] == ["lookahead"]


def test_a_head_is_served_by_vllm_and_by_ours() -> None:
    names = ["eagle", "ouroboros-head-cold", "ouroboros-head-warm"]
    eagle, cold, warm = build(names, draft_model="draft", head="head", others=2, **OPTIONS)
    assert eagle.speculative == {"method": "eagle", "model": "head", "num_speculative_tokens": 3}
    assert eagle.draft_tokens == 3 and eagle.setting == "K=3"
    assert [one.pool for one in (cold, warm)] == ["cold", "warm"]
    assert cold.ouroboros == warm.ouroboros == {"draft_model": "head"}
    assert [one.missing for one in (eagle, cold, warm)] == [None] * 3
    for one in build(names, draft_model="draft", others=2, **OPTIONS):
        assert one.missing == "no draft head: give --head"


def test_each_config_is_a_setting() -> None:
    configs = [{}, {"draft_tokens": 4, "num_suffixes": 0, "pool_capacity": 128}]
    configs += [{"draft_model": None, "adaptive": False}, {"draft_model": "other"}]
    one, two, three, four = build(
        ["ouroboros-cold"], draft_model="d", others=1,
        **OPTIONS | {"configs": configs},
    )  # fmt: skip
    assert one.setting == "adaptive β=6 W=10 G=10, at most 26 nodes"
    assert two.setting == "adaptive β=6 W=10 G=10, at most 4 nodes, pool_capacity=128"
    assert three.setting == "γ=8 K=3 β=6 W=10 G=10, 26 nodes, no draft model"
    assert three.missing is None  # it is what the setting asks for
    assert four.setting == "adaptive β=6 W=10 G=10, at most 26 nodes, draft model other"


def test_each_number_of_draft_ranks_is_a_setting() -> None:
    whole, shared, alone = build(
        ["ouroboros-cold", "lookahead"], draft_model="d", others=1,
        **OPTIONS | {"draft_ranks": [1, 2]},
    )  # fmt: skip
    assert [one.speculative["draft_tensor_parallel_size"] for one in (whole, shared)] == [1, 2]
    assert whole.setting.endswith(", draft on 1 rank")
    assert shared.setting.endswith(", draft on 2 ranks")
    assert "draft_tensor_parallel_size" not in alone.speculative


# -- statistics --------------------------------------------------------------------------------


def result(groups: list[tuple[int, float]], **more: Any) -> RunResult:
    return RunResult(groups, more.pop("outputs", [[1] * t for t, _ in groups]), [], [], **more)


def test_ratio_of_constant_speeds_has_no_spread() -> None:
    vanilla = {n: result([(10, 10.0), (30, 30.0)]) for n in range(3)}
    mine = {n: result([(10, 5.0), (30, 15.0)]) for n in range(3)}
    assert bench_rows.ratio(mine, vanilla) == pytest.approx((2.0, 2.0, 2.0))


def test_ratio_is_paired_and_its_interval_covers_the_truth() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        load = random.uniform(0.5, 2.0, size=5)  # what slows both engines of a round alike
        vanilla, mine = {}, {}
        for n in range(5):
            noise = random.normal(1.0, 0.05, size=(2, 12))
            vanilla[n] = result([(10, 10 * load[n] * x) for x in noise[0]])
            mine[n] = result([(10, 10 / 1.5 * load[n] * x) for x in noise[1]])
        found = bench_rows.ratio(mine, vanilla)
        assert found is not None and found[1] is not None and found[2] is not None
        assert found[2] - found[1] < 0.15
        covered += found[1] <= 1.5 <= found[2]
    assert covered >= 34


def test_ratio_without_enough_pairs() -> None:
    one = {0: result([(10, 10.0)])}
    assert bench_rows.ratio(one, {}) is None
    assert bench_rows.ratio(one, {1: result([(10, 10.0)])}) is None
    assert bench_rows.ratio(one, one) == (1.0, None, None)
    assert bench_rows.ratio(one, {0: result([(5, 5.0), (5, 5.0)])}) is None


def test_counts_of_each_kind_of_engine() -> None:
    run = result([(20, 1.0)], counters={"accepted": 10, "draft_nodes": 30, "engine_steps": 10})
    vanilla, draft, _, ngram, ours = methods("vanilla", "draft_model", "ngram", "ouroboros-cold")

    def values(method: Method, run: RunResult, batch: int = 8) -> tuple[float | None, ...]:
        return tuple(bench_rows.counts(method, Load(batch), run).values())

    assert values(vanilla, result([(20, 1.0)], counters={"engine_steps": 20})) == (1.0, 0.0, 0.0)
    assert values(draft, run) == (2.0, 1.5, 1.5)  # three draft forwards in each of ten steps
    assert values(ngram, run) == (2.0, 0.0, 1.5)
    # an answer that ended early was accepted beyond its end: the steps know
    beyond = result([(20, 1.0)], counters={"accepted": 14, "draft_nodes": 30, "engine_steps": 8})
    assert values(ngram, beyond, 1) == (2.5, 0.0, 1.5)
    counters = {"steps": 8, "draft_forwards": 4, "verified_nodes": 100, "accepted": 1}
    assert values(ours, result([(20, 1.0)], counters=counters)) == (2.5, 0.2, 5.0)
    # a server tells texts and no draft forwards
    texts = result([(20, 1.0)], outputs=["ab"], counters={"accepted": 10, "draft_nodes": 30})
    assert values(ours, texts) == (2.0, None, 1.5)
    assert values(draft, result([(0, 1.0)], counters={}))[0] is None


def test_compare_says_where_outputs_differ() -> None:
    expected = [[1, 2, 3], [4, 5], [6]]
    good, bad = result([], outputs=expected), result([], outputs=[[1, 2, 3], [4], [7]])
    assert bench_rows.compare([good, good], expected) == []
    assert bench_rows.compare([good, bad], expected) == [
        {"prompt": 1, "unit": "token", "at": 1, "found": None, "vanilla": 5},
        {"prompt": 2, "unit": "token", "at": 0, "found": 7, "vanilla": 6},
    ]
    [text] = bench_rows.compare([result([], outputs=["abX"])], ["abc"])
    assert text == {"prompt": 0, "unit": "character", "at": 2, "found": "X", "vanilla": "c"}


# -- what is shown -----------------------------------------------------------------------------


def shown(rows: list[dict[str, Any]]) -> str:
    console = Console(width=200, record=True, no_color=True)
    with console.capture() as capture:
        bench_report.show_report(console, rows)
    return capture.get()


def cell(name: str, setting: str, seconds: float, outputs: list[list[int]], **more: Any) -> Cell:
    found = Cell(Method(name, setting), Load(1), facts={"dtype": more.pop("dtype", "float32")})
    found.runs = {n: RunResult([(3, seconds)] * 3, outputs, [0.1], [0.1]) for n in range(2)}
    for key, value in more.items():
        setattr(found, key, value)
    return found


def test_report_shows_the_best_setting_and_all_trouble() -> None:
    same = [[1, 2, 3]] * 3
    vanilla = cell("vanilla", "", 3.0, same)
    cells = [
        vanilla,
        cell("ngram", "slow", 2.0, same),
        cell("ngram", "fast", 1.5, [[1, 2, 3], [1, 9, 3], [1, 2, 3]]),
        cell("draft_model", "K=3", 1.0, same, failure="round 1: ValueError: no"),
    ]
    rows = [bench_rows.cell_row(c, vanilla, ABOUT) for c in cells]
    text = shown(rows)
    assert "batch 1" in text and "vLLM ngram fast" in text and "vLLM ngram slow" not in text
    assert "2.00 [2.00, 2.00]" in text and "2/3" in text
    assert "failed: vLLM draft_model, K=3, batch 1: round 1: ValueError: no" in text
    assert "first in prompt 1 at token 1: 9, vanilla has 2" in text
    assert "a CPU, 2 cores; vllm 0.32.0; commit c0ffee" in text
    assert not bench_report.all_well(rows[:3])
    assert bench_report.all_well([row | {"dtype": "bfloat16"} for row in rows[:3]])
    assert not bench_report.all_well(rows[3:])
    rows[0]["inflated"] = {"model": "a/b", "draft_model": None}
    assert "inflated from a/b" in shown(rows)
