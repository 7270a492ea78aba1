"""How long a CUDA device takes for a forward."""

from __future__ import annotations

import torch


class DeviceTimer:
    """`ForwardTimer` of what a device is told to do; never waits for it."""

    def __init__(self) -> None:
        self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._waits = False

    def __enter__(self) -> None:
        self._began.record()

    def __exit__(self, *_: object) -> None:
        self._ended.record()
        self._waits = True

    def take(self) -> float | None:
        """See `ForwardTimer.take`."""
        if not self._waits or not self._ended.query():
            return None
        self._waits = False
        return self._began.elapsed_time(self._ended) / 1000
