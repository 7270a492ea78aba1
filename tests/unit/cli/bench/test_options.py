"""Options of the benchmark: prompt files, lists, errors of one line, presets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from vllm_ouroboros.cli import provenance as bench_facts
from vllm_ouroboros.cli.bench import options as bench_options
from vllm_ouroboros.cli.bench import run as bench
from vllm_ouroboros.cli.bench.plan import Plan
from vllm_ouroboros.cli.bench.rows import Load
from vllm_ouroboros.cli.inputs import InputError, read_prompts

from ...helpers import cli_fakes


@pytest.fixture
def model(model: str) -> str:
    """It knows how long a text may be."""
    (Path(model) / "config.json").write_text('{"max_position_embeddings": 512}')
    return model


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that would be run; all goes well."""
    found: list[Plan] = []

    def run(plan: Plan, **_: Any) -> bool:
        found.append(plan)
        return True

    monkeypatch.setattr(bench, "run", run)
    return found


def invoke(*args: str) -> Result:
    return cli_fakes.invoke("bench", *args)


# -- prompt files ------------------------------------------------------------------------------


def test_prompts_of_either_kind(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": 1, "prompt": "def a():\\n"}\n\n{"prompt": "γ"}\n')
    assert read_prompts(rows, "--prompts") == ("def a():\n", "γ")
    text = tmp_path / "rows.txt"
    text.write_text("one prompt\n\n  two\n")
    assert read_prompts(text, "--prompts") == ("one prompt", "  two")
    text.write_text('{"prompt": "x"}\n')
    assert read_prompts(text, "--prompts") == ("x",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ('{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("plain text\n", "line 1 is not JSON"),
        ('{"text": "a", "id": 1}', 'line 1 has no "prompt", its keys are text, id'),
        ('{"prompt": 5}', 'line 1: "prompt" is 5; it must be a text'),
        ('{"prompt": " "}', "it must be a text, not empty"),
        ('\n["a"]', "line 2 is '[\"a\"]'; each line must be a JSON object"),
        ("\udcff", "is not UTF-8 text; pass a text file"),
    ],
)
def test_a_prompt_file_that_is_wrong(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError) as found:
        read_prompts(file, "--prompts")
    assert str(found.value).startswith(f"--prompts {file}")
    assert message in str(found.value)
    assert "\n" not in str(found.value)


# -- the command line --------------------------------------------------------------------------


def test_help_imports_neither_vllm_nor_torch() -> None:
    code = (
        "import sys\n"
        "from vllm_ouroboros.cli import main as cli\n"
        "from vllm_ouroboros.cli.bench import options, run\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'vllm', 'torch', 'transformers', 'numba'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_bad_options_give_one_line_and_status_2(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_options, "find_spec", lambda _: None)
    cases = {
        ("--rates", "8"): "--rates 8: `vllm bench serve` needs pandas, which is not installed",
        ("--prompts", "/no/such"): "--prompts /no/such: No such file",
        ("--warm-prompts", "/no/such"): "--warm-prompts /no/such: No such file",
        ("--methods", "ngram,medusa"): "'medusa' is unknown; take vanilla, draft_model",
        ("--draft-tokens", "3,x"): "--draft-tokens 3,x: 'x' is not a whole number from 1 on",
        ("--batch", "0"): "--batch 0: '0' is not a whole number from 1 on; for example",
        ("--batch", "none"): "--batch none: leaves nothing to measure; give --rates",
        ("--batch", "1:x"): "--batch 1:x: 'x' is not a whole number from 1 on; for example",
        ("--batch", "1,8:16"): "batch 8 wants 16 prompts and there are 12; take fewer, or more",
        ("--rates", "0"): "--rates 0: '0' is not a number above 0",
        ("--rates", "inf"): "'inf' is not a number above 0",
        ("--ngram", "2-4"): "'2-4' is not MIN-MAX-K",
        ("--ngram", "5-4-3"): "'5-4-3' has MIN above MAX",
        ("--suffix", "2"): "--suffix 2: '2' is not FACTOR-PROBABILITY; for example --suffix 1-0.1",
        ("--suffix", "2-1.5"): "'2-1.5' has a PROBABILITY above 1",
        ("--ouroboros-config", "{"): "--ouroboros-config {: is not JSON",
        ("--ouroboros-config", "[1]"): "must be a JSON object",
        ("--ouroboros-config", '{"draft_tokens": 0}'): "ouroboros.draft_tokens = 0",
        ("--ouroboros-config", '{"pool_path": "p"}'): "ouroboros.pool_path = 'p'",
        ("--nodes", "4", "--ouroboros-config", '{"adaptive": false}'): (
            "must be at least ouroboros.draft_tokens = 8"
        ),
        ("--model", "/no/such"): "--model /no/such: no such folder",
        ("--draft-model", "nowhere"): "--draft-model nowhere: no such folder",
        ("--out", str(tmp_path)): "is a folder or in none that exists",
        ("--out", "/no/such/file"): "is a folder or in none that exists",
    }
    for args, message in cases.items():
        result = invoke(*args)
        assert result.exit_code == 2, args
        assert result.output.startswith("error: "), args
        assert message in result.output
        assert result.output.count("\n") == 1
    assert invoke("--rounds", "0").exit_code == 2
    assert invoke("--alive", "0").exit_code == 2


def test_a_plan_of_all_options(
    tmp_path: Path, model: str, plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_options, "find_spec", lambda _: object())
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\nc\nd\na\n")
    result = invoke(
        "--model", model, "--draft-model", model, "--prompts", str(prompts), "--limit", "2",
        "--methods", "ngram,suffix,ouroboros-warm", "--ngram", "1-3-4,2-2-8",
        "--suffix", "1-0.1,4-0.25", "--batch", "1,8:1,1",
        "--rates", "0.5,2", "--rounds", "5", "--max-tokens", "64", "--dtype", "bfloat16",
        "--ouroboros-config", '{"draft_tokens": 4}', "--nodes", "16", "--enforce-eager",
        "--out", str(tmp_path / "o.jsonl"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    plan = plans[0]
    assert plan.prompts == ("a", "b")
    assert plan.others == ("c", "d")  # never one that is measured
    assert plan.loads == (Load(1), Load(8, prompts=1), Load(rate=0.5), Load(rate=2.0))
    names = [m.name for m in plan.methods]
    assert names == ["vanilla", "ngram", "ngram", "suffix", "suffix", "ouroboros-warm"]
    assert plan.methods[4].setting == "F=4 P=0.25"
    assert plan.methods[4].speculative == {
        "method": "suffix", "suffix_decoding_max_spec_factor": 4,
        "suffix_decoding_min_token_prob": 0.25,
    }  # fmt: skip
    assert plan.methods[-1].speculative == {
        "model": "vllm_ouroboros.OuroborosProposer", "num_speculative_tokens": 16,
    }  # fmt: skip
    assert plan.methods[-1].ouroboros == {"draft_model": model, "draft_tokens": 4}
    assert (plan.rounds, plan.max_tokens, plan.dtype) == (5, 64, "bfloat16")
    assert (plan.enforce_eager, plan.max_model_len) == (True, 512)


def test_presets(model: str, plans: list[Plan]) -> None:
    assert invoke().exit_code == 0
    assert invoke("--quick", "--rounds", "2").exit_code == 0
    usual, quick = plans
    assert (usual.rounds, usual.max_tokens, usual.enforce_eager) == (3, 128, False)
    assert len(usual.prompts) == 12 and not usual.others
    assert next(m for m in usual.methods if m.name == "ouroboros-warm").missing
    assert (quick.rounds, quick.max_tokens, quick.enforce_eager) == (2, 32, True)
    assert (len(quick.prompts), len(quick.others)) == (4, 8)
    assert not next(m for m in quick.methods if m.name == "ouroboros-warm").missing


def test_warm_prompts(tmp_path: Path, plans: list[Plan]) -> None:
    for name, text in (("p.txt", "a\nb\n"), ("w.txt", "b\nc\nd\n")):
        (tmp_path / name).write_text(text)
    args = ["--prompts", str(tmp_path / "p.txt"), "--warm-prompts", str(tmp_path / "w.txt")]
    assert invoke(*args).exit_code == 0
    assert plans[0].others == ("c", "d")
    assert invoke(*args, "--warm-limit", "1").exit_code == 0
    assert plans[1].others == ("c",)


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run", lambda *_, **__: False)
    assert invoke().exit_code == 1

    def stop(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", stop)
    assert invoke().exit_code == 130


# -- facts -------------------------------------------------------------------------------------


def test_facts_say_whether_a_model_is_inflated(model: str, tmp_path: Path) -> None:
    assert bench_facts.inflated(model) is None
    assert bench_facts.inflated(None) is None
    assert bench_facts.inflated("owner/name") is None
    config = Path(model) / "config.json"
    config.write_text(json.dumps({"inflated_from": {"source": "tiny-code/target", "layers": 2}}))
    found = bench_facts.facts(model, None)
    assert found["inflated"] == {"model": "tiny-code/target", "draft_model": None}
    assert set(found) == {
        "model", "draft_model", "inflated", "hardware", "versions", "environment", "commit",
        "command", "time",
    }  # fmt: skip
    assert found["versions"]["vllm-ouroboros"]
    assert bench_facts.commit(tmp_path) == "none"
    gpu = {"cpu": "a CPU", "cores": 4, "gpus": ["a GPU, 1.0"]}
    assert bench_facts.hardware_line(gpu) == "a GPU, 1.0, a CPU, 4 cores"
