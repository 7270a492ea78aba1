"""Programs that start engines on Ray, on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
import psutil
import pytest

from ..servers import free_port, stop

EXAMPLES = Path(__file__).parents[3] / "examples"
ENGINE = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "block_size": 32,
          "kv_cache_memory_bytes": 2**27, "enforce_eager": True}  # fmt: skip
"""Engine arguments of the engines of such a program."""
START_SECONDS = 400
CLUSTER = """
import sys, ray
ray.init(include_dashboard=False, object_store_memory=200 << 20, num_cpus=CPUS, num_gpus=GPUS)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()  # until whoever started it ends
"""


@contextlib.contextmanager
def ray_cluster(folder: Path, cpus: int, gpus: int = 0, **environment: str) -> Iterator[None]:
    """A Ray cluster, whose address is in the environment, as is what such programs need.

    Args:
        folder: for its log.
        cpus: that Ray takes for granted.
        gpus: the same; there need not be any.
        environment: besides ours, for the cluster and for what is run on it.
    """
    log = folder / "cluster.log"
    with pytest.MonkeyPatch.context() as context, log.open("wb") as output:
        context.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # `kv_cache_memory_bytes` counts
        context.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        context.setenv("RAY_AUTH_MODE", "disabled")
        for name, value in environment.items():
            context.setenv(name, value)
        script = CLUSTER.replace("CPUS", str(cpus)).replace("GPUS", str(gpus))
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", script], cwd=folder, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            address = process.stdout.readline().strip()
            assert address, log.read_text(errors="replace")[-2000:]
            context.setenv("RAY_ADDRESS", address)
            yield
            process.stdin.close()
            process.wait(60)
        finally:
            stop(process)


@contextlib.contextmanager
def serving_on_ray(folder: Path, *more: str) -> Iterator[str]:
    """Base address of examples/serve_ray.py, whose model is called ``tiny``.

    Args:
        folder: for its log.
        more: arguments of the example.
    """
    port, log = serve_port(), folder / "log"
    command = [
        *(sys.executable, "-P", str(EXAMPLES / "serve_ray.py"), "--name", "tiny"),
        *("--port", str(port), "--engine-args", json.dumps(ENGINE), *more),
    ]
    # a shell's background jobs ignore what Ctrl-C sends, and their children do
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
        )
    signal.signal(signal.SIGINT, before)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not _has_models(address):
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"no server:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield address
        os.killpg(server.pid, signal.SIGINT)  # it takes its deployment down, and ends
        server.wait(120)
    finally:
        stop(server)


@cache
def serve_port() -> int:
    """Of Ray Serve: the first program on a cluster says it for all that come later."""
    return free_port()


def _has_models(address: str) -> bool:
    """Whether a server answers and has a model."""
    with contextlib.suppress(httpx.TransportError):
        answer = httpx.get(f"{address}/v1/models", timeout=60)
        return answer.status_code == 200 and bool(answer.json()["data"])
    return False


def processes(title: str) -> list[psutil.Process]:
    """Processes of the cluster with such a title."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if title in " ".join(process.info["cmdline"] or [])
    ]


def below(process: psutil.Process) -> list[psutil.Process]:
    """Its children and theirs."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title_of(process: psutil.Process) -> str:
    """What stands in its command line."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
