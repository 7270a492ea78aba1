"""A randomized soak: no error, no hang, memory flat, and vanilla's answers.

    python scripts/soak/soak.py --requests 2000 --concurrency 16 --seed 0

Sends random requests (`soak_requests.py`) to a server with Ouroboros and checks each answer:
well-formed, and equal to vanilla's where it is deterministic (greedy or with a seed). Clients that
leave early are among them. In the end the server must be healthy and idle, must have speculated,
and its memory must not have grown.

Without --url it starts a server of its own with the shipped pair; KV memory is so small there that
requests are preempted now and then. When it emits nothing for --timeout seconds it is ended, and
its log has the stacks of its threads. Vanilla's answers stay in references.jsonl under --out; a
vanilla server is started (or --vanilla-url asked) when some are missing. Failures go to
failures.jsonl there, with the request and both answers; --only NUMBER... sends just these again.
A server of --url without `--scheduling-policy priority` needs --without priority.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import httpx
from soak_answers import Answer, References, ask
from soak_checks import explain, problems
from soak_requests import Prompts, Request, last_request, random_request, reference_body
from soak_servers import Guard, Memory, Server, idle, metrics, pair_server
from tqdm import tqdm

from vllm_ouroboros.cli.inputs import PAIR

ROOT = Path(__file__).resolve().parents[2]
SHOWN = 10
COUNTED = {
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    "emitted": "vllm:generation_tokens_total",
    "preempted": "vllm:num_preemptions_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
}


class Soak:
    """One run.

    Attributes:
        failures: rows of failures.jsonl.
        counts: figures of the summary, in the order in which they are shown.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.failures: list[dict] = []
        self.counts: dict[str, int | float] = {}
        self._references = References(args.out / "references.jsonl", args.pair / "target")

    async def run(self, requests: list[Request]) -> None:
        args, last = self.args, last_request()
        wanted = [reference_body(r.body) for r in [*requests, last] if r.deterministic]
        missing = [body for body in wanted if self._references.get(body) is None]
        servers = []
        try:
            url, vanilla = args.url, args.vanilla_url
            if missing and vanilla is None:
                servers.append(pair_server("vanilla", args.pair, args.out))
            if url is None:
                servers.append(pair_server("ouroboros", args.pair, args.out))
            await asyncio.gather(*(server.ready() for server in servers))
            by_name = {server.name: server for server in servers}
            if missing:
                started = by_name.get("vanilla")
                await self._ask_vanilla(started.url if started else vanilla, missing)
                if started:
                    started.stop()
            started = by_name.get("ouroboros")
            await self._watched(started.url if started else url, requests, last, started)
        finally:
            for server in servers:
                server.stop()

    async def _ask_vanilla(self, url: str, bodies: list[dict]) -> None:
        async def one(client: httpx.AsyncClient, body: dict) -> None:
            answer = await ask(client, url, Request(-1, body), self.args.timeout)
            if answer["status"] == 0:
                raise RuntimeError(f"vanilla has no answer to {json.dumps(body)}: {answer}")
            self._references.add(body, answer)

        await self._each(one, bodies, "vanilla")

    async def _watched(
        self, url: str, requests: list[Request], last: Request, server: Server | None
    ) -> None:
        """The soak itself and what is looked at besides."""
        pid = server.pid if server else self.args.pid
        memory = Memory(pid) if pid else None
        guard = Guard(server, self.args.timeout) if server else None
        watchers = [asyncio.create_task(one.watch()) for one in (memory, guard) if one]
        before, start = await metrics(url), time.monotonic()

        async def one(client: httpx.AsyncClient, request: Request) -> None:
            if server is None or server.alive:
                self._check(request, await ask(client, url, request, self.args.timeout))
            else:
                self.counts["not_sent"] = self.counts.get("not_sent", 0) + 1

        await self._each(one, requests, "ouroboros")
        self.counts["seconds"] = round(time.monotonic() - start, 1)
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        if guard:
            self._fail_if(guard.problems)
        if memory:
            self.counts["memory_second_quarter_mb"] = round(memory.quarter(1), 1)
            self.counts["memory_last_quarter_mb"] = round(memory.quarter(3), 1)
            if len(requests) >= self.args.memory_from:
                self._fail_if(memory.problems())
        try:
            self._fail_if(await idle(url))
            await self._each(one, [last], "last")
            await self._explain(url)
            after = await metrics(url)
        except httpx.HTTPError as error:
            self._fail_if([f"the server is gone: {error!r}"])
        else:
            for name, metric in COUNTED.items():
                self.counts[name] = int(after.get(metric, 0) - before.get(metric, 0))
            if not self.counts["accepted"]:
                self._fail_if(["no drafted token was accepted: the server does not speculate"])
        if server:
            self._fail_if([f"in {server.log}: {line}" for line in server.complaints()])

    async def _each(self, work, items: list, name: str) -> None:
        """Do the work on every item, --concurrency at a time."""
        queue = iter(items)
        limits = httpx.Limits(max_connections=None)
        bar = tqdm(total=len(items), desc=name, disable=None if len(items) > 1 else True)
        async with httpx.AsyncClient(timeout=self.args.timeout, limits=limits) as client:

            async def worker() -> None:
                for item in queue:
                    await work(client, item)
                    bar.update()
                    if name == "ouroboros":
                        bar.set_postfix(failures=len(self.failures))

            await asyncio.gather(*(worker() for _ in range(self.args.concurrency)))
        bar.close()

    def _check(self, request: Request, answer: Answer) -> None:
        def count(key: str, by: bool | int = True) -> None:
            self.counts[key] = self.counts.get(key, 0) + int(by)

        expected = None
        if request.deterministic:
            expected = self._references.get(reference_body(request.body))
        if answer["status"] == 200 or answer.get("left"):
            count("left" if answer.get("left") else "completed")
            count("compared", expected is not None)
            count("sampled", request.sampled)
            count("structured", "structured_outputs" in request.body)
        else:
            count("refused_by_vanilla_too", expected is not None and expected["status"] != 200)
        self._fail_if(problems(request, answer, expected), request, answer, expected)

    def _fail_if(
        self,
        found: list[str],
        request: Request | None = None,
        answer: Answer | None = None,
        expected: Answer | None = None,
    ) -> None:
        if not found:
            return
        row: dict = {"problems": found}
        if request is not None:
            leave = {
                "after_pieces": request.leave_after_pieces,
                "after_seconds": request.leave_after_seconds,
            }
            row = {"number": request.index, **row, "body": request.body, "leave": leave}
            row |= {"answer": answer, "expected": expected}
        self.failures.append(row)

    async def _explain(self, url: str) -> None:
        """What the model thinks of the tokens where a text leaves vanilla's."""
        async with httpx.AsyncClient(timeout=self.args.timeout) as client:
            for row in self.failures[:SHOWN]:
                if row.get("answer") and row.get("expected"):
                    asked = (client, url, self.args.timeout)
                    row["problems"] += await explain(*asked, row["answer"], row["expected"])

    def report(self) -> None:
        """Print the figures and the first failures, and write all failures to their file."""
        path = self.args.out / "failures.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.failures))
        for name, value in self.counts.items():
            print(f"{name:>26}  {value}")
        for row in self.failures[:SHOWN]:
            where = f"request {row['number']}" if "number" in row else "the run"
            print(f"FAILED {where}: " + "\n    ".join(p[:600] for p in row["problems"]))
            if "body" in row:
                short = {k: v for k, v in row["body"].items() if k != "prompt"}
                print(f"    {json.dumps(short)[:600]}")
        if self.failures:
            print(f"{len(self.failures)} failures, all of them in {path}")
        else:
            print("no failures")


def main(argv: list[str] | None = None) -> int:
    """Run a soak; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the requests to send")
    parser.add_argument("--without", default="", help="body fields to leave out, a,b,c; or abort")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that are a hang")
    parser.add_argument("--url", help="a running server with Ouroboros on the same pair")
    parser.add_argument("--vanilla-url", help="a running server without it")
    parser.add_argument("--pid", type=int, help="of the server of --url: watch its memory")
    parser.add_argument("--pair", type=Path, default=PAIR, help="folder with target and draft")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "soak")
    parser.add_argument(
        "--memory-from", type=int, default=500,
        help="judge memory in runs of so many requests; shorter ones are warming up",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = Prompts(args.pair / "target")
    without = frozenset(filter(None, args.without.split(",")))
    numbers = args.only if args.only is not None else range(args.requests)
    requests = [random_request(i, args.seed, prompts, without) for i in numbers]
    soak = Soak(args)
    asyncio.run(soak.run(requests))
    soak.report()
    return 1 if soak.failures else 0


if __name__ == "__main__":
    sys.exit(main())
