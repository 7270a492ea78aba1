"""A job around its engines, which are none here; tests/e2e/on_ray runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_ouroboros.cli.batch import job as module
from vllm_ouroboros.cli.batch.engines import engine_arguments
from vllm_ouroboros.cli.batch.job import Job, Progress, processor_config, run
from vllm_ouroboros.cli.batch.requests import ERROR
from vllm_ouroboros.cli.batch.rows import read
from vllm_ouroboros.cli.inputs import DRAFT, TARGET, InputError
from vllm_ouroboros.phrases.shared_file import locked

from ...helpers import cli_fakes


@pytest.fixture
def asked(monkeypatch) -> list[list[str]]:
    """Ids that the engines of each run were asked for; each tenth row is lost with its engine."""
    seen: list[list[str]] = []

    def answers(job, pieces, defaults):
        seen.append([one for piece in pieces for one, _ in read(piece)])
        for one in [*seen[-1], seen[-1][0]]:  # what came out twice counts once
            if one.endswith("3"):
                yield module._failed(one, "bad")
            elif not one.endswith("9"):
                yield module._answer(
                    {"id": one, ERROR: "", "generated_text": one * 2, "num_input_tokens": 3.0,
                     "num_generated_tokens": 4}
                )  # fmt: skip

    monkeypatch.setattr(module, "_answers", answers)
    return seen


def job(folder: Path, count: int = 20, **changes: Any) -> Job:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"id": "r{i}", "prompt": "x"}}\n' for i in range(count)))
    return Job((rows,), folder / "out.jsonl", "m", {}, **changes)


def test_every_row_has_one_answer(tmp_path: Path, asked) -> None:
    shown: list[Progress] = []
    done = run(job(tmp_path), shown.append)
    assert done == shown[-1] == Progress(answered=16, failed=4, before=0, total=20)
    assert shown[0] == Progress(0, 0, 0, 20)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(one["id"] for one in found) == sorted(f"r{i}" for i in range(20))
    errors = {one["id"]: one["error"] for one in found if one["error"]}
    assert errors.keys() == {"r3", "r13", "r9", "r19"}
    assert "no engine answered its block" in errors["r9"]
    assert run(job(tmp_path, 25)) == Progress(answered=4, failed=1, before=20, total=25)
    assert asked[1] == [f"r{i}" for i in range(20, 25)]
    assert run(job(tmp_path, 25)) == Progress(0, 0, 25, 25)  # asks nobody
    assert len(asked) == 2


def test_errors_are_tried_again_where_that_is_wanted(tmp_path: Path, asked) -> None:
    run(job(tmp_path))
    done = run(job(tmp_path, retry_errors=True))
    assert (done.before, done.total) == (16, 20)
    assert sorted(asked[1]) == ["r13", "r19", "r3", "r9"]


def test_wrong_defaults_are_told_before_engines_start(tmp_path: Path, asked) -> None:
    with pytest.raises(InputError, match="--sampling-params: sampling_params"):
        run(job(tmp_path, sampling={"n": 2}))
    assert asked == []


def test_engines_have_ouroboros_on() -> None:
    target, arguments = engine_arguments(None, None, {"adaptive": False}, {"max_model_len": 64})
    assert target == str(TARGET)
    assert arguments == {
        "max_model_len": 64,
        "speculative_config": {
            "model": "vllm_ouroboros.OuroborosProposer", "num_speculative_tokens": 26
        },
        "additional_config": {"ouroboros": {"adaptive": False, "draft_model": str(DRAFT)}},
    }  # fmt: skip
    _, alone = engine_arguments(str(TARGET), None, {"phrase_len": 4}, {})
    assert alone["additional_config"] == {"ouroboros": {"phrase_len": 4}}
    assert alone["speculative_config"]["num_speculative_tokens"] == 8 + 3 * 4
    config = processor_config(Job((), Path("x"), target, arguments, (1, 4), 8, cores=2))
    assert config.engine_kwargs["distributed_executor_backend"] == "mp"
    assert config.engine_kwargs.items() >= arguments.items()
    assert (config.concurrency, config.batch_size) == ((1, 4), 8)
    assert config.placement_group_config["bundle_per_worker"] == {"CPU": 2, "GPU": 0}
    assert config.should_continue_on_error


def test_two_batches_do_not_write_one_file(tmp_path: Path, asked) -> None:
    with locked(tmp_path / "out.jsonl", 1), pytest.raises(InputError, match="another batch"):
        run(job(tmp_path))
    with pytest.raises(InputError, match="folder does not exist"):
        run(replace(job(tmp_path), out=tmp_path / "nowhere" / "out.jsonl"))
    assert asked == []


@pytest.mark.parametrize(
    "given, words",
    [
        (["--replicas", "4-1"], "--replicas 4-1"),
        (["--replicas", "x"], "--replicas x"),
        (["--engine-args", "[]"], "--engine-args []: must be a JSON object"),
        (["--engine-args", "{"], "--engine-args {: is not JSON"),
        (["--engine-args", '{"model": "x"}'], "model is said by --model"),
        (["--ouroboros-config", '{"phrase_len": 0}'], "ouroboros.phrase_len = 0"),
        (["--model", "nowhere"], "--model nowhere"),
        (["--draft-model", "nowhere"], "--draft-model nowhere"),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, given: list[str], words: str) -> None:
    result = cli_fakes.invoke("batch", "rows.jsonl", "--out", str(tmp_path / "o.jsonl"), *given)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_engines_that_do_not_start_are_one_line(tmp_path: Path, monkeypatch) -> None:
    def no_engine(*_: Any) -> Progress:
        raise RuntimeError("a stack\nof Ray's\nno memory for weights\n")

    monkeypatch.setattr(module, "connect", lambda *_, **__: None)
    monkeypatch.setattr(module, "run", no_engine)
    result = cli_fakes.invoke("batch", "rows.jsonl", "--out", str(tmp_path / "o.jsonl"))
    assert result.exit_code == 2
    assert "error: the engines ended: no memory for weights; --verbose" in result.output


def test_what_is_left_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "connect", lambda *_, **__: None)
    monkeypatch.setattr(module, "run", lambda job, show: show(Progress(3, 1, 2, 6)) or done)
    done = Progress(3, 1, 2, 6)
    result = cli_fakes.invoke("batch", "rows.jsonl", "--out", str(tmp_path / "o.jsonl"), "--plain")
    assert result.exit_code == 1
    assert "3 answers and 1 errors of 6 rows, 2 were there before" in result.output
