"""Latencies of the probes, window by window."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from abuse_schedule import Span

TOLERANCE = 0.05


class Latency(NamedTuple):
    """How long a probe took; times are seconds since the load began."""

    probe: int
    at: float
    seconds: float


class Window(NamedTuple):
    """A window beside the first one.

    Attributes:
        span: of the window.
        answers: of probes in it.
        seconds: the mean over probes of each one's median; None without latencies.
        ratio: of that to the same probes' in the first window.
    """

    span: Span
    answers: int
    seconds: float | None
    ratio: float | None

    @property
    def steady(self) -> bool:
        """Whether it is no slower than the first one, as far as it has anything to compare: a pool
        that fills makes later ones faster.
        """
        return self.ratio is None or self.ratio <= 1 + TOLERANCE


def compare(latencies: Iterable[Latency], spans: Sequence[Span]) -> list[Window]:
    """All windows. Medians are taken probe by probe, so that the mix is the same in each."""
    medians: list[dict[int, float]] = []
    counts = []
    known = list(latencies)
    for span in spans:
        found: dict[int, list[float]] = {}
        for one in known:
            if span.begin <= one.at < span.end:
                found.setdefault(one.probe, []).append(one.seconds)
        medians.append({probe: statistics.median(times) for probe, times in found.items()})
        counts.append(sum(map(len, found.values())))
    return [
        Window(span, count, *_beside(found, medians[0]))
        for span, count, found in zip(spans, counts, medians, strict=True)
    ]


def _beside(found: dict[int, float], first: dict[int, float]) -> tuple[float | None, float | None]:
    if not found:
        return None, None
    both = found.keys() & first.keys()
    ratio = sum(found[i] for i in both) / sum(first[i] for i in both) if both else None
    return statistics.fmean(found.values()), ratio
