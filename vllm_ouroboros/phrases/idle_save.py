"""Saving while an engine has nothing to do, so that one that is killed loses little."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress


class IdleSave:
    """Calls ``save`` in a thread, ``delay_s`` seconds after the engine fell idle.

    Whoever changes what is saved calls `busy` first: it comes back once no save reads that. vLLM
    kills an engine process that does not end in five seconds, and then nothing is saved at its end.
    """

    def __init__(self, save: Callable[[], object], delay_s: float = 1.0) -> None:
        self._save = save
        self._delay_s = delay_s
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def busy(self) -> None:
        """The engine has work: no save starts until it is idle again."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def idle(self) -> None:
        """The engine has no work left."""
        self.busy()
        self._timer = timer = threading.Timer(self._delay_s, self._run)
        timer.args = [timer]
        timer.daemon = True
        with suppress(RuntimeError):  # no thread to be had: the periodic save and the last one stay
            timer.start()

    def _run(self, timer: threading.Timer) -> None:
        with self._lock:
            if self._timer is timer:
                self._timer = None
                self._save()
