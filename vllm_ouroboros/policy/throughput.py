"""Throughput of batches by size: what a second is worth, in tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_ouroboros.policy.request_statistics import COUNT_DECAY

MIN_OBSERVED_STEPS = 8  # until the throughput of a batch is known


class Step(NamedTuple):
    """One step of the engine: verification, and the draft for the next step."""

    requests: int
    tokens: int  # emitted
    forwards: float  # seconds that the forwards of both models took
    decoding: bool  # whether no request was in its prompt
    drafted: bool = False  # whether the draft model ran


@dataclass
class Throughput:
    """Tokens per second of batches of one size, decayed by steps."""

    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """One step."""
        self.tokens = COUNT_DECAY * self.tokens + tokens
        self.seconds = COUNT_DECAY * self.seconds + seconds
        self.steps += 1

    @property
    def tokens_per_second(self) -> float:
        """The throughput; 0 while unknown."""
        return self.tokens / max(self.seconds, 1e-9) if self.steps >= MIN_OBSERVED_STEPS else 0.0
