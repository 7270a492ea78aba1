"""Where GPU figures come from: hardware, versions, commit, command. Shared by the GPU scripts.

Run as a program it prints them, and whether vLLM and the plugin load.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from vllm_ouroboros.cli.provenance import commit, cpu_name, versions

PACKAGES = ("vllm-ouroboros", "vllm", "torch", "triton", "flash-attn", "numba")


def require_cuda() -> None:
    """End with one line where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        script = Path(sys.argv[0]).name
        sys.exit(f"{script}: no CUDA device: torch {torch.__version__} sees none")


def origin() -> dict:
    """What each row of a GPU benchmark carries."""
    import torch

    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "gpu_memory_gib": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(*PACKAGES),
        "commit": os.environ.get("COMMIT") or commit(),
        "command": " ".join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def one_line(error: BaseException) -> str:
    """Name and message of an error, cut to a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def loads() -> str:
    """Which worker vLLM would be given here, or why there is none."""
    try:
        from vllm_ouroboros.integration.compat import check_environment, worker

        return "; ".join(check_environment()) or str(worker())
    except Exception as error:
        return one_line(error)


def main() -> None:
    require_cuda()
    found = origin()
    print(json.dumps({"judgments": {**found, "worker": loads()}}))


if __name__ == "__main__":
    main()
