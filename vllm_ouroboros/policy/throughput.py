"""How many tokens a second batches make, by size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_ouroboros.policy.request_statistics import FORGET

TRUSTED = 8  # steps until the speed of a batch is known


class Step(NamedTuple):
    """One step of the engine: verification, and the draft for the next step."""

    requests: int
    tokens: int  # emitted
    forwards: float  # seconds that the forwards of both models took
    decoding: bool  # whether no request was in its prompt
    drafted: bool = False  # whether the draft model was asked


@dataclass
class Speed:
    """Tokens per second of batches of one size, of late."""

    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """One step."""
        self.tokens = FORGET * self.tokens + tokens
        self.seconds = FORGET * self.seconds + seconds
        self.steps += 1

    @property
    def value(self) -> float:
        """The speed; 0 while unknown."""
        return self.tokens / max(self.seconds, 1e-9) if self.steps >= TRUSTED else 0.0
