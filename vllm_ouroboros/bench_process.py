"""Engines of the benchmark as the parent sees them: started, asked, paused, ended.

Only one engine may work at a time. An idle engine of vLLM spins for up to a second, so engines
that stay alive are stopped (SIGSTOP) while another one works.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from vllm_ouroboros.bench_engine import EngineSpec, Place, RunResult, RunSpec
from vllm_ouroboros.bench_methods import Method
from vllm_ouroboros.engine_process import child_code, end_group, environ, log_cause, next_event

_CHILD = child_code("vllm_ouroboros.bench_engine")
_GUARD = "read -r _ <&0; kill -s KILL -- -{0}"  # a stopped engine cannot see that we are gone


class EngineError(Exception):
    """An engine did not start or failed; the message is one line."""


class AnyEngine(Protocol):
    """What the benchmark asks of an engine."""

    facts: dict[str, Any]

    def run(self, run: RunSpec, done: Callable[[int], None]) -> RunResult: ...

    def gap(self, place: Place) -> float | None: ...

    def peak(self) -> int: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def end(self) -> None: ...


class EngineProcess:
    """An engine in a session of its own; ``timeout`` is how many seconds it may be silent."""

    def __init__(self, spec: EngineSpec, *, timeout: float, verbose: bool) -> None:
        self._timeout, self._verbose = timeout, verbose
        self._busy = False
        self._log = tempfile.TemporaryFile(prefix="vllm-ouroboros-")  # noqa: SIM115
        self._connection, theirs = multiprocessing.Pipe()
        models = [spec.model, (spec.ouroboros or {}).get("draft_model")]
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=sys.stderr if verbose else self._log,
            stderr=None if verbose else self._log,
            env=environ(models, verbose=verbose),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD.format(self._child.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self.facts: dict[str, Any] = self._ask(spec, lambda _: None)
        except BaseException:
            self.end()
            raise

    def run(self, run: RunSpec, done: Callable[[int], None]) -> RunResult:
        """Measure; raises `EngineError`, after which the engine is of no use."""
        for pid in group_members(self._child.pid):
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM starts anew
        result = self._ask(run, done)
        assert isinstance(result, RunResult)
        return result

    def gap(self, place: Place) -> float | None:
        """See `bench_engine.Engine.gap`; raises `EngineError`."""
        found: float | None = self._ask(place, lambda _: None)
        return found

    def peak(self) -> int:
        """Largest resident memory since the last run began: bytes, summed over the processes."""
        return peak_memory(self._child.pid)

    def pause(self) -> None:
        """Stop all its processes where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End all its processes; an idle engine frees what it holds itself."""
        self.resume()
        if self._busy:
            self._child.terminate()
        with suppress(OSError):
            self._connection.send(None)
        end_group(self._child)
        self._guard.kill()
        self._guard.wait()
        for stream in (self._child.stdin, self._guard.stdin):
            if stream is not None:
                stream.close()
        self._connection.close()
        self._log.close()

    def _signal(self, wanted: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, wanted)

    def _ask(self, what: EngineSpec | RunSpec | Place, done: Callable[[int], None]) -> Any:
        hint = "" if self._verbose else " (--verbose shows the log)"
        try:
            self._connection.send(what)
            self._busy = True
            while True:
                kind, value = next_event(self._child, self._connection, self._timeout)
                if kind == "error":
                    if "Engine core initialization failed" in value:
                        value = log_cause(self._log) or value
                    raise EngineError(value + hint)
                if kind != "done":
                    self._busy = False
                    return value
                done(value)
        except TimeoutError:
            self._child.kill()
            raise EngineError(f"silent for {self._timeout:.0f} s (--timeout){hint}") from None
        except (EOFError, OSError):
            cause = log_cause(self._log) or f"ended with status {self._child.wait()}"
            raise EngineError(cause + hint) from None


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


def group_members(group: int) -> Iterator[int]:
    """The processes of a process group."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):  # it may end while we read
            # the name, in parentheses, may hold anything
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                yield int(folder.name)


def peak_memory(group: int) -> int:
    """Bytes of the largest resident set of each process of a group, summed."""
    total = 0
    for pid in group_members(group):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += 1024 * int(line.split()[1])
    return total
