"""Engines of the benchmark as the parent sees them: measured, and at most so many alive.

Only one engine may work at a time: engines that stay alive are stopped while another one works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from vllm_ouroboros.cli.bench.engine import EngineSpec, Place, RunResult, RunSpec, Turns
from vllm_ouroboros.cli.bench.methods import Method
from vllm_ouroboros.cli.engine_process import EngineProcess, group_members, peak_memory


class AnyEngine(Protocol):
    """What the benchmark asks of an engine."""

    facts: dict[str, Any]

    def run(self, run: RunSpec, done: Callable[[int], None]) -> RunResult: ...

    def texts(self, turns: Turns) -> list[str]: ...

    def gap(self, place: Place) -> float | None: ...

    def peak(self) -> int: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def end(self) -> None: ...


class MeasuredEngine(EngineProcess):
    """An `engine.Engine` in a process of its own; see there."""

    def __init__(self, spec: EngineSpec, *, timeout: float, verbose: bool) -> None:
        models = [spec.model, (spec.ouroboros or {}).get("draft_model")]
        super().__init__(
            "vllm_ouroboros.cli.bench.engine", spec, models, timeout=timeout, verbose=verbose
        )

    def run(self, run: RunSpec, done: Callable[[int], None]) -> RunResult:
        """Measure; raises `EngineError`, after which the engine is of no use."""
        for pid in group_members(self.group):
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts anew
        result = self.ask(run, done)
        assert isinstance(result, RunResult)
        return result

    def texts(self, turns: Turns) -> list[str]:
        """Answers as texts; raises `EngineError`."""
        found: list[str] = self.ask(turns)
        return found

    def gap(self, place: Place) -> float | None:
        """By how much vanilla's token leads; raises `EngineError`."""
        found: float | None = self.ask(place)
        return found

    def peak(self) -> int:
        """Largest resident memory since the last run began: bytes, summed over the processes."""
        return peak_memory(self.group)


class Engines:
    """At most ``alive`` engines, of which at most one is not stopped."""

    def __init__(self, alive: int, start: Callable[[Method], AnyEngine]) -> None:
        self._limit, self._start = alive, start
        self._alive: dict[str, AnyEngine] = {}

    def get(self, method: Method, upcoming: Sequence[str]) -> AnyEngine:
        """The method's engine, running; ``upcoming`` are the engines needed next, in order.

        Raises:
            EngineError: it does not start.
        """
        if method.fresh:
            self.drop(method)
        for key, engine in self._alive.items():
            if key != method.engine:
                engine.pause()
        if method.engine in self._alive:
            self._alive[method.engine].resume()
            return self._alive[method.engine]
        later = [*upcoming]
        while len(self._alive) >= self._limit:
            # The one that is needed last, if at all, makes room.
            last = max(self._alive, key=lambda k: later.index(k) if k in later else len(later))
            self._alive.pop(last).end()
        self._alive[method.engine] = self._start(method)
        return self._alive[method.engine]

    def drop(self, method: Method) -> None:
        """End a method's engine, if there is one."""
        engine = self._alive.pop(method.engine, None)
        if engine is not None:
            engine.end()

    def end(self) -> None:
        """End all of them."""
        while self._alive:
            self._alive.popitem()[1].end()
