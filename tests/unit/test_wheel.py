"""The wheel: everything that the package needs, and nothing that shadows other packages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: setuptools leaves files beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vllm_ouroboros", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    [built] = out.glob("*.whl")
    return built


def test_a_wheel_has_every_module_and_asset(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        str(Path("vllm_ouroboros", path.relative_to(ROOT / "vllm_ouroboros")))
        for path in (ROOT / "vllm_ouroboros").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {
        f"vllm_ouroboros/kernels/{path.name}"
        for path in (ROOT / "kernels").iterdir()
        if path.suffix in (".py", ".json")
    }
    assert files == wanted


def test_an_installed_wheel_finds_vllm_and_its_own_parts(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has nothing but the wheel; its dependencies stand behind it."""
    venv.create(tmp_path / "venv", with_pip=False)
    bin_ = tmp_path / "venv" / "bin"
    install = [sys.executable, "-P", "-m", "pip", "--python", str(bin_ / "python"), "install"]
    install += ["--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, text=True)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    # a path's own .pth files are not read, so an editable install of this package is not found
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = "import vllm_ouroboros as v, vllm_ouroboros.kernels as k; print(v.__file__, k.__file__)"
    found = subprocess.run(
        [bin_ / "python", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.split()
    assert all(Path(file).is_relative_to(site) for file in found)
    doctor = subprocess.run(
        [bin_ / "vllm-ouroboros", "doctor"], capture_output=True, text=True, cwd=tmp_path
    )
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "found (vllm_ouroboros.integration.plugin:register)" in doctor.stdout
    assert "no problems found" in doctor.stdout
