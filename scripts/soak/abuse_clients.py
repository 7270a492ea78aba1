"""Clients of the abused server: each one asks, waits for its answer, and asks again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
from abuse_latencies import Latency
from abuse_prompts import ChatPrompts
from abuse_requests import Asked, abuse_request, slow_request, warming_requests
from abuse_schedule import excuse
from abuse_servers import Keeper
from soak_answers import Answer, References, ask
from soak_checks import explain, problems
from soak_requests import Request, reference_body

CONNECTIONS = 256
PROBERS, TALKERS, SLOW = 12, 22, 12
IDLE = CONNECTIONS - PROBERS - TALKERS - SLOW
"""The others ask for /health now and then. So 34 requests and those that the slow readers wait for
are in the engine, of which 32 run: a queue of constant length."""
IDLE_SECONDS = (20, 60)
EXPLAINED = 20


class Crowd:
    """All clients.

    Args:
        keeper: of the server.
        prompts: for what they ask.
        probes: requests with known answers.
        references: vanilla's answers to them.
        seed: of what they ask.
        timeout: seconds that are a hang.

    Attributes:
        counts: what became of requests.
        failures: rows of failures.jsonl.
        latencies: of probes that nothing has interrupted.
    """

    def __init__(
        self,
        keeper: Keeper,
        prompts: ChatPrompts,
        probes: Sequence[Request],
        references: References,
        seed: int,
        timeout: float,
    ) -> None:
        self.keeper, self.prompts, self.probes = keeper, prompts, probes
        self._references, self._seed, self._timeout = references, seed, timeout
        self._numbers = itertools.count()
        self._stopping = False
        self._client = httpx.AsyncClient(
            timeout=timeout,
            limits=httpx.Limits(max_connections=None),
            verify=False,
            trust_env=False,
        )
        self.counts: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.latencies: list[Latency] = []

    async def run(self, until: Callable[[], Awaitable[None]]) -> None:
        """Be there until something is over; what is asked by then is waited for."""
        asking = [asyncio.create_task(self._prober(i)) for i in range(PROBERS)]
        asking += [asyncio.create_task(self._talker()) for _ in range(TALKERS)]
        others = [asyncio.create_task(self._slow(i)) for i in range(SLOW)]
        others += [asyncio.create_task(self._idle(i)) for i in range(IDLE)]
        try:
            await until()
            self._stopping = True
            await asyncio.gather(*asking)
        finally:
            everyone = left = {*asking, *others}
            while left:  # `wait_for` of Python 3.11 may lose a cancellation
                for task in left:
                    task.cancel()
                _, left = await asyncio.wait(left, timeout=5)
            for task in everyone:
                if not task.cancelled() and (error := task.exception()):
                    self._fail(None, [f"a client ended with {error!r}"])

    async def close(self) -> None:
        """Hang up."""
        await self._client.aclose()

    # -- kinds of clients ----------------------------------------------------------------------

    async def _prober(self, number: int) -> None:
        order = list(range(len(self.probes)))
        random.Random(f"{self._seed}:{number}").shuffle(order)
        for i in itertools.cycle(order):
            if self._stopping:
                return
            begun = self.keeper.now()
            if await self._have(Asked("probe", self.probes[i])) == (True, True):
                self.latencies.append(Latency(i, begun, self.keeper.now() - begun))

    async def _talker(self) -> None:
        while not self._stopping:
            await self._have(abuse_request(next(self._numbers), self._seed, self.prompts))

    async def _slow(self, number: int) -> None:
        for i in itertools.count(number, SLOW):
            await self._have(slow_request(i, self._seed, self.prompts))

    async def _idle(self, number: int) -> None:
        """Hold a connection, and open it again when the server went away."""
        rng = random.Random(number)
        await asyncio.sleep(rng.uniform(0, 5))  # not all at once
        while True:
            await self.keeper.up.wait()
            begun = self.keeper.now()
            why = await self._held(rng)
            if excuse(self.keeper.outages, begun, self.keeper.now()) is None:
                self._fail(None, [f"an idle connection was lost: {why}"])
            await asyncio.sleep(0.5)

    async def _held(self, rng: random.Random) -> str:
        """Hold a connection until it is lost; why it was."""
        port = self.keeper.life.server.port
        writer = None
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while True:
                writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self._timeout)
                if not head.startswith(b"HTTP/1.1 200"):
                    return head.decode(errors="replace")[:100]
                self.counts["idle"] += 1
                with contextlib.suppress(asyncio.TimeoutError):
                    if not await asyncio.wait_for(reader.read(1), rng.uniform(*IDLE_SECONDS)):
                        return "the server hung up"
                    return "the server said something unasked"
        except (TimeoutError, OSError, EOFError) as error:
            return repr(error)
        finally:
            if writer is not None:
                writer.close()

    # -- asking --------------------------------------------------------------------------------

    async def warm(self) -> None:
        """Ask for one prompt of each length after the other: what the engine caches by the number
        of tokens in a step is full afterwards. Raises `RuntimeError` if one is not answered.
        """
        for request in warming_requests(self.prompts.vocabulary):
            answer = await ask(self._client, self.keeper.url, request, self._timeout)
            if answer["status"] != 200:
                raise RuntimeError(f"no answer to a prompt of {request.index + 1} tokens: {answer}")

    async def check(self, when: str) -> dict[str, Any]:
        """Ask all probes once; how many answers were vanilla's."""
        asked = [Asked("probe", probe) for probe in self.probes]
        found = await asyncio.gather(*map(self._have, asked))
        right = sum(sound for sound, _ in found)
        return {"when": when, "at": round(self.keeper.now(), 1), "right": right, "of": len(found)}

    def _count(self, asked: Asked, answer: Answer) -> None:
        """Count an answer by what became of it, and by what was asked."""
        counts, body = self.counts, asked.request.body
        counts["left" if answer.get("left") else "answered"] += 1
        counts["left mid-stream"] += bool(answer.get("left") and answer["choices"])
        counts[asked.kind] += 1
        counts["sampled"] += asked.request.sampled
        counts["with a grammar"] += "structured_outputs" in body
        counts["of several choices"] += body.get("n", 1) > 1

    async def _have(self, asked: Asked) -> tuple[bool, bool]:
        """Ask until there is an answer, again after each outage.

        Returns:
            Whether the answer is as it should be, and whether it came to the first question.
        """
        at_once = True
        while True:
            begun = self.keeper.now()
            answer = await ask(self._client, self.keeper.url, asked.request, self._timeout)
            found = self._problems(asked, answer)
            lost = answer["status"] in (0, 500, 502, 503)
            lost = lost and not answer.get("left") and not answer.get("hung")
            why = excuse(self.keeper.outages, begun, self.keeper.now()) if lost else None
            if why is None:
                break
            at_once = False
            self.counts[why] += 1
            await asyncio.sleep(1)
            await self.keeper.up.wait()
        self._count(asked, answer)
        if found:
            if lost:
                await asyncio.sleep(1)  # there is no server, or a broken one
            if answer["choices"] and len(self.failures) < EXPLAINED:
                found += await self._explained(asked, answer)
            self._fail(asked, found, answer)
        return not found, at_once

    def _expected(self, asked: Asked) -> Answer | None:
        if asked.kind != "probe":
            return None
        return self._references.get(reference_body(asked.request.body))

    def _problems(self, asked: Asked, answer: Answer) -> list[str]:
        if asked.refusal is None:
            return problems(asked.request, answer, self._expected(asked))
        told = str(answer.get("error"))
        if answer["status"] == 400 and asked.refusal in told:
            return []
        return [f"{answer['status']} {told[:200]} and not a 400 that says {asked.refusal!r}"]

    async def _explained(self, asked: Asked, answer: Answer) -> list[str]:
        expected = self._expected(asked)
        if expected is None:
            return []
        return await explain(self._client, self.keeper.url, self._timeout, answer, expected)

    def _fail(self, asked: Asked | None, found: list[str], answer: Answer | None = None) -> None:
        row: dict[str, Any] = {"at": round(self.keeper.now(), 1), "problems": found}
        if asked is not None:
            row |= {"kind": asked.kind, "number": asked.request.index, "body": asked.request.body}
            row |= {"answer": answer, "expected": self._expected(asked)}
        self.failures.append(row)
