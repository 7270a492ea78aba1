"""The demo: its prompts and models, and what it says of the outcome."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import Result

from vllm_ouroboros.cli import inputs
from vllm_ouroboros.cli.demo import job as demo_job
from vllm_ouroboros.cli.demo import run as demo
from vllm_ouroboros.cli.demo.engine import EngineResult, Generation
from vllm_ouroboros.cli.demo.picture import middle, shortened
from vllm_ouroboros.cli.demo.report import Comparison
from vllm_ouroboros.cli.fetch import source
from vllm_ouroboros.cli.inputs import InputError

from ..helpers.cli_fakes import invoke, job


def test_models_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    assert job(model=model).draft_model is None
    assert job(model=model, draft_model="none").draft_model is None
    assert job(model=model, draft_model="owner/name").draft_model == "owner/name"
    assert job(model=model, draft_model=model).draft_model == model
    monkeypatch.chdir(Path(model).parent)
    assert job(model="model").model == model
    monkeypatch.setattr(demo_job, "TARGET", Path(model))
    monkeypatch.setattr(demo_job, "DRAFT", Path(model))
    assert job().draft_model == model
    assert job(draft_model="none").engine(ouroboros=True).ouroboros == {"draft_model": None}
    assert job().engine(ouroboros=False).ouroboros is None


def test_prompts_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "prompt": "def a():"}\n\n{"id": "b", "prompt": "def b():\\n"}\n')
    monkeypatch.setattr(inputs, "PROMPTS", file)
    assert job(model=model, prompts=None).prompts == (("a", "def a():"), ("b", "def b():\n"))
    assert job(model=model, prompts=["x\n", "y"]).prompts == (
        ("prompt 1", "x\n"),
        ("prompt 2", "y"),
    )
    for broken in ("{", '{"id": 1}', "[1]"):
        file.write_text(broken)
        with pytest.raises(InputError, match="cannot be read"):
            job(model=model, prompts=None)


def generation(ids: list[int], seconds: float, *, passes: int = 3) -> Generation:
    origins = [i % 3 for i in range(len(ids))]
    return Generation([ids] * passes, [f" t{i}" for i in ids], origins, seconds)


def run_demo(
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    ours: list[list[int]],
    *args: str,
    seconds: float = 0.25,
) -> Result:
    texts = [[1, 2, 3, 4, 5, 6], [7, 8] * 20]
    results = {
        "vanilla": EngineResult([generation(t, 0.5) for t in texts], {}),
        "ouroboros": EngineResult(
            [generation(t, seconds) for t in ours], {"target_forwards": 46, "draft_forwards": 23}
        ),
    }
    monkeypatch.setattr(demo, "_run_engines", lambda _job, _show, _verbose: results)
    monkeypatch.setenv("COLUMNS", "120")
    prompts = ["--prompt", "def a():", "--prompt", "def b():"]
    return invoke("demo", "--model", model, "--rounds", "2", *prompts, *args)


def test_demo_identical(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    result = run_demo(monkeypatch, model, [[1, 2, 3, 4, 5, 6], [7, 8] * 20], "--plain")
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "def a(): t1 t2 t3 t4 t5 t6" in result.output
    assert "target 2   ■ draft model 2   ■ suffix phrase 2   identical" in result.output
    rows = [re.split(r"  +", line) for line in result.output.splitlines()]
    assert ["prompt 1", "6", "12.0", "24.0", "2.00", "identical"] in [r[:6] for r in rows]
    assert ["prompt 2", "40", "80.0", "160.0", "2.00", "identical, loops"] in [r[:6] for r in rows]
    # 46 tokens of one pass in 46 / 2 target forwards and 23 / 2 draft forwards
    assert ["Ouroboros", "92.0", "2.00", "2.00", "0.25", "identical"] in [r[:6] for r in rows]
    assert "Without the prompts whose text loops: ratio 2.00." in result.output


def test_demo_says_why_it_is_slower(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    ours = [[1, 2, 3, 4, 5, 6], [7, 8] * 20]
    assert "Slower" not in run_demo(monkeypatch, model, ours).output
    output = " ".join(run_demo(monkeypatch, model, ours, seconds=1.0).output.split())
    # 23 steps of 2 tokens in 2 seconds, 46 of one token in 1 second
    assert "took 87.0 ms for 2.00 tokens, a step of vanilla vLLM 21.7 ms for one" in output


def test_demo_says_what_was_inflated(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """A larger model that writes what a small one writes is no example of its kind."""
    ours = [[1, 2, 3, 4, 5, 6], [7, 8] * 20]
    assert "inflated" not in run_demo(monkeypatch, model, ours).output
    Path(model, "config.json").write_text('{"inflated_from": {"source": "tiny-code/target"}}')
    assert "Target: tiny-code/target, inflated." in run_demo(monkeypatch, model, ours).output


def test_demo_different(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    result = run_demo(monkeypatch, model, [[1, 2, 9, 4, 5, 6], [7, 8] * 20])
    assert result.exit_code == 1
    assert "DIFFERENT in 1 of 2" in result.output
    assert "Ouroboros, pass 0: token 2 is [9], vanilla's first pass has [3]" in result.output


def test_a_picture_shows_texts_and_totals(
    monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path
) -> None:
    ours, file = [[1, 2, 3, 4, 5, 6], [7, 8] * 20], tmp_path / "demo.svg"
    result = run_demo(monkeypatch, model, ours, "--svg", str(file))
    assert result.exit_code == 0
    assert f"Picture: {file}" in result.output.replace("\n", "")
    root = ElementTree.fromstring(file.read_text())
    shown = "".join(root.itertext()).replace("\xa0", " ")
    for part in ("prompt 1", "target 2", "suffix phrase 2", "identical", "tokens/s", "Greedy"):
        assert part in shown
    result = run_demo(monkeypatch, model, ours, "--svg", str(tmp_path))
    assert result.exit_code == 2
    assert f"--svg {tmp_path}: is a folder" in result.output


def test_a_picture_shows_neither_the_best_nor_the_worst() -> None:
    rows = [
        Comparison(str(i), "p", generation([1], 1.0), generation([1], seconds))
        for i, seconds in enumerate((0.1, 0.5, 0.2, 9.0, 0.4))
    ]
    assert [row.id for row in middle(rows)] == ["1", "2", "4"]
    assert [row.id for row in middle(rows[:2])] == ["0", "1"]


def test_a_picture_leaves_out_the_middle_of_a_long_prompt() -> None:
    assert shortened("a\nb\nc\nd\ne\n") == "a\nb\nc\nd\ne\n"
    assert shortened("a\nb\nc\nd\ne\nf") == "a\n    ...\nd\ne\nf"


def test_a_difference_in_any_pass_counts() -> None:
    same = generation([1, 2], 1.0)
    shorter = Generation([[1, 2], [1]], ["a", "b"], [0, 0], 1.0)
    assert Comparison("a", "p", same, same).identical
    assert not Comparison("a", "p", same, shorter).identical
    assert not Comparison("a", "p", shorter, same).identical


def test_loops_need_a_4_gram_more_than_8_times() -> None:
    for times, loops in ((8, False), (9, True)):
        text = [t for i in range(times) for t in (1, 2, 3, 4, 100 + i)]
        row = generation(text, 1.0)
        assert Comparison("a", "p", row, row).loops is loops
    empty = generation([], 1.0)
    assert not Comparison("a", "p", empty, empty).loops


EDIT = "Rename a.\n\n```python\na = 1\nb = 2\n```\n"


def test_predictions_of_a_job(model: str) -> None:
    """The code block of each prompt, for Ouroboros alone; by default the shipped edits."""
    given = job(model=model, prompts=[EDIT], prediction=True)
    assert given.predictions == ("a = 1\nb = 2\n",)
    assert given.engine(ouroboros=True).predictions == given.predictions
    assert given.engine(ouroboros=False).predictions == ()
    assert job(model=model, prompts=[EDIT]).predictions == ()
    shipped = job(model=model, prompts=None, prediction=True)
    assert len(shipped.predictions) == len(shipped.prompts) == demo_job.EDITS
    for prediction, (name, prompt) in zip(shipped.predictions, shipped.prompts, strict=True):
        assert name.startswith("edit-")
        assert len(prediction) > 100 and prediction in prompt
        assert "```" not in prediction


@pytest.mark.parametrize("wrong", [False, True])
def test_edits_are_those_of_a_chat_model(monkeypatch, model: str, wrong: bool) -> None:
    """Fetched unless another model is given."""
    seen = []

    def fetched(name, out, wheel, tell) -> Path:
        if wrong:
            raise InputError(f"{name}: nothing to be had")
        return Path(model)

    monkeypatch.setattr(source, "fetch_model", fetched)
    monkeypatch.setattr(demo, "run", lambda job, **_: seen.append(job) or True)
    result = invoke("demo", "--prediction")
    assert result.exit_code == (2 if wrong else 0)
    if wrong:
        assert "smollm2: nothing to be had" in result.output
    else:
        assert (seen[0].model, seen[0].draft_model) == (model, None)


def test_a_prompt_without_a_code_block(model: str) -> None:
    result = invoke("demo", "--model", model, "--prediction", "--prompt", "x = 1")
    assert result.exit_code == 2
    assert "has no code block" in result.output
