"""The abused server through all its lives, and the one whose answers are right."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes.util
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abuse_clock import ShiftedClock
from abuse_disk import PoolDisk
from abuse_requests import CONTEXT
from abuse_schedule import Outage, Span
from soak_servers import CACHING, EXACT, PROPOSER, VANILLA, Server, metrics, processes, resident

ENGINE = b"VLLM::EngineCore"
SIZES = ("--max-model-len", str(CONTEXT), "--max-num-seqs", "32")
KV_BYTES = ("--kv-cache-memory-bytes", str(2**29))
"""Room for 11,600 tokens: enough for 32 usual requests, so that preemptions are rare."""
POOL_CAPACITY = 2**14
"""Keys of the pool: so few that it is full within minutes. A pool that fills takes more memory, and
so does each save of it; what grows afterwards is not the pool."""
DYING_SECONDS = 60
ALLOCATOR = ctypes.util.find_library("tcmalloc_minimal")
"""What vLLM asks for on the CPU in place of the C library's malloc; None if it is not installed."""


class EndedError(Exception):
    """The server ended although nobody killed it."""


def vanilla_server(target: Path, folder: Path) -> Server:
    """A server without Ouroboros."""
    return Server("vanilla", ("--model", str(target), *EXACT, *SIZES, *VANILLA, *KV_BYTES), folder)


def abused_server(
    name: str, target: Path, head: Path, disk: PoolDisk, clock: ShiftedClock, save_seconds: float
) -> Server:
    """A server with Ouroboros, whose clock may be shifted and whose pool is saved often."""
    options = json.dumps(
        {"draft_model": str(head), "pool_path": str(disk.path), "pool_capacity": POOL_CAPACITY}
    )
    flags = (
        *("--model", str(target), *EXACT, *SIZES, *KV_BYTES, *CACHING, *PROPOSER),
        *("--max-num-batched-tokens", "1024", "--ouroboros-config", options),
        *("--worker-extension-cls", "abuse_worker.Extension"),
    )
    environment = {
        "PYTHONPATH": str(Path(__file__).parent),
        "ABUSE_SAVE_SECONDS": str(save_seconds),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # vLLM hangs up on idle clients after 5 s
        "TCMALLOC_AGGRESSIVE_DECOMMIT": "1",  # what is free goes back: what grows is in use
        **clock.environment,
    }
    preloaded = (environment.get("LD_PRELOAD"), ALLOCATOR)
    environment["LD_PRELOAD"] = ":".join(filter(None, preloaded))
    return Server(name, flags, disk.path.parents[1], environment)


@dataclass
class Life:
    """A server from its start to its end; times are seconds since the load began.

    Attributes:
        ready: when it answered.
        ended: when it was killed or stopped.
        sound: bytes of its log until then; what follows is about its end.
        counters: what /metrics showed last.
    """

    server: Server
    ready: float
    ended: float | None = None
    sound: int | None = None
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def span(self) -> Span:
        """When it answered under load."""
        begin = max(0.0, self.ready)
        return Span(begin) if self.ended is None else Span(begin, self.ended)

    @property
    def seconds(self) -> float:
        """How long it answered."""
        return self.ended - self.span.begin if self.ended is not None else 0.0


class Keeper:
    """Starts the server again whenever it was killed.

    Args:
        start: makes a server of a name.

    Attributes:
        lives: of the server, the present one last.
        outages: times without a server.
        up: set while there is one.
        samples: resident bytes and connections over time, with the number of the life.
    """

    def __init__(self, start: Callable[[str], Server]) -> None:
        self._start = start
        self._zero = time.monotonic()
        self.lives: list[Life] = []
        self.outages: list[Outage] = []
        self.up = asyncio.Event()
        self.samples: list[dict[str, Any]] = []

    def begin(self) -> None:
        """The load begins: times count from here."""
        self._zero, was = time.monotonic(), self._zero
        for life in self.lives:
            life.ready -= self._zero - was

    def now(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._zero

    @property
    def life(self) -> Life:
        """The present life."""
        return self.lives[-1]

    @property
    def url(self) -> str:
        """Of the present server."""
        return self.life.server.url

    async def start(self) -> None:
        """Start a server and wait for it."""
        server = self._start(f"ouroboros-{len(self.lives) + 1}")
        self.lives.append(Life(server, self.now()))
        await server.ready()
        self.life.ready = self.now()
        if self.outages:
            self.outages[-1] = Outage(self.outages[-1].begin, self.now())
        self.up.set()

    async def kill(self, engine: bool) -> dict[str, Any]:
        """Kill the engine core or the whole server, and wait until nothing of it is left.

        Returns:
            How long that took, and what had to be killed because it did not end.
        """
        life, group = self.life, self.life.server.pid
        life.counters = await self.counters()
        killed = self._engines(group) if engine else []
        life.sound = life.server.log.stat().st_size
        life.ended = self.now()
        self.up.clear()
        self.outages.append(Outage(life.ended))
        if engine:
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        else:
            os.killpg(group, signal.SIGKILL)
        left = await self._gone(group)
        took = round(self.now() - life.ended, 1)
        await asyncio.to_thread(life.server.stop)
        return {"killed": killed or [group], "gone_after_seconds": took, "left": left}

    @staticmethod
    def _engines(group: int) -> list[int]:
        found = []
        for pid, _ in processes(group):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(ENGINE):
                    found.append(pid)
        return found

    async def _gone(self, group: int) -> int:
        """How many processes of a group are left after a while."""
        left = 0
        for _ in range(2 * DYING_SECONDS):
            self.life.server.process.poll()  # or it stays, ended
            left = sum(fields[0] != "Z" for _, fields in processes(group))
            if not left:
                break
            await asyncio.sleep(0.5)
        return left

    def stop(self) -> None:
        """End the present server, if there is one."""
        self.up.clear()
        for life in self.lives[-1:]:
            if life.ended is None:
                life.ended, life.sound = self.now(), life.server.log.stat().st_size
            life.server.stop()

    async def counters(self) -> dict[str, float]:
        """What /metrics shows."""
        return await metrics(self.url)

    async def watch(self, every: float) -> None:
        """Sample memory and connections; raises `EndedError` if the server ends by itself."""
        while True:
            if self.up.is_set():
                server = self.life.server
                if not server.alive and self.up.is_set():
                    raise EndedError(f"{server.name} ended with {server.process.returncode}")
                with contextlib.suppress(ProcessLookupError):
                    each = resident(server.pid)
                    self.samples.append(
                        {
                            "at": round(self.now(), 1), "life": len(self.lives),
                            "bytes": sum(each.values()), "each": each,
                            "connections": connections(server.port),
                        }
                    )  # fmt: skip
            await asyncio.sleep(every)

    def complaints(self) -> list[str]:
        """Errors in the logs of all lives, as far as nobody had killed them."""
        return [
            f"{life.server.name}: {line}"
            for life in self.lives
            for line in life.server.complaints(life.sound)
        ]


def connections(port: int) -> int:
    """Connections that are open to a port of this machine."""
    end, established = f":{port:04X}", "01"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(row[1].endswith(end) and row[3] == established for row in rows)
