"""The events of a run: break something, see what comes of it, mend it, see that all is well."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
from abuse_clock import DAY, ShiftedClock
from abuse_disk import PoolDisk, UnavailableError
from abuse_schedule import Planned
from abuse_servers import Keeper

SAVED, UNSAVED = "ouroboros_pool_saves_total", "ouroboros_pool_save_failures_total"
DAYS = {"clock_forwards": 3, "clock_backwards": -5}
HELD, FOUND_AGAIN = "ouroboros_pool_phrases", 0.9
"""Phrases of an engine, and the part that the next one must have: tenants' own are not saved, nor
what came after the last save."""
SHOWN_SECONDS = 20
"""Within which a save is over and /metrics shows it: counters move with the engine's steps."""

Row = dict[str, Any]


class Events:
    """Makes them happen.

    Args:
        keeper: of the server.
        disk: of the pool's file.
        clock: of the server.
        check: asks all probes after a restart.
        save_seconds: time between two saves of the pool.
        path: gets a line of JSON for each event.

    Attributes:
        rows: of that file.
        checks: what `check` found.
    """

    def __init__(
        self,
        keeper: Keeper,
        disk: PoolDisk,
        clock: ShiftedClock,
        check: Callable[[str], Awaitable[Row]],
        save_seconds: float,
        path: Path,
    ) -> None:
        self._keeper, self._disk, self._clock, self._check = keeper, disk, clock, check
        self._save_seconds, self._path = save_seconds, path
        path.write_text("")
        self.rows: list[Row] = []
        self.checks: list[Row] = []

    async def run(self, plan: Sequence[Planned]) -> None:
        """All of them, one after the other."""
        for event in plan:
            await asyncio.sleep(max(0.0, event.at - self._keeper.now()))
            row: Row = {
                "event": event.name, "planned": round(event.at, 1),
                "at": round(self._keeper.now(), 1), "effect": {}, "problems": [],
            }  # fmt: skip
            try:
                await self._one(event, row)
            except UnavailableError as error:
                row["skipped"] = str(error)
            row["mended"] = round(self._keeper.now(), 1)
            self.rows.append(row)
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)

    async def _one(self, event: Planned, row: Row) -> None:
        if event.name in DAYS:
            await self._jump(event, row)
        elif event.name.endswith("_killed"):
            await self._kill(event, row)
        else:
            await self._spoil(event, row)

    async def _spoil(self, event: Planned, row: Row) -> None:
        """Something about the pool's file: it cannot be saved, and stays as it is."""
        breaking: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "truncated": self._disk.truncated, "garbage": self._disk.garbage,
            "foreign": self._disk.foreign, "unwritable": self._disk.unwritable,
            "full": self._disk.full,
        }  # fmt: skip
        log = self._keeper.life.server.log
        before, size = await self._keeper.counters(), log.stat().st_size
        with breaking[event.name]():
            there = self._disk.digest()
            await asyncio.sleep(event.seconds)
            after = await self._until_more(UNSAVED, before, SHOWN_SECONDS)
            if self._disk.digest() != there:
                row["problems"].append("the file was written")
        row["effect"] = {
            "failed_saves": _more(after, before, UNSAVED),
            "warnings": _warnings(log, size),
        }
        if not row["effect"]["failed_saves"]:
            row["problems"].append("no save failed")
        await self._mended(row, after)

    async def _jump(self, event: Planned, row: Row) -> None:
        """The clock jumps, and back again: nothing comes of it."""
        if self._clock.missing:
            raise UnavailableError(self._clock.missing)
        days = DAYS[event.name]
        before = await self._keeper.counters()
        with self._clock.jumped(days):
            seen = await self._shift()
            await asyncio.sleep(event.seconds)
            after = await self._until_more(SAVED, before, SHOWN_SECONDS)
        row["effect"] = {
            "days": days, "days_seen": round(seen / DAY, 3), "saves": _more(after, before, SAVED),
        }  # fmt: skip
        if abs(seen - days * DAY) > 60:
            row["problems"].append("the server did not see the clock jump")
        if not row["effect"]["saves"]:
            row["problems"].append("no save while the clock was away")
        await self._mended(row, after)

    async def _shift(self) -> float:
        """How far the server's clock is from ours, in seconds."""
        async with httpx.AsyncClient(timeout=60) as client:
            reply = await client.get(f"{self._keeper.url}/v1/models")
        return reply.json()["data"][0]["created"] - time.time()

    async def _kill(self, event: Planned, row: Row) -> None:
        """A process dies, and a server is started again, with the phrases that were saved."""
        held = round((await self._keeper.counters()).get(HELD, 0))
        row["effect"] = await self._keeper.kill(engine=event.name == "engine_killed")
        if row["effect"].pop("left"):
            row["problems"].append("processes outlived it")
        await self._keeper.start()
        log = self._keeper.life.server.log.read_text(errors="replace")
        found = re.search(r"starting with (\d+) phrases", log)
        phrases = int(found[1]) if found else 0
        row["effect"] |= {
            "ready": round(self._keeper.now(), 1), "phrases_before": held, "phrases": phrases
        }  # fmt: skip
        if not held or phrases < FOUND_AGAIN * held:
            row["problems"].append("the new server has not the phrases of the old one")
        self.checks.append(await self._check(event.name))

    async def _mended(self, row: Row, before: dict[str, float]) -> None:
        """Wait until the pool is saved again."""
        patience = 1.2 * self._save_seconds + SHOWN_SECONDS
        if _more(await self._until_more(SAVED, before, patience), before, SAVED):
            row["effect"]["saved_again"] = round(self._keeper.now(), 1)
        else:
            row["problems"].append("the pool was not saved again")

    async def _until_more(
        self, name: str, before: dict[str, float], patience: float
    ) -> dict[str, float]:
        """All counters once one has grown, or after a while."""
        until = self._keeper.now() + patience
        while True:
            now = await self._keeper.counters()
            if _more(now, before, name) or self._keeper.now() > until:
                return now
            await asyncio.sleep(1)


def _more(after: dict[str, float], before: dict[str, float], name: str) -> int:
    return round(after.get(name, 0.0) - before.get(name, 0.0))


def _warnings(log: Path, start: int) -> list[str]:
    """What the log says of the pool's file behind so many bytes."""
    new = log.read_bytes()[start:].decode(errors="replace")
    return re.findall(r"WARNING.*?(pool_path .*)", new)[:3]
