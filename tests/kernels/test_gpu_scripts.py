"""The parts of the GPU scripts that need no GPU: masks, comparisons, what becomes of a step."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_ouroboros.kernels.reference import unpack_mask

SCRIPTS = Path(__file__).parents[2] / "scripts" / "gpu"


@pytest.fixture(scope="module")
def script():
    """Imports a script by its name."""
    sys.path.append(str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("nodes", [1, 27, 32, 33, 256])
def test_masks_of_random_trees(nodes, script) -> None:
    inputs = script("gpu_inputs")
    seen = inputs.random_tree(nodes, nodes)
    assert seen.diagonal().all() and not seen.triu(1).any()
    for row in range(1, nodes):  # all that its parent sees, and itself
        parent = int(seen[row, :row].nonzero().max()) if seen[row, :row].any() else None
        assert parent is not None and torch.equal(seen[row, :row], seen[parent, :row])
    assert torch.equal(unpack_mask(inputs.pack(seen), nodes), seen)


def test_sizes_of_a_cell(script) -> None:
    cell = script("gpu_inputs").Cell("llama-8b", context=8192, batch=8, nodes=27)
    keys_and_values = 2 * (8192 + 27) * 8 * 128 * 2
    assert cell.bytes_moved() == 8 * (keys_and_values + 2 * 27 * 32 * 128 * 2)
    assert cell.pages == 514  # 513.7
    assert (cell.shape().group, cell.shape().rows) == (4, 216)


def test_comparison_with_vanilla(script) -> None:
    compare = script("gpu_compare").compare
    best = [[{"1": -0.5, "2": -0.6}, {"3": -0.1, "4": -3.0}]] * 5
    ours = [[1, 3], [2, 3], [1, 4], [1], [9, 3]]
    result = compare(ours, [[1, 3]] * 5, best, 0.25)
    assert result == {
        "equal": 1, "near_ties": 1, "different": 3, "gaps": [0.1, 2.9, None, None],
    }  # fmt: skip
    assert compare(ours, [[1, 3]] * 5, best, 0.0)["different"] == 4


def test_prompts(script) -> None:
    prompts = script("gpu_compare").stdlib_prompts(24)
    assert len(prompts) == 24
    assert all(24 <= len(ids) <= 200 and ids[0] == 0 for ids in prompts)


def test_rows_of_engines(script) -> None:
    engine = script("gpu_engine")

    def result(tokens: list[int], **more) -> dict:
        return {"single": [tokens], "single_s": 2.0, "together": [tokens], "together_s": 1.0,
                "stats": {"steps": 3}, "best": None, **more}  # fmt: skip

    vanilla = result([1, 2], best=[[{"1": -0.5, "5": -0.7}, {"2": -0.1}]], repeat=[[1, 2]])
    job = engine.Job("draft", "bfloat16", "eager")
    row = engine.row_of(job, result([5, 2], single_s=1.0), vanilla)
    assert row["correct"] and row["near_ties"] == 1 and row["gaps"] == [0.2]
    assert row["speedup"] == {"1": 2.0, "8": 1.0}
    job = engine.Job("draft", "float32", "eager")
    assert not engine.row_of(job, result([5, 2]), vanilla)["correct"]
    assert engine.row_of(job, result([1, 2]), vanilla)["correct"]
    assert not engine.row_of(job, {"error": "start: x"}, vanilla)["correct"]
    assert not engine.row_of(job, result([1, 2]), {"error": "x"})["correct"]
    assert "correct" not in engine.row_of(job, {"skipped": "out of time"}, None)
    assert engine.row_of(engine.Job("vanilla", "float32", "eager"), vanilla, vanilla)[
        "equal_when_repeated"
    ]


@pytest.mark.parametrize(
    "code, missing, seconds, status",
    [
        ("print('{\"judgments\": {\"a\": 1}}'); print('done')", "", 60, "passed"),
        ("raise SystemExit(3)", "", 60, "failed"),
        ("print('no vllm'); raise SystemExit(77)", "", 60, "skipped"),
        ("import time; time.sleep(60)", "", 2, "timed out"),
        ("", "not installed: x", 60, "skipped"),
        ("", "", 1, "skipped"),
    ],
)
def test_what_becomes_of_a_step(
    code, missing, seconds, status, script, tmp_path, monkeypatch
) -> None:
    steps = script("gpu_steps")
    monkeypatch.setattr(steps, "LEAST_S", 2)
    step = steps.Step(1, "x", [sys.executable, "-c", code], 100, False, missing)
    with (tmp_path / "log.txt").open("w") as log:
        row = steps.run(step, seconds, log)
    assert row["status"] == status
    if status == "passed":
        assert row["result"] == {"a": 1} and row["last_line"] == "done"
    if status == "failed":
        assert row["exit_status"] == 3


def test_stages_from_start_to_end(script, tmp_path, monkeypatch, capsys) -> None:
    """Of two stages: a step that passes, fails, hangs, lacks a package and cannot be started; the
    summary on disk tells what was done whenever a run is cut short.
    """
    steps = script("gpu_steps")
    seen = []
    run = steps.run

    def watched(step, seconds, log):
        if (tmp_path / "summary.json").exists():
            seen.append(len(json.loads((tmp_path / "summary.json").read_text())["steps"]))
        return run(step, seconds, log)

    monkeypatch.setattr(steps, "run", watched)
    monkeypatch.setattr(steps, "LEAST_S", 0.1)

    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    result = 'print(\'{"judgments": {"speedup": {"8": 1.5}}}\')'
    wanted = [
        steps.Step(2, "late", python("print('late')"), 60),
        steps.Step(1, "good", python(result), 60),
        steps.Step(1, "bad", python("raise SystemExit(3)"), 60),
        steps.Step(1, "slow benchmark", python("import time; time.sleep(60)"), 2, True),
        steps.Step(1, "lacking", [], 60, missing="not installed: x"),
        steps.Step(1, "no such program", [str(tmp_path / "nothing")], 60),
    ]
    rows = steps.run_stages(wanted, {1: 100, 2: 100}, tmp_path, {"gpu": "a fake"})
    assert [(row["step"], row["status"]) for row in rows] == [
        ("good", "passed"), ("bad", "failed"), ("slow benchmark", "timed out"),
        ("lacking", "skipped"), ("no such program", "failed"), ("late", "passed"),
    ]  # fmt: skip
    assert seen == [1, 2, 3, 4, 5]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failed"] == ["bad", "no such program"] and summary["gpu"] == "a fake"
    told = capsys.readouterr().out
    assert 'speedup: {"8": 1.5}' in told and told.count("\n") < 40


def test_a_stage_has_its_time(script, tmp_path, monkeypatch) -> None:
    """What no longer fits into one stage does not run, and takes nothing from the next."""
    steps = script("gpu_steps")
    wait = [sys.executable, "-c", "import time; time.sleep(60)"]
    wanted = [
        steps.Step(1, "long", wait, 60, True), steps.Step(1, "left out", wait, 60),
        steps.Step(2, "next", [sys.executable, "-c", ""], 60),
    ]  # fmt: skip
    monkeypatch.setattr(steps, "LEAST_S", 1)
    rows = steps.run_stages(wanted, {1: 1.5, 2: 60}, tmp_path, {})
    assert [row["status"] for row in rows] == ["timed out", "skipped", "passed"]


def test_stages_fit_the_time_they_have(script, tmp_path) -> None:
    steps = script("gpu_steps")
    found = steps.steps(tmp_path)
    for stage, most in {1: 240, 2: 300}.items():
        assert steps.STAGES[stage] <= most
    assert {step.stage for step in found} == set(steps.STAGES)
    assert all(step.limit_s <= steps.STAGES[step.stage] for step in found)
    with pytest.raises(argparse.ArgumentTypeError, match="'4' is no stage: 1, 2, 3"):
        steps.stage_of("4")


def test_calls_of_a_step_are_counted(script) -> None:
    counts = script("gpu_profile").counts
    calls = [("cudaLaunchKernel", 30), ("cuLaunchKernelEx", 10), ("cudaGraphLaunch", 4),
             ("cudaMemcpyAsync", 12), ("aten::mm", 99)]  # fmt: skip
    assert counts(calls, 4) == {"launches": 10.0, "graphs": 1.0, "copies": 3.0, "waits": 0.0}


def test_speeds_of_the_pair(script, tmp_path) -> None:
    """Of a run that was cut short: batch 8 has no vanilla yet."""
    rows = [
        {"kind": "run", "method": "vanilla", "setting": "", "batch": 1, "tokens_per_second": 50.0},
        {"kind": "run", "method": "draft_model", "setting": "K=3", "batch": 1,
         "tokens_per_second": 75.0},
        {"kind": "run", "method": "draft_model", "setting": "K=3", "batch": 8,
         "tokens_per_second": 75.0},
        {"kind": "cell", "method": "vanilla", "batch": 8},
    ]  # fmt: skip
    file = tmp_path / "pair.jsonl"
    pair = script("gpu_pair")
    assert pair.speeds(file) == {}
    file.write_text("\n".join(map(json.dumps, rows)))
    assert pair.speeds(file) == {"batch 1": {"vanilla": 1.0, "draft_model K=3": 1.5}}


def test_no_device_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for name in ("gpu_steps.py", "gpu_engine.py", "gpu_profile.py", "gpu_pair.py", "gpu_info.py"):
        done = subprocess.run(
            [sys.executable, SCRIPTS / name], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"{name}: no CUDA device")
        assert done.stderr.count("\n") == 1
