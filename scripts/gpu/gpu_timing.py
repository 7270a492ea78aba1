"""Microseconds of GPU work, without the host's part and with a cold L2 cache."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Median of the repeats."""

    us: float
    how: str  # "graph": replay of a captured graph; "events": launched one by one


class Timer:
    """Times calls with CUDA events.

    Before each repeat a buffer of twice the L2 cache is overwritten; while that runs, the host has
    already queued the start event and the call. The call is replayed from a CUDA graph, so what the
    host needs to launch it does not count; a call that cannot be captured is launched as it is.
    """

    def __init__(self, repeats: int = 20) -> None:
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        self.repeats = repeats
        self.flush = torch.empty(max(2 * l2, 2**27), dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> Timing:
        for _ in range(2):  # compiles
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        run, how = graph.replay, "graph"
        try:
            with torch.cuda.graph(graph):
                call()
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError:
            run, how = call, "events"
            torch.cuda.synchronize()
        pairs = []
        for _ in range(self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return Timing(1000 * median(start.elapsed_time(end) for start, end in pairs), how)

    def floor(self) -> float:
        """What the least call measures: a kernel that sets one byte."""
        one = self.flush[:1]
        return self(one.zero_).us

    def copy_bandwidth(self, size: int = 2**30) -> float:
        """GB/s of a device-to-device copy, bytes read and written; the greatest of three sizes."""
        best = 0.0
        for count in (size // 4, size // 2, size):
            source = torch.ones(count, dtype=torch.int8, device="cuda")
            target = torch.empty_like(source)
            timing = self(lambda source=source, target=target: target.copy_(source))
            best = max(best, 2 * count / timing.us / 1000)
            del source, target
        return best
