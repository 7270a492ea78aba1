"""A wall clock that jumps, for the processes of one server alone.

The machine's clock is never touched: a small library (`abuse_clock.c`, compiled here) is preloaded
into the server. libfaketime 0.9.10 is of no use: under it `time.sleep` of Python 3.11 raises.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("abuse_clock.c")
DAY = 86400


class ShiftedClock:
    """A shift of the wall clock that a server takes from a file.

    Args:
        folder: gets the library and the file.

    Attributes:
        missing: why there is no such clock; empty if there is one.
    """

    def __init__(self, folder: Path) -> None:
        self._library, self._file = folder / "abuse_clock.so", folder / "abuse_clock.shift"
        self.missing = self._compile()
        self.set(0)

    def _compile(self) -> str:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            return "there is no C compiler for the library that shifts the clock"
        command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(self._library), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        return f"{SOURCE.name} does not compile: {done.stderr[:300]}" if done.returncode else ""

    @property
    def environment(self) -> dict[str, str]:
        """What a server needs in its environment to have this clock."""
        if self.missing:
            return {}
        return {"LD_PRELOAD": str(self._library), "ABUSE_CLOCK": str(self._file)}

    def set(self, seconds: int) -> None:
        """Shift the clock, to so many seconds from the real one."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("=q", seconds))

    @contextmanager
    def jumped(self, days: float) -> Iterator[None]:
        """A block in which the clock is so many days away."""
        self.set(round(days * DAY))
        try:
            yield
        finally:
            self.set(0)
