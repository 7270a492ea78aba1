"""What is known of a request: how often its nodes are accepted, and what drafting saves it.

Savings are in tokens: those that the batch makes in the time that drafting saves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm_ouroboros.policy.acceptance_estimates import CalibrationBias, Estimates

AVERAGE_WEIGHT = 0.05  # of a new observation in averages
COUNT_DECAY = 0.98  # what a step leaves of the steps before it, in counts
STALE_AFTER = 20  # steps without an observation after which older ones are forgotten twice as fast
SHARED_WEIGHT = 8.0  # observations of its own that those of others count for to a new request
MIN_SHARED_WEIGHT = 0.01  # what remains of that
STEP_CLASS_BOUNDS = np.array([0.3, 0.8, 1.6, 3.2])
"""Bounds between classes of steps, by the tokens that a tree of phrases alone is expected to have
accepted: the draft model saves little where phrases do well, so each class has its own savings.
They and the constants above were tuned on traces of the shipped pair by scripts/simulate."""
NUM_CLASSES = len(STEP_CLASS_BOUNDS) + 1


@dataclass
class SamplingMode:
    """Statistics shared by requests that choose their tokens alike: greedily, or with noise.

    Attributes:
        estimates: acceptance rates of the nodes of their trees.
        savings: float64 [NUM_CLASSES], expected savings of drafting for a request in a step.
        class_counts: float64 [NUM_CLASSES], steps of each class, decayed.
        mean_steps: steps that a request takes until it ends.
    """

    estimates: Estimates = field(default_factory=Estimates)
    savings: np.ndarray = field(default_factory=lambda: np.array([1.0, 0.8, 0.6, 0.4, 0.2]))
    class_counts: np.ndarray = field(default_factory=lambda: np.ones(NUM_CLASSES))
    mean_steps: float = 32.0


@dataclass
class RequestStatistics:
    """Statistics of one request.

    Attributes:
        mode: what it is like as long as little is known of itself.
        bias: how its acceptance differs from the mode's estimates.
        saved: float64 [NUM_CLASSES], savings that were observed, decayed.
        observed: float64 [NUM_CLASSES], in so many steps.
        shared_weight: observations that the mode's savings count for.
        step_class: class of its present step.
        unobserved: steps since savings were last observed.
        steps: that it has taken.
    """

    mode: SamplingMode
    bias: CalibrationBias = field(default_factory=CalibrationBias)
    saved: np.ndarray = field(default_factory=lambda: np.zeros(NUM_CLASSES))
    observed: np.ndarray = field(default_factory=lambda: np.zeros(NUM_CLASSES))
    shared_weight: float = SHARED_WEIGHT
    step_class: int = 0
    unobserved: int = 0
    steps: int = 0

    def begin_step(self) -> None:
        """It takes another step."""
        self.bias.decay()
        self.unobserved += 1
        self.steps += 1

    def finish(self) -> None:
        """It has ended."""
        self.mode.mean_steps += AVERAGE_WEIGHT * (self.steps - self.mode.mean_steps)

    def classify(self, expected_accepted: float) -> float:
        """Class its step by the expected accepted tokens of a tree without the draft model.

        Returns:
            Expected savings of drafting in this step.
        """
        self.step_class = int(np.searchsorted(STEP_CLASS_BOUNDS, expected_accepted))
        self.mode.class_counts *= COUNT_DECAY
        self.mode.class_counts[self.step_class] += 1
        return float(self.expected_savings(self.step_class))

    def expected_savings(self, classes: int | slice = slice(None)) -> np.ndarray:
        """Expected savings of drafting in a step of a class, or of each, in tokens."""
        total = self.saved[classes] + self.shared_weight * self.mode.savings[classes]
        return total / (self.observed[classes] + self.shared_weight)

    @property
    def mean_savings(self) -> float:
        """Expected savings over steps of all classes, as often as they come, in tokens."""
        return float(np.average(self.expected_savings(), weights=self.mode.class_counts))

    def observe_savings(self, tokens: float, at: int) -> None:
        """Drafting saved the time of so many tokens in a step of class ``at``."""
        shared = self.mode.savings
        memory = (1 - AVERAGE_WEIGHT) ** (1 + self.unobserved / STALE_AFTER)
        self.saved *= memory
        self.observed *= memory
        self.shared_weight = max(MIN_SHARED_WEIGHT, self.shared_weight * memory)
        self.saved[at] += tokens
        self.observed[at] += 1
        shared[at] += AVERAGE_WEIGHT * (tokens - shared[at])
        self.unobserved = 0
