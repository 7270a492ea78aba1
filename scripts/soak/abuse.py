"""An hour of abuse: a server that is broken in every way, and what becomes of it.

    python scripts/soak/abuse.py --minutes 60 --out build/abuse

A chat model with its draft head (`vllm-ouroboros fetch smollm2 --out build/smollm2`) is served
with 256 connections. 34 clients always wait for an answer: 12 ask the same 40 probes again and
again, whose answers are vanilla's and whose latencies are compared; 22 ask other requests, of all
kinds and lengths, some of which must be refused, and some leave; the kinds come round every few
minutes, so that the load is the same at any time. 12 read slowly, so that six or so more are
in the engine; 210 hold a connection and ask for /health now and then. 32 requests run, and the
queue is short and as long at any time. Before all that each length of prompt up to 300 tokens is
asked once: oneDNN keeps what it made for each number of tokens in a step, 300 MB when its cache is
full, with Ouroboros and without. tcmalloc (Debian: `libtcmalloc-minimal4`) is preloaded if it is
installed, as vLLM asks for on the CPU, and gives back at once what is free: else holes stay between
buffers of many sizes, and memory creeps.

Meanwhile the pool's file is truncated, and replaced by garbage and by another tokenizer's; its
folder is made read-only, and filled (as root: it is a tmpfs); the server's clock jumps forwards and
backwards by days (a preloaded library, compiled here; the machine's clock is left alone); the
engine core is killed, and so is the whole server. A killed server is started again. What cannot be
had is reported as skipped. The pool is saved every two minutes (a usual server saves every five),
more often in a short run, so that each of these meets a save.

The verdicts are printed and lie under --out as report.md and report.json, beside what they rest on:
events.jsonl, failures.jsonl, samples.jsonl, probes.jsonl, and a log for each life of the server.
Memory and latency are judged in runs of 20 minutes and more. The status is 1 if any row fails.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import abuse_verdicts as verdicts
import httpx
from abuse_clients import CONNECTIONS, Crowd
from abuse_clock import ShiftedClock
from abuse_disk import PoolDisk
from abuse_events import Events
from abuse_latencies import Window, compare
from abuse_prompts import ChatPrompts
from abuse_report import Report, write_lines
from abuse_requests import probe_requests
from abuse_schedule import LEAD, WINDOWS, Span, plan, save_seconds, settled, windows
from abuse_servers import ALLOCATOR, EndedError, Keeper, abused_server, vanilla_server
from abuse_slope import Growth, growth
from soak_answers import References, ask
from soak_requests import Request, reference_body
from soak_servers import idle

ROOT = Path(__file__).resolve().parents[2]
JUDGED_MINUTES = 20
SAMPLES = 1800
"""Of memory in a run."""


class Abuse:
    """One run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.seconds = args.minutes * 60
        self.disk, self.clock = PoolDisk(args.out), ShiftedClock(args.out)
        saves = save_seconds(args.minutes)
        self.keeper = Keeper(
            lambda name: abused_server(name, args.target, args.head, self.disk, self.clock, saves)
        )
        self.references = References(args.out / "references.jsonl", args.target)
        prompts = ChatPrompts(args.target)
        self.probes = probe_requests(prompts)
        self.crowd = Crowd(
            self.keeper, prompts, self.probes, self.references, args.seed, args.timeout
        )
        path = args.out / "events.jsonl"
        self.events = Events(self.keeper, self.disk, self.clock, self.crowd.check, saves, path)
        self.plan = plan(args.minutes)
        self.checks: list[dict[str, Any]] = []
        self.left: list[str] = ["not looked"]
        self.why: str | None = "not begun"

    async def run(self) -> None:
        """Do all of it; the server is stopped however it ends."""
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            await self._ask_vanilla()
            await self.keeper.start()
            await self.crowd.warm()
            self.checks.append(await self.crowd.check("start"))
            self.keeper.begin()
            await self._loaded()
            self.left = await idle(self.keeper.url)
            end = await self.crowd.check("end")
            self.checks += [*self.events.checks, end]
            self.keeper.life.counters = await self.keeper.counters()
            self.why = None
        except asyncio.CancelledError:
            self.why = "it was ended from outside"
        except (EndedError, RuntimeError, httpx.HTTPError, OSError) as error:
            self.why = repr(error)
        finally:
            await self.crowd.close()
            self.keeper.stop()
            self.disk.close()

    async def _ask_vanilla(self) -> None:
        """Vanilla's answers to the probes, those that are not known yet."""
        bodies = [reference_body(probe.body) for probe in self.probes]
        missing = [body for body in bodies if self.references.get(body) is None]
        if not missing:
            return
        server = vanilla_server(self.args.target, self.args.out)
        try:
            await server.ready()
            async with httpx.AsyncClient(timeout=self.args.timeout) as client:
                asked = [Request(-1, body) for body in missing]
                answers = await asyncio.gather(
                    *(ask(client, server.url, one, self.args.timeout) for one in asked)
                )
        finally:
            server.stop()
        for body, answer in zip(missing, answers, strict=True):
            if answer["status"] != 200:
                raise RuntimeError(f"vanilla does not answer a probe: {answer}")
            self.references.add(body, answer)

    async def _loaded(self) -> None:
        """The load and the events, until the time is over; ends early with the server."""
        watching = asyncio.create_task(self.keeper.watch(max(0.5, self.seconds / SAMPLES)))
        loading = asyncio.create_task(self.crowd.run(self._all_events))
        try:
            await asyncio.wait({watching, loading}, return_when=asyncio.FIRST_COMPLETED)
            for task in (watching, loading):
                if task.done():
                    task.result()
        finally:
            for task in (watching, loading):
                task.cancel()
            await asyncio.gather(watching, loading, return_exceptions=True)

    async def _all_events(self) -> None:
        await self.events.run(self.plan)
        await asyncio.sleep(max(0.0, self.seconds - self.keeper.now()))

    # -- afterwards ----------------------------------------------------------------------------

    def windows(self) -> list[Window]:
        """Latencies by window, without those after a start of the server; the last one is all that
        comes after the first.
        """
        lives, lead = [life.span for life in self.keeper.lives], LEAD * self.seconds
        kept = [one for one in self.crowd.latencies if settled(one.at, lives, lead)]
        spans = windows(self.seconds)
        return compare(kept, [*spans, Span(spans[0].end, spans[-1].end)])

    def growth(self, number: int) -> Growth:
        """How the memory of a life grew."""
        kept = [s for s in self.keeper.samples if s["life"] == number]
        at, size = [s["at"] for s in kept], [s["bytes"] for s in kept]
        return growth(at, size, self.seconds / WINDOWS)

    def rows(self, found: Sequence[Window]) -> list[verdicts.Row]:
        """The verdicts; ``found`` are the windows."""
        judged = self.args.minutes >= JUDGED_MINUTES
        keeper, counters = self.keeper, [life.counters for life in self.keeper.lives]
        numbers = range(1, len(keeper.lives) + 1)
        longest = max(numbers, key=lambda i: keeper.lives[i - 1].seconds, default=0)
        kills = sum(event.name.endswith("killed") for event in self.plan)
        return [
            verdicts.ended(self.why),
            verdicts.requests(self.crowd.counts, self.crowd.failures),
            verdicts.connected([s["connections"] for s in keeper.samples], CONNECTIONS),
            verdicts.log(keeper.complaints()),
            verdicts.memory(self.growth(longest) if longest else Growth(), judged),
            verdicts.same_texts(self.checks, 2 + kills),
            verdicts.latency(found, judged),
            verdicts.speculation(counters),
            verdicts.events(self.events.rows, len(self.plan)),
            verdicts.own_counters(counters),
            verdicts.at_rest(self.left),
        ]

    def write(self, rows: Sequence[verdicts.Row], found: Sequence[Window]) -> None:
        """Print the verdicts, and write them and what they rest on."""
        out, crowd, keeper = self.args.out, self.crowd, self.keeper
        write_lines(out / "failures.jsonl", crowd.failures)
        write_lines(out / "samples.jsonl", keeper.samples)
        write_lines(out / "probes.jsonl", [one._asdict() for one in crowd.latencies])
        lives = [
            {
                "name": life.server.name, "ready": life.ready, "ended": life.ended,
                "memory": self.growth(i).as_dict(),
                "counters": life.counters,
            }
            for i, life in enumerate(keeper.lives, 1)
        ]  # fmt: skip
        report = Report(
            rows, found, lives, self.events.rows, self.checks, dict(crowd.counts),
            {
                "minutes": self.args.minutes, "seed": self.args.seed,
                "target": self.args.target.name, "malloc": ALLOCATOR or "the C library's",
            },
        )  # fmt: skip
        report.write(out)
        print(report.table())


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "abuse")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=Path, default=ROOT / "build" / "smollm2")
    parser.add_argument("--head", type=Path, default=ROOT / "heads" / "smollm2-135m")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that are a hang")
    args = parser.parse_args(argv)
    for name in ("target", "head", "out"):
        setattr(args, name, getattr(args, name).resolve())
    if not (args.target / "config.json").is_file():
        parser.error(f"--target {args.target}: run `vllm-ouroboros fetch smollm2 --out` there")
    args.out.mkdir(parents=True, exist_ok=True)
    abuse = Abuse(args)
    asyncio.run(abuse.run())
    found = abuse.windows()
    rows = abuse.rows(found)
    abuse.write(rows, found)
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
