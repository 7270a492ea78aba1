"""Faults while drafting: they cost speculation for a while, and no request."""

from __future__ import annotations

import torch
from vllm.logger import init_logger

from vllm_ouroboros.metrics.counters import Counters, Fault
from vllm_ouroboros.phrases.arrays import PoolFault

logger = init_logger(f"vllm.{__name__}")  # vLLM configures what is below "vllm"

MAX_PAUSE = 4096
"""Steps that a pause takes at most."""
FORGIVEN_AFTER = 256
"""Steps without a fault after which the next one costs no more than the first did."""


def fault_of(error: Exception) -> Fault:
    """What kind of fault an error is."""
    if isinstance(error, PoolFault):
        return Fault.POOL
    if isinstance(error, FloatingPointError):
        return Fault.NONFINITE
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or "can't allocate memory" in str(error):  # torch's words on the CPU
        return Fault.MEMORY
    return Fault.EXCEPTION


class Pause:
    """Steps in which nothing is drafted, after a fault: none after the first one, then twice as
    many after each that follows soon.

    Args:
        counters: count the faults.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._left = 0  # steps of this pause that are still to come
        self._next = 0  # that a fault would take now
        self._sound = 0  # steps since the last one

    @property
    def lasts(self) -> bool:
        """Whether the next step will not draft."""
        return self._left > 0

    def takes(self) -> bool:
        """Whether this step, which comes now, does not draft."""
        if self._left:
            self._left -= 1
            return True
        self._sound += 1
        if self._sound > FORGIVEN_AFTER:
            self._next = 0
        return False

    def begin(self, error: Exception) -> Fault:
        """A step failed: count it, say so, and pause."""
        kind = fault_of(error)
        self.counters.faults[kind] += 1
        self._left = self._next
        self._next = min(MAX_PAUSE, max(1, 2 * self._next))
        self._sound = 0
        logger.warning(
            "Ouroboros could not draft (%s: %s); nothing is drafted for %d step(s), requests go on "
            "without",
            kind.name.lower(), _line(error), 1 + self._left,
            exc_info=error if kind == Fault.EXCEPTION else None,
        )  # fmt: skip
        return kind


def _line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text[:300]
