"""Work that no draft waits for: it is done while the device runs the target's next forward."""

from __future__ import annotations

from collections.abc import Callable


class Deferred:
    """Calls that wait for a forward to be launched, in the order in which they came.

    Args:
        waits: false where the host runs the forwards itself, so that waiting gains nothing; a call
            is then made at once.
    """

    def __init__(self, waits: bool = False) -> None:
        self.waits = waits
        self._calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function later; what it is given must not change until then."""
        if self.waits:
            self._calls.append((function, args))
        else:
            function(*args)

    def drop(self) -> None:
        """Leave out all calls that wait."""
        self._calls = []

    def catch_up(self) -> None:
        """Make all calls that wait."""
        calls, self._calls = self._calls, []
        for function, args in calls:
            function(*args)
