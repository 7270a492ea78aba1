"""A line through what was sampled over time, and how sure its slope is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
BLOCKS = 8
"""Blocks that samples are resampled in, at least: one is longer than what repeats (a save)."""
METHOD = f"least squares; moving-block bootstrap of its residuals, {RESAMPLES} resamples"


@dataclass(frozen=True)
class Slope:
    """Growth per hour with its 95 % interval, and the mean of what grows."""

    per_hour: float
    low: float
    high: float
    mean: float

    @property
    def flat(self) -> bool:
        """Whether it is surely below 1 % of the mean."""
        return self.high < 0.01 * self.mean

    def as_dict(self) -> dict[str, float | bool]:
        """For a file."""
        return {**asdict(self), "flat": self.flat}

    def __str__(self) -> str:
        """In MB."""
        found, low, high = self.per_hour / 1e6, self.low / 1e6, self.high / 1e6
        return f"{found:+.1f} MB an hour (95 %: {low:+.1f} to {high:+.1f})"


def slope(seconds: Sequence[float], values: Sequence[float], seed: int = 0) -> Slope | None:
    """The growth of values over time; None with too few of them.

    Neighbouring samples say much the same, so residuals are drawn in runs of neighbours, which keep
    that likeness.
    """
    hours, y = np.asarray(seconds, float) / 3600, np.asarray(values, float)
    if len(y) < 4 * BLOCKS:
        return None
    centered = hours - hours.mean()
    square = float(centered @ centered)
    growth = float(centered @ y) / square
    residuals = y - y.mean() - growth * centered
    rng = np.random.default_rng(seed)
    drawn = moving_blocks(residuals, RESAMPLES, rng)
    low, high = np.percentile(growth + drawn @ centered / square, (2.5, 97.5))
    return Slope(growth, float(low), float(high), float(y.mean()))


@dataclass(frozen=True)
class Growth:
    """How the memory of a server grew; None where its life was too short.

    A leak goes on in the latter half of a life; a step before it does not.

    Attributes:
        warm: without the first minutes.
        latter: in the latter half.
    """

    warm: Slope | None = None
    latter: Slope | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        both = {"warm": self.warm, "latter": self.latter}
        return {name: found.as_dict() if found else None for name, found in both.items()}


def growth(seconds: Sequence[float], values: Sequence[float], warming: float) -> Growth:
    """Of samples of a life; the first ``warming`` seconds are its first minutes."""
    at, y = np.asarray(seconds, float), np.asarray(values, float)
    if not len(at):
        return Growth()
    begin, end = at[0], at[-1]
    warm, latter = at >= begin + warming, at >= (begin + end) / 2
    found = slope(at[warm], y[warm])
    return Growth(found, slope(at[latter], y[latter])) if found else Growth()


def moving_blocks(values: np.ndarray, times: int, rng: np.random.Generator) -> np.ndarray:
    """Resamples of a series in runs of neighbours, [times, len(values)]."""
    size = len(values) // BLOCKS
    starts = rng.integers(0, len(values) - size + 1, (times, -(-len(values) // size)))
    return values[(starts[:, :, None] + np.arange(size)).reshape(times, -1)[:, : len(values)]]
