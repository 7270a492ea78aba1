"""What an engine shows on ``/metrics`` beside vLLM's own metrics, and reading it.

An engine is read after each of its steps, into one number for each of `SERIES`. Those numbers cross
to the scheduler and to the front end; names, labels and kinds are known on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from vllm_ouroboros.metrics.counters import Counters, Fault
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.trees.drafting import Drafting

SIZE_INTERVAL_S = 1.0
"""Seconds between two looks at how much the pool holds."""


class Metric(NamedTuple):
    """A metric of Prometheus, with vLLM's labels and perhaps one of its own."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)  # of that label

    @property
    def labels(self) -> tuple[str, ...]:
        """Its own labels."""
        return (self.label,) if self.label else ()


PHASES = (
    "target", "draft", "overlapped", "accept", "compact", "learn", "plan", "draft_inputs",
    "choose", "absorb", "alternatives", "build", "tree",
)  # fmt: skip
"""Of a step; no second belongs to two of them."""
_ORIGINS = ("draft", "phrases", "prediction")
_SOURCES = tuple(source.name.lower() for source in PhraseSource)

COUNTERS = (
    Metric("ouroboros_target_forwards", "counter", "Forwards of the target, of whole batches."),
    Metric("ouroboros_draft_forwards", "counter", "Forwards of the draft model or head."),
    Metric(
        "ouroboros_steps", "counter",
        "Steps of requests, by who drafted what was verified: the model, or phrases alone.",
        "drafted", ("no", "phrases", "model"),
    ),
    Metric(
        "ouroboros_emitted_tokens", "counter", "Emitted tokens, by who proposed them.",
        "origin", ("target", *_ORIGINS),
    ),
    Metric(
        "ouroboros_accepted_tokens", "counter", "Accepted tokens, by who proposed them.",
        "origin", _ORIGINS,
    ),
    Metric("ouroboros_verified_nodes", "counter", "Nodes of trees that the target verified."),
    Metric(
        "ouroboros_policy_expected_tokens", "counter",
        "Tokens that the policy expected to be accepted of the trees it cut.",
    ),
    Metric(
        "ouroboros_policy_accepted_tokens", "counter", "Tokens that were accepted of those trees."
    ),
    Metric("ouroboros_pool_lookups", "counter", "Lookups in the phrase pool."),
    Metric(
        "ouroboros_pool_hits", "counter",
        "Lookups that found phrases, by the source of the first of them.", "source", _SOURCES,
    ),
    Metric(
        "ouroboros_pool_insertions", "counter", "Insertions into the phrase pool, by source.",
        "source", _SOURCES,
    ),
    Metric(
        "ouroboros_phase_seconds", "counter", "Seconds of steps, by what was done in them.",
        "phase", PHASES,
    ),
    Metric("ouroboros_pool_saves", "counter", "Times that the pool was written to its file."),
    Metric("ouroboros_pool_save_failures", "counter", "Times that it could not be written."),
    Metric(
        "ouroboros_faults", "counter", "Faults while drafting; each paused it for a while.",
        "kind", tuple(fault.name.lower() for fault in Fault),
    ),
)  # fmt: skip
GAUGES = (
    Metric("ouroboros_pool_phrases", "gauge", "Phrases in the pool."),
    Metric("ouroboros_pool_bytes", "gauge", "Bytes of the pool, all of which it takes at start."),
    Metric("ouroboros_request_state_bytes", "gauge", "Bytes of the state of drafting requests."),
    Metric("ouroboros_paused", "gauge", "1 while nothing is drafted because of a fault."),
)
ACCEPTED_LENGTH = Metric(
    "ouroboros_accepted_length", "histogram", "Accepted nodes of a verified tree."
)
METRICS = (*COUNTERS, *GAUGES, ACCEPTED_LENGTH)
SERIES = tuple((metric, value) for metric in (*COUNTERS, *GAUGES) for value in metric.values)
NUM_COUNTERS = sum(len(metric.values) for metric in COUNTERS)
"""Of the `SERIES`, the first ones."""


class Saved(Protocol):
    """How often something was written to its file."""

    saves: int
    failures: int


class Reading(NamedTuple):
    """What an engine shows after a step: sums since its start."""

    series: list[float]  # of SERIES
    lengths: list[int]  # verified trees by their accepted nodes


class Exported:
    """Reads what an engine shows.

    Args:
        counters: of the engine.
        clock: of its steps.
        drafting: holds the pool.
        paused: whether faults have paused it.
    """

    def __init__(
        self, counters: Counters, clock: StepClock, drafting: Drafting, paused: Callable[[], bool]
    ) -> None:
        self.counters, self.clock, self.drafting = counters, clock, drafting
        self.paused = paused
        self.file: Saved | None = None  # of the pool, if it has one
        self._phrases, self._looked = 0, float("-inf")

    def read(self) -> Reading:
        """What it shows now."""
        counters, pool = self.counters, self.drafting.pool.arrays
        accepted = (
            counters.accepted_from_draft,
            counters.accepted_from_suffix,
            counters.accepted_from_prediction,
        )
        drafted = counters.steps_with_phrases + counters.steps_with_draft
        file = self.file
        totals = self.clock.totals
        series = [
            counters.target_forwards,
            counters.draft_forwards,
            counters.steps - drafted, counters.steps_with_phrases, counters.steps_with_draft,
            counters.emitted_tokens - sum(accepted), *accepted,
            *accepted,
            counters.verified_nodes,
            counters.expected_tokens,
            counters.accepted_as_expected,
            int(pool.lookups[0]),
            *pool.hits.tolist(),
            *pool.inserted.tolist(),
            *(totals.get(phase, 0.0) for phase in PHASES),
            file.saves if file is not None else 0,
            file.failures if file is not None else 0,
            *counters.faults,
            self._held(),
            self.drafting.pool.bytes,
            self.drafting.bytes,
            int(self.paused()),
        ]  # fmt: skip
        return Reading(series, counters.accepted_lengths.copy())

    def _held(self) -> int:
        """Phrases in the pool, counted now and then: it is no small work."""
        now = self.clock.now()
        if now >= self._looked + SIZE_INTERVAL_S:
            self._phrases, self._looked = len(self.drafting.pool), now
        return self._phrases


def increments(now: Reading, before: Reading | None) -> Reading:
    """What came on top between two readings of an engine; gauges as they are now."""
    if before is None:
        return now
    series = [
        new - old if i < NUM_COUNTERS else new
        for i, (new, old) in enumerate(zip(now.series, before.series, strict=True))
    ]
    known = [*before.lengths, *[0] * (len(now.lengths) - len(before.lengths))]
    return Reading(series, [new - old for new, old in zip(now.lengths, known, strict=True)])


def by_name(series: Iterable[float]) -> dict[str, dict[str, float]]:
    """Numbers of `SERIES` by metric and value of its label."""
    found: dict[str, dict[str, float]] = {}
    for (metric, value), number in zip(SERIES, series, strict=True):
        found.setdefault(metric.name, {})[value] = number
    return found
