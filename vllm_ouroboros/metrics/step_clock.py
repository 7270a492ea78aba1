"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepClock:
    """Host time by phase, in seconds, of the last steps; forwards are ``target`` and ``draft``.

    Args:
        steps: that are kept.
        now: seconds; a simulation has its own.
    """

    def __init__(self, steps: int = 4096, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.history: deque[dict[str, float]] = deque(maxlen=steps)
        self.totals: dict[str, float] = {}
        """Seconds by phase and model since the start."""
        self._current: dict[str, float] = {}
        self._model = 0.0
        self._last = now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block, less the model forwards inside it, to a phase."""
        start, model = self.now(), self._model
        try:
            yield
        finally:
            spent = self.now() - start - (self._model - model)
            self._current[name] = self._current.get(name, 0.0) + spent

    @contextmanager
    def model(self, name: str) -> Iterator[None]:
        """A block that runs a forward of the model of that name; kept apart from host time."""
        start = self.now()
        try:
            yield
        finally:
            spent = self.now() - start
            self._model += spent
            self._current[name] = self._current.get(name, 0.0) + spent

    def end_step(self, batch: int) -> None:
        """Close the record of a step of ``batch`` requests; ``step`` is the time since the last."""
        end = self.now()
        self.history.append({"batch": batch, "step": end - self._last, **self._current})
        for name, seconds in self._current.items():
            self.totals[name] = self.totals.get(name, 0.0) + seconds
        self._current, self._last = {}, end
