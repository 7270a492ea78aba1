"""The parts of the GPU scripts that need no GPU: masks, comparisons, what becomes of a step."""

from __future__ import annotations

import importlib
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
    step = steps.Step("x", [sys.executable, "-c", code], 100, False, missing)
    with (tmp_path / "log.txt").open("w") as log:
        row = steps.run(step, seconds, log)
    assert row["status"] == status
    if status == "passed":
        assert row["result"] == {"a": 1} and row["last_line"] == "done"
    if status == "failed":
        assert row["exit_status"] == 3


def test_no_device_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for name in ("gpu_steps.py", "gpu_engine.py"):
        done = subprocess.run(
            [sys.executable, SCRIPTS / name], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"{name}: no CUDA device")
        assert done.stderr.count("\n") == 1
