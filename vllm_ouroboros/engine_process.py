"""Processes that hold an engine: how demo and bench start, watch and end them.

The parent reads events, pairs of a kind and a value, from a connection; the child leads a session
of its own, so that its whole group can be ended. Neither vLLM nor torch is imported here.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any


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
