"""Engines in processes of their own: how demo and benchmark start, ask, pause and end them.

The parent's side is `EngineProcess`, the child's `serve`. The child leads a session of its own, so
that its whole group can be stopped and ended. What it says are pairs of a kind ("ready", "done",
"result" or "error") and a value. Neither vLLM nor torch is imported here.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Protocol

_GUARD = "read -r _ <&0; kill -s KILL -- -{0}"  # a stopped engine cannot see that we are gone


class EngineError(Exception):
    """An engine did not start or failed; the message is one line."""


class EngineProcess:
    """An engine in a session of its own.

    Args:
        module: whose ``main`` the process runs; see `serve`.
        spec: what the engine is; it answers once it runs.
        models: names or folders of its models.
        timeout: seconds that it may be silent; None: any.
        verbose: let its log through.

    Raises:
        EngineError: it does not start.
    """

    def __init__(
        self,
        module: str,
        spec: Any,
        models: Iterable[str | None],
        *,
        timeout: float | None = None,
        verbose: bool = False,
    ) -> None:
        self._timeout, self._verbose = timeout, verbose
        self._busy = False
        self._log = tempfile.TemporaryFile(prefix="vllm-ouroboros-")  # noqa: SIM115
        self._connection, theirs = multiprocessing.Pipe()
        self._child = subprocess.Popen(
            [sys.executable, "-c", child_code(module), str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=sys.stderr if verbose else self._log,
            stderr=None if verbose else self._log,
            env=environ(models, verbose=verbose),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.group = self._child.pid  # of its processes
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD.format(self.group)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self.facts: dict[str, Any] = self.ask(spec)
        except BaseException:
            self.end()
            raise

    def ask(self, what: Any, done: Callable[[Any], object] = lambda _: None) -> Any:
        """Its answer; ``done`` hears of its progress, such as how many requests have ended.

        Raises:
            EngineError: it failed, and is of no use any more.
        """
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

    def pause(self) -> None:
        """Stop all its processes where they are: an idle engine of vLLM spins for a second."""
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
            os.killpg(self.group, wanted)


class Served(Protocol):
    """An engine as its own process sees it."""

    facts: dict[str, Any]

    def answer(self, wanted: Any, done: Callable[[Any], object]) -> Any: ...


def serve(events_fd: int, start: Callable[[Any], Served]) -> None:
    """Answer what the parent asks until that is None; the parent keeps our stdin open."""
    connection = Connection(events_fd)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        engine = start(connection.recv())
        connection.send(("ready", engine.facts))
        while (wanted := connection.recv()) is not None:
            answer = engine.answer(wanted, lambda count: connection.send(("done", count)))
            connection.send(("result", answer))
    except EOFError:
        return
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(("error", one_line(error)))


def child_code(module: str) -> str:
    """Python code that runs ``module.main(descriptor)`` with the descriptor of its argument.

    An empty entry of sys.path stands for the working directory, whose files would shadow modules.
    """
    return (
        "import sys; sys.path[:] = filter(None, sys.path); "
        f"from {module} import main; main(int(sys.argv[1]))"
    )


def environ(models: Iterable[str | None], *, verbose: bool) -> dict[str, str]:
    """The environment of an engine's process; what the user has set stays."""
    values = {
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes most of the memory
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not verbose:
        values["VLLM_LOGGING_LEVEL"] = "ERROR"
    if all(name is None or Path(name).is_dir() for name in models):
        values["HF_HUB_OFFLINE"] = "1"
    return values | os.environ


def next_event(
    child: subprocess.Popen[bytes], receive: Connection, timeout: float | None = None
) -> tuple[str, Any]:
    """The child's next event.

    Raises:
        EOFError: it has ended (its own children may hold the pipe).
        TimeoutError: it has been silent for ``timeout`` seconds.
    """
    end = None if timeout is None else time.monotonic() + timeout
    while not receive.poll(0.2):
        if child.poll() is not None and not receive.poll():
            raise EOFError
        if end is not None and time.monotonic() > end:
            raise TimeoutError
    return receive.recv()


def end_group(child: subprocess.Popen[bytes], patience: float = 20) -> None:
    """Let an engine free its workers and shared memory, then end what is left of its group."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(patience)
    with suppress(ProcessLookupError):
        for wanted in [signal.SIGTERM] + [0] * 20 + [signal.SIGKILL]:
            os.killpg(child.pid, wanted)  # ProcessLookupError once the group is empty
            child.poll()
            time.sleep(0.1)
    child.wait()


def end_with_parent() -> None:
    """Run in a thread of the child: end its group once the parent's end of stdin is closed."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def log_cause(log: IO[bytes]) -> str | None:
    """`first_cause` of a log file."""
    log.seek(0)
    return first_cause(log.read().decode(errors="replace"))


def first_cause(log: str) -> str | None:
    """The first error that a log names: an engine's process raises it, the parent repeats it."""
    for line in log.splitlines():
        # "(EngineCore pid=1) ERROR 11-21 07:00:00 [core.py:1] ValueError: too long"
        message = re.sub(r"^(\(\w+ pid=\d+\) ?)?(ERROR [^\]]*\] ?)?", "", line)
        match = re.match(r"(?:\w+\.)*(\w+(?:Error|Exception)): (.+)", message)
        if match and "Engine core initialization failed" not in message:
            return _cut(f"{match[1]}: {match[2]}")
    return None


def one_line(error: BaseException) -> str:
    """Name and message of an error, without line breaks and pydantic's details."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith("For further"))
    text = re.sub(r" \[type=\w+, input_value=.*", "", text)
    text = re.sub(r"^1 validation error for \w+ (Value error, )?", "", text)
    return _cut(f"{type(error).__name__}: {text}")


def _cut(text: str, length: int = 400) -> str:
    return text if len(text) <= length else text[: length - 4] + " ..."


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


def available_memory() -> int:
    """Bytes that new processes can have without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0
