"""`vllm-ouroboros doctor`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vllm_ouroboros.cli.doctor import report as doctor

from ..helpers.cli_fakes import invoke


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ouroboros.integration import compat, model_compat

    monkeypatch.setattr(compat, "environment", lambda: {"python": "3"})
    monkeypatch.setattr(compat, "check_environment", list)
    monkeypatch.setattr(model_compat, "check_models", lambda *_: [])
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
    from vllm_ouroboros.integration import model_compat

    seen = []

    def check(*plan: object) -> list[str]:
        seen.append(plan)
        return ["this cannot work"]

    monkeypatch.setattr(model_compat, "check_models", check)
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
    from vllm_ouroboros.integration import compat

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
    assert doctor.plugin_state() == ("found (vllm_ouroboros.integration.plugin:register)", [])
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
