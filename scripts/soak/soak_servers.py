"""Servers of a soak: start, watch and end them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_SECONDS = 600
EXACT = ("--dtype", "float32", "--enforce-eager", "--block-size", "32")
"""What makes texts of servers comparable."""
SIZES = ("--max-model-len", "512", "--max-num-seqs", "16")
VANILLA = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192")
"""Stock vLLM 0.32 ends on the CPU when it has to cut the prompt of a request with a seed."""
PROPOSER = ("--speculative-model", "vllm_ouroboros.OuroborosProposer", "--spec-tokens", "26")
CACHING = ("--enable-prefix-caching", "--enable-chunked-prefill")
OUROBOROS = (
    *PROPOSER, *CACHING, "--max-num-batched-tokens", "512", "--scheduling-policy", "priority",
)  # fmt: skip
KV_BYTES = {"vanilla": 2**27, "ouroboros": 10 * 2**20}
"""Of which the second is too little for 16 long requests: some are preempted."""


class Server:
    """A server in a process group of its own, whose id is that of its first process.

    Args:
        name: of its log.
        flags: of vLLM's OpenAI server.
        folder: where it runs, and where its log is.
        environment: besides ours.
    """

    def __init__(
        self, name: str, flags: Sequence[str], folder: Path, environment: Mapping[str, str] = {}
    ) -> None:
        self.name, self.log = name, folder / f"{name}.log"
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            self.port = held.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--disable-uvicorn-access-log"),
            *flags,
        ]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1", **environment}
        env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it has the last word over the flag
        # not the repository's root, whose `kernels` shadows a package that transformers imports
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=folder, env=env,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ready(self) -> None:
        """Wait until it answers; raises when it has ended or takes too long."""
        async with httpx.AsyncClient(timeout=5) as client:
            for _ in range(2 * START_SECONDS):
                if not self.alive:
                    break
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(f"{self.url}/health")).status_code == 200:
                        return
                await asyncio.sleep(0.5)
        raise RuntimeError(f"the {self.name} server does not start:\n{self.tail()}")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def complaints(self, size: int | None = None) -> list[str]:
        """Errors in the first ``size`` bytes of its log."""
        lines = self.log.read_bytes()[:size].decode(errors="replace").splitlines()
        found = [line for line in lines if re.search(r"\bERROR\b|\bCRITICAL\b|^Traceback", line)]
        return found[:5]

    def stop(self) -> None:
        """End it and everything that it started."""
        for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                break
        with contextlib.suppress(ProcessLookupError):  # children that outlived it
            os.killpg(self.pid, signal.SIGKILL)


def pair_server(name: str, pair: Path, folder: Path) -> Server:
    """A server with the shipped pair, "vanilla" or "ouroboros"."""
    flags: tuple[str, ...] = VANILLA
    if name == "ouroboros":
        options = json.dumps({"draft_model": f"{pair}/draft"})
        flags = (*OUROBOROS, "--ouroboros-config", options)
    kv = ("--kv-cache-memory-bytes", str(KV_BYTES[name]))
    return Server(name, ("--model", str(pair / "target"), *EXACT, *SIZES, *flags, *kv), folder)


def processes(group: int) -> Iterator[tuple[int, list[str]]]:
    """Process id and fields of /proc/PID/stat, from the state on, of each process of a group."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it may end while we read
            # the name, in parentheses, may hold anything
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield int(folder.name), fields


def resident(pid: int) -> dict[int, int]:
    """Resident bytes of each process of the group of a process."""
    size = os.sysconf("SC_PAGE_SIZE")
    return {one: int(fields[21]) * size for one, fields in processes(os.getpgid(pid))}


def cpu_seconds(pid: int) -> float:
    """CPU time of the process group of a process."""
    ticks = sum(int(f[11]) + int(f[12]) for _, f in processes(os.getpgid(pid)))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Memory:
    """Resident memory of a server over time."""

    pid: int
    every: float = 0.5
    samples: list[int] = field(default_factory=list)

    async def watch(self) -> None:
        while True:
            with contextlib.suppress(ProcessLookupError):
                self.samples.append(sum(resident(self.pid).values()))
            await asyncio.sleep(self.every)

    def quarter(self, which: int) -> float:
        """Median of a quarter (0 to 3) of the samples in MB."""
        size = max(1, len(self.samples) // 4)
        return statistics.median(self.samples[which * size : (which + 1) * size] or [0]) / 1e6

    def problems(self) -> list[str]:
        """Growth from the second quarter to the last; the first one is warming up."""
        before, after = self.quarter(1), self.quarter(3)
        if after > 1.05 * before + 20:
            return [f"memory grew from {before:.0f} to {after:.0f} MB"]
        return []


@dataclass
class Guard:
    """Ends a server that emits nothing for too long; its log then has the stacks of all threads."""

    server: Server
    patience: float
    problems: list[str] = field(default_factory=list)

    async def watch(self) -> None:
        seen, since, used = -1.0, 0.0, 0.0
        while True:
            with contextlib.suppress(httpx.HTTPError, ProcessLookupError):
                emitted = (await metrics(self.server.url)).get("vllm:generation_tokens_total", 0.0)
                if emitted != seen:
                    seen, since, used = emitted, time.monotonic(), cpu_seconds(self.server.pid)
                elif time.monotonic() - since > self.patience:
                    used = cpu_seconds(self.server.pid) - used
                    self.problems.append(
                        f"the server emitted nothing for {self.patience:g} s, in which it had "
                        f"{used:.0f} s of CPU: see the stacks in {self.server.log}"
                    )
                    os.killpg(self.server.pid, signal.SIGABRT)
                    return
            await asyncio.sleep(2)


async def metrics(url: str) -> dict[str, float]:
    """Counters and gauges of vLLM and of ours by name, summed over labels."""
    async with httpx.AsyncClient(timeout=60) as client:
        text = (await client.get(f"{url}/metrics")).text
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith(("vllm:", "ouroboros_")):
            name, value = line.split("{", 1)[0], line.rsplit(" ", 1)[1]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


async def idle(url: str, patience: float = 30) -> list[str]:
    """Why a server without clients is not idle: requests or KV blocks that were not let go."""
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    left: dict[str, float] = {}
    for _ in range(int(patience)):
        found = await metrics(url)
        left = {name: found.get(name, 0.0) for name in gauges if found.get(name, 0.0) > 0}
        if not left:
            return []
        await asyncio.sleep(1)
    return [f"the server holds on to what no client waits for: {left}"]
