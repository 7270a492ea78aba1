"""What the policy knows of a request: how its drafts fare, and what drafting adds to its steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm_ouroboros.policy.acceptance_estimates import Estimates, Leaning

SMOOTH = 0.05  # weight of a new step in averages
FORGET = 0.98  # what a step leaves of the steps before it, in counts
STALE = 20  # steps after which what was observed before is forgotten twice as fast
OTHERS = 8.0  # observations of its own that what others saw counts for to a new request
LEAST = 0.01  # what remains of that
PROMISES = np.array([0.3, 0.8, 1.6, 3.2])
"""Bounds between classes of steps: the tokens that a tree without the draft model promises. What
that model spares is known for each class apart: little where phrases do well."""


@dataclass
class Manner:
    """Requests that choose their tokens in one way: greedy, or by noise.

    Attributes:
        estimates: of the nodes of their trees.
        worth: float64 [classes], what drafting spares a request in a step, as the
            tokens that the batch makes in that time.
        seen: float64 [classes], steps of each class, of late.
        steps: that a request takes.
    """

    estimates: Estimates = field(default_factory=Estimates)
    worth: np.ndarray = field(default_factory=lambda: np.array([1.0, 0.8, 0.6, 0.4, 0.2]))
    seen: np.ndarray = field(default_factory=lambda: np.ones(len(PROMISES) + 1))
    steps: float = 32.0


@dataclass
class Known:
    """What is known of a request.

    Attributes:
        manner: of those that it is like as long as little is known of itself.
        leaning: how its nodes differ from theirs.
        spared: float64 [classes], what drafting spared it in all, as `Manner.worth`, of late.
        drafted: float64 [classes], in so many steps.
        others: steps that what others saw counts for.
        promise: class of its step.
        since: steps since a worth was seen.
        steps: that it has taken.
    """

    manner: Manner
    leaning: Leaning = field(default_factory=Leaning)
    spared: np.ndarray = field(default_factory=lambda: np.zeros(len(PROMISES) + 1))
    drafted: np.ndarray = field(default_factory=lambda: np.zeros(len(PROMISES) + 1))
    others: float = OTHERS
    promise: int = 0
    since: int = 0
    steps: int = 0

    def go_on(self) -> None:
        """It takes another step."""
        self.leaning.fade()
        self.since += 1
        self.steps += 1

    def end(self) -> None:
        """It is gone."""
        self.manner.steps += SMOOTH * (self.steps - self.manner.steps)

    def expect(self, promised: float) -> float:
        """Its tree promises so many tokens without the draft model; what that would spare."""
        self.promise = int(np.searchsorted(PROMISES, promised))
        self.manner.seen *= FORGET
        self.manner.seen[self.promise] += 1
        return float(self.worth(self.promise))

    def worth(self, at: int | slice = slice(None)) -> np.ndarray:
        """What drafting spares it in a step of a class, or of each, in tokens."""
        known = self.spared[at] + self.others * self.manner.worth[at]
        return known / (self.drafted[at] + self.others)

    @property
    def usual(self) -> float:
        """What drafting spares in a step as they come, in tokens."""
        return float(np.average(self.worth(), weights=self.manner.seen))

    def compare(self, worth: float) -> None:
        """Drafting spared the time of so many tokens."""
        at, shared = self.promise, self.manner.worth
        memory = (1 - SMOOTH) ** (1 + self.since / STALE)
        self.spared *= memory
        self.drafted *= memory
        self.others = max(LEAST, self.others * memory)
        self.spared[at] += worth
        self.drafted[at] += 1
        shared[at] += SMOOTH * (worth - shared[at])
        self.since = 0
