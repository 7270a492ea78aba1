"""The command line without an engine: options, errors, the demo's report, the doctor's findings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ..helpers.cli_fakes import invoke


def test_help_and_version_import_neither_vllm_nor_torch() -> None:
    code = (
        "import sys\n"
        "from vllm_ouroboros.cli import main as cli\n"
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
