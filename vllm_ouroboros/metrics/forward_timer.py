"""How long a forward takes."""

from __future__ import annotations

import time
from typing import Protocol


class ForwardTimer(Protocol):
    """Seconds of a ``with`` block, here or on a device that works behind the host."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def take(self) -> float | None:
        """Seconds of the last block; None: not known yet, or taken already."""


class HostTimer:
    """`ForwardTimer` of what the host does."""

    def __init__(self) -> None:
        self._start = 0.0
        self._seconds: float | None = None

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._start

    def take(self) -> float | None:
        """See `ForwardTimer.take`."""
        seconds, self._seconds = self._seconds, None
        return seconds
