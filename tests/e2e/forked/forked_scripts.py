"""Scripts that need vLLM, as forks of a process that has imported it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import engine_processes


class Script:
    """A script in a process group of its own, of which it is the first.

    Args:
        code: what runs, as with ``python -c``.
        arguments: it finds them in ``sys.argv``.
        output: file for what it prints and for its errors.
        environment: besides ours.
        given: its standard input.
    """

    def __init__(
        self,
        code: str,
        arguments: Sequence[str],
        output: Path,
        environment: Mapping[str, str] = {},
        given: str = "",
    ) -> None:
        context = engine_processes.Context()
        self._process = context.Process(target=_run, args=(code, [*arguments], str(output), given))
        with mock.patch.dict(os.environ, environment):
            self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Its status, None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        """The same, after its end or so many seconds."""
        self._process.join(seconds)
        return self.poll()


def printed(
    code: str,
    *arguments: str,
    output: Path,
    seconds: float = 600,
    given: str = "",
    **environment: str,
) -> list[str]:
    """The lines of what a script printed; it must end well, and in time."""
    script = Script(code, arguments, output, environment, given)
    status = script.wait(seconds)
    text = output.read_text(errors="replace")
    assert status == 0, f"status {status}:\n{text[-4000:]}"
    return text.splitlines()


def _run(code: str, arguments: list[str], output: str, given: str) -> None:
    os.setpgid(0, 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv, sys.stdin = ["-c", *arguments], io.StringIO(given)
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
