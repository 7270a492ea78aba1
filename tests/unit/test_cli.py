"""The command line without an engine: options, errors, the demo's report, the doctor's findings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vllm_ouroboros import cli, demo, doctor
from vllm_ouroboros.demo_engine import (
    EngineJob,
    EngineResult,
    Generation,
    match_origins,
    token_pieces,
)
from vllm_ouroboros.demo_report import Comparison
from vllm_ouroboros.engine_process import first_cause, one_line


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


# -- options -----------------------------------------------------------------------------------


def test_help_and_version_import_neither_vllm_nor_torch() -> None:
    code = (
        "import sys\n"
        "from vllm_ouroboros import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'vllm', 'torch', 'rich.progress', 'numba'} & sys.modules.keys()\n"
    )
    for args in (["--version"], ["--help"], ["demo", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "vllm-ouroboros" in invoke("--version").output


def test_bad_options_give_one_line_and_status_2(tmp_path: Path, model: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        ("--model", "/no/such/folder"): "--model /no/such/folder: no such folder",
        ("--model", str(empty)): "has no config.json",
        ("--model", f"{model}/config.json"): "is a file",
        ("--draft-model", "nowhere"): "--draft-model nowhere: no such folder",
        ("--model", model, "--prompt", " "): "--prompt ' ': is empty",
    }
    for args, message in cases.items():
        result = invoke("demo", *args)
        assert result.exit_code == 2, args
        assert message in result.output
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1
    assert invoke("demo", "--max-tokens", "0").exit_code == 2
    assert invoke("demo", "--dtype", "int4").exit_code == 2


def job(**changed: object) -> demo.Job:
    options: dict = {
        "model": None,
        "draft_model": None,
        "prompts": ["def f():"],
        "max_tokens": 8,
        "dtype": "float32",
        "rounds": 2,
    }
    return demo.Job.checked(**(options | changed))


def test_models_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    assert job(model=model).draft_model is None
    assert job(model=model, draft_model="none").draft_model is None
    assert job(model=model, draft_model="owner/name").draft_model == "owner/name"
    assert job(model=model, draft_model=model).draft_model == model
    monkeypatch.chdir(Path(model).parent)
    assert job(model="model").model == model
    monkeypatch.setattr(demo, "TARGET", Path(model))
    monkeypatch.setattr(demo, "DRAFT", Path(model))
    assert job().draft_model == model
    assert job(draft_model="none").engine(ouroboros=True).ouroboros == {"draft_model": None}
    assert job().engine(ouroboros=False).ouroboros is None


def test_prompts_of_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"id": "a", "prompt": "def a():"}\n\n{"id": "b", "prompt": "def b():\\n"}\n')
    monkeypatch.setattr(demo, "PROMPTS", file)
    assert job(model=model, prompts=None).prompts == (("a", "def a():"), ("b", "def b():\n"))
    assert job(model=model, prompts=["x\n", "y"]).prompts == (
        ("prompt 1", "x\n"),
        ("prompt 2", "y"),
    )
    for broken in ("{", '{"id": 1}', "[1]"):
        file.write_text(broken)
        with pytest.raises(demo.DemoError, match="cannot be read"):
            job(model=model, prompts=None)


# -- the demo ----------------------------------------------------------------------------------


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
    monkeypatch.setattr(demo, "_run_engine", lambda _job, name, _show, _verbose: results[name])
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


def test_demo_different(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    result = run_demo(monkeypatch, model, [[1, 2, 9, 4, 5, 6], [7, 8] * 20])
    assert result.exit_code == 1
    assert "DIFFERENT in 1 of 2" in result.output
    assert "Ouroboros, pass 0: token 2 is [9], vanilla's first pass has [3]" in result.output


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


# -- an engine's process -----------------------------------------------------------------------

CHILD = """
import subprocess, sys, pickle
from multiprocessing.connection import Connection
events = Connection(int(sys.argv[1]), readable=False)
job = pickle.load(sys.stdin.buffer)
"""


def run_child(monkeypatch: pytest.MonkeyPatch, code: str) -> object:
    monkeypatch.setattr(demo, "_CHILD", CHILD + code)
    engine = EngineJob("m", None, ("a",), 8, "float32", 1)
    seen: list[tuple[str, int]] = []
    result = demo._run_engine(engine, "vanilla", lambda _, p, n: seen.append((p, n)), False)
    return result, seen


def test_events_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    result, seen = run_child(
        monkeypatch,
        'events.send(("phase", "load"))\n'
        'events.send(("done", 1))\n'
        'events.send(("result", job.prompts))',
    )
    assert result == ("a",)
    assert seen == [("load", 0), ("", 1)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('events.send(("error", "ValueError: no"))', "vanilla vLLM: ValueError: no (--verbose"),
        (
            'print("(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] a.b.MyError: deep")\n'
            "sys.stdout.flush()\n"
            'events.send(("error", "RuntimeError: Engine core initialization failed. See"))',
            "vanilla vLLM: MyError: deep (--verbose",
        ),
        ("sys.exit(3)", "process ended with status 3"),
        ("import os; os.abort()", "process ended with status -6"),
    ],
)
def test_errors_of_an_engine(monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    with pytest.raises(demo.DemoError, match=re.escape(message)):
        run_child(monkeypatch, code)


def test_nothing_of_an_engine_stays_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run_child(
        monkeypatch,
        'child = subprocess.Popen(["sleep", "600"]); events.send(("result", child.pid))',
    )
    assert isinstance(result, int)
    state = Path(f"/proc/{result}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_an_engine_ends_with_its_parent() -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from vllm_ouroboros import engine_process as p; p.end_with_parent()",
        ],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(30) == -signal.SIGKILL


def test_environment_of_an_engine(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    local = job(model=model).engine(ouroboros=True)
    remote = job(model=model, draft_model="owner/name").engine(ouroboros=True)
    assert demo._environ(local, verbose=False)["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert "VLLM_LOGGING_LEVEL" not in demo._environ(local, verbose=True)
    assert demo._environ(local, verbose=True)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in demo._environ(remote, verbose=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert demo._environ(local, verbose=False)["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert demo._environ(local, verbose=False)["PATH"] == os.environ["PATH"]


# -- what an engine reports --------------------------------------------------------------------


def test_pieces_hold_back_unfinished_characters() -> None:
    data = "a é𝄞 b".encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    for context in ([], [0x78], [0xC3]):
        pieces = token_pieces(decode, context, list(data))
        assert len(pieces) == len(data)
        if context != [0xC3]:
            assert "".join(pieces) == "a é𝄞 b"
            assert pieces[2:4] == ["", "é"]
    assert token_pieces(decode, [], [0x61, 0xF0]) == ["a", "\ufffd"]
    assert token_pieces(decode, [], []) == []


def test_origins_match_by_prefix_and_length() -> None:
    origins = {"1-abc": [1, 2, 0], "11-abc": [2], "2": [1]}
    assert match_origins(origins, "1", 3) == [1, 2, 0]
    assert match_origins(origins, "1", 2) == [1, 2]
    assert match_origins(origins, "2", 3) == [1, 0, 0]
    assert match_origins(origins, "3", 2) == [0, 0]


def test_first_cause() -> None:
    log = (
        "WARNING: nothing\n"
        "(EngineCore pid=7) ERROR 01-01 [core.py:1] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 01-01 [core.py:1] torch.x.OutOfMemoryError: too big: 3\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert first_cause(log) == "OutOfMemoryError: too big: 3"
    assert first_cause("RuntimeError: Engine core initialization failed.\n") is None
    assert first_cause("") is None


def test_one_line() -> None:
    text = (
        "1 validation error for ModelConfig\n  Value error, no such model [type=value_error, "
        "input_value=1]\n    For further information visit https://example.org"
    )
    assert one_line(ValueError(text)) == "ValueError: no such model"
    assert one_line(KeyError("a\nb")).count("\n") == 0
    assert len(one_line(ValueError("x" * 10_000))) == 400


# -- doctor ------------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ouroboros import compat

    monkeypatch.setattr(compat, "environment", lambda: {"python": "3"})
    monkeypatch.setattr(compat, "check_environment", list)
    monkeypatch.setattr(compat, "check_models", lambda *_: [])
    monkeypatch.setattr(doctor, "_platform", lambda: {"platform": "cpu"})
    monkeypatch.setattr(doctor, "broken_packages", list)
    monkeypatch.setattr(doctor, "plugin_state", lambda: ("found", []))
    monkeypatch.setattr(doctor.logging, "disable", lambda _: None)


@pytest.mark.usefixtures("healthy")
def test_doctor_without_problems() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "no problems found" in result.output


@pytest.mark.usefixtures("healthy")
def test_doctor_reports_what_compat_refuses(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    from vllm_ouroboros import compat

    seen = []

    def check(*plan: object) -> list[str]:
        seen.append(plan)
        return ["this cannot work"]

    monkeypatch.setattr(compat, "check_models", check)
    result = invoke(
        "doctor", "--model", model, "--config", '{"draft_model": "d/m", "window_size": 3}'
    )
    assert result.exit_code == 1
    assert "problem: this cannot work" in result.output
    assert seen == [(model, "d/m", {"window_size": 3})]


@pytest.mark.usefixtures("healthy")
def test_doctor_checks_options_without_a_model() -> None:
    assert invoke("doctor", "--config", '{"draft_tokens": 4}').exit_code == 0
    result = invoke("doctor", "--config", json.dumps({"draft_tokens": 0, "unknown": 1}))
    assert result.exit_code == 1
    assert "draft_tokens = 0" in result.output
    assert "unknown: unknown key" in result.output


@pytest.mark.usefixtures("healthy")
def test_doctor_reports_a_check_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ouroboros import compat

    def broken() -> list[str]:
        raise ImportError("no vllm")

    monkeypatch.setattr(compat, "check_environment", broken)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "ImportError: no vllm" in result.output


def test_doctor_refuses_bad_arguments(model: str) -> None:
    for args, message in {
        ("--config", "{"): "--config is not JSON",
        ("--config", "[1]"): "--config must be a JSON object",
        ("--draft-model", model, "--config", '{"draft_model": "x"}'): "exclude each other",
    }.items():
        result = invoke("doctor", *args)
        assert result.exit_code == 2, args
        assert message in result.output
    assert doctor.check_plan(None, model, {}) == [
        "--draft-model can only be checked together with --model"
    ]
    assert "no such folder" in doctor.check_plan("/no/such", None, {})[0]


def test_the_plugin_is_found_unless_filtered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert doctor.plugin_state() == ("found (vllm_ouroboros.plugin:register)", [])
    monkeypatch.setenv("VLLM_PLUGINS", "other,ouroboros")
    assert doctor.plugin_state()[1] == []
    monkeypatch.setenv("VLLM_PLUGINS", "")
    state, problems = doctor.plugin_state()
    assert state == "filtered by VLLM_PLUGINS"
    assert "VLLM_PLUGINS = ''" in problems[0]
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert doctor.plugin_state()[0] == "not found"


def test_packages_that_do_not_match_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "torchaudio":
            raise doctor.PackageNotFoundError
        return "1.0"

    def load(name: str) -> None:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor, "version", installed)
    monkeypatch.setattr(doctor.importlib, "import_module", load)
    assert doctor.broken_packages() == [
        "torchvision 1.0 does not match the installed torch (operator torchvision::nms does not "
        "exist): pip uninstall torchvision"
    ]


# -- documents ---------------------------------------------------------------------------------


def test_the_readme_lists_every_option_with_its_default_and_range() -> None:
    from vllm_ouroboros.config import OuroborosConfig

    text = (Path(__file__).parents[2] / "README.md").read_text()
    found = {
        row[0]: row[1:]
        for row in re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*?) \| .* \|$", text, re.MULTILINE)
    }
    fields = OuroborosConfig.model_fields
    assert list(found) == list(fields)
    for key, (default, limits) in found.items():
        assert json.loads(default) == fields[key].default, key
        bounds = {
            name: getattr(b, name)
            for b in fields[key].metadata
            for name in ("ge", "le")
            if hasattr(b, name)
        }
        if bounds:
            assert limits == f"{bounds['ge']} to {bounds['le']}", key


def test_the_doctor_shows_the_costs_beside_a_pool(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    missing = invoke("doctor", "--costs", str(pool))
    assert missing.exit_code == 2
    assert f"{pool}.costs.json" in missing.output.replace("\n", "")
    (tmp_path / "pool.costs.json").write_text('{"target": {"1": 45.5, "8": 50}, "overhead": 2.25}')
    shown = invoke("doctor", "--costs", str(pool))
    assert shown.exit_code == 0
    assert re.search(r"target +8 +50\.000", shown.output)
    assert re.search(r"overhead +2\.250", shown.output)
    (tmp_path / "pool.costs.json").write_text("[]")
    assert "damaged" in invoke("doctor", "--costs", str(pool)).output
