"""Latencies of the probes, window by window."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from abuse_schedule import Span
from abuse_slope import BLOCKS, RESAMPLES, moving_blocks

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
        seconds: their median; None without answers.
        ratio: the median of latencies, each divided by the same probe's median in the first window,
            beside that of the first window.
        low, high: its 95 % interval.
    """

    span: Span
    answers: int
    seconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def within(self) -> bool:
        """Whether it is no slower than the first one, as far as it has anything to compare: a pool
        that fills makes later ones faster.
        """
        return self.ratio is None or self.ratio <= 1 + TOLERANCE

    @property
    def slower(self) -> bool:
        """Whether it is slower whatever the luck of what was asked beside its probes."""
        return self.low is not None and self.low > 1 + TOLERANCE


def compare(latencies: Iterable[Latency], spans: Sequence[Span]) -> list[Window]:
    """All windows. Latencies are compared probe by probe, so that the mix does not matter."""
    known = sorted(latencies, key=lambda one: one.at)
    within = [[one for one in known if span.begin <= one.at < span.end] for span in spans]
    times: dict[int, list[float]] = {}
    for one in within[0]:
        times.setdefault(one.probe, []).append(one.seconds)
    usual = {probe: statistics.median(found) for probe, found in times.items()}
    first = _relative(within[0], usual)
    return [
        Window(
            span, len(found), statistics.median(one.seconds for one in found) if found else None,
            *_beside(_relative(found, usual), first),
        )
        for span, found in zip(spans, within, strict=True)
    ]  # fmt: skip


def _relative(latencies: Iterable[Latency], usual: dict[int, float]) -> np.ndarray:
    return np.array([one.seconds / usual[one.probe] for one in latencies if one.probe in usual])


def _beside(
    found: np.ndarray, first: np.ndarray
) -> tuple[float | None, float | None, float | None]:
    """Ratio of the medians, and its interval: neighbours waited in the same queue."""
    if not len(found):
        return None, None, None
    ratio = float(np.median(found) / np.median(first))
    if min(len(found), len(first)) < 4 * BLOCKS:
        return ratio, None, None
    rng = np.random.default_rng(0)
    drawn = [np.median(moving_blocks(values, RESAMPLES, rng), axis=1) for values in (found, first)]
    low, high = np.percentile(drawn[0] / drawn[1], (2.5, 97.5))
    return ratio, float(low), float(high)
