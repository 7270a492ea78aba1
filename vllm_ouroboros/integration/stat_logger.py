"""What the front end of an engine shows: metrics on ``/metrics``, and a line in the log.

Numbers come with vLLM's own: from the model runner's output to the scheduler, from there in
`SchedulerStats` to the process that answers ``/metrics``. Each step brings what came on top of the
step before, since front ends may be several and each of them gets some steps.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping
from operator import add
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger

from vllm_ouroboros.metrics.exported import (
    ACCEPTED_LENGTH,
    COUNTERS,
    GAUGES,
    METRICS,
    NUM_COUNTERS,
    SERIES,
    Metric,
    Reading,
    by_name,
    increments,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput

logger = init_logger(f"vllm.{__name__}")

KEY = "ouroboros"
"""Of our numbers in `SchedulerStats.kv_connector_stats`, the one field that takes any."""
LENGTH_BUCKETS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)


# -- on the way --------------------------------------------------------------------------------


def attach(output: ModelRunnerOutput, reading: Reading) -> None:
    """Let a model runner's output carry a reading to the scheduler."""
    output.ouroboros = reading


class Carrier:
    """Takes readings from the model runner's outputs on to the front end."""

    def __init__(self) -> None:
        self._sent: Reading | None = None
        self._waits: Reading | None = None

    def take(self, output: ModelRunnerOutput) -> None:
        """Take what an output carries, if it carries anything."""
        self._waits = getattr(output, "ouroboros", None) or self._waits

    def give(self, stats: SchedulerStats | None) -> None:
        """Let the statistics of a step carry on what came on top of the last one's."""
        reading, self._waits = self._waits, None
        if stats is not None and reading is not None:
            more = increments(reading, self._sent)
            self._sent = reading
            others = stats.kv_connector_stats or {}
            stats.kv_connector_stats = {**others, KEY: [more.series, more.lengths]}


# -- in the front end --------------------------------------------------------------------------


class OuroborosStatLogger(AggregateStatLoggerBase):
    """Shows the numbers of all engines of a front end. It must be the first of its loggers: it
    takes them out of the statistics, where vLLM's loggers would look for a KV connector's.

    Args:
        vllm_config: of the engines.
        engine_indexes: theirs.
    """

    classes: type[PrometheusStatLogger] = PrometheusStatLogger
    """Logger whose classes of metrics to use."""
    logs = True
    """Whether it writes lines of the log: one of several front ends sees a part of the steps."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._lines = {index: _Line() for index in engine_indexes}
        model = vllm_config.model_config.served_model_name
        self._labels = {index: [model, str(index)] for index in engine_indexes}
        self._unregister()
        made = {metric.name: self._make(metric) for metric in METRICS}
        self._shown = {index: _Shown(made, labels) for index, labels in self._labels.items()}

    @staticmethod
    def _unregister() -> None:
        """Forget the metrics of an engine that this process had before."""
        for collector in list(REGISTRY._collector_to_names):
            if getattr(collector, "_name", "").startswith("ouroboros_"):
                REGISTRY.unregister(collector)

    def _make(self, metric: Metric) -> Any:
        classes = self.classes
        more: dict[str, Any] = {}
        if metric in COUNTERS:
            kind = classes._counter_cls
        elif metric in GAUGES:
            kind, more = classes._gauge_cls, {"multiprocess_mode": "mostrecent"}
        else:
            kind, more = classes._histogram_cls, {"buckets": LENGTH_BUCKETS}
        labels = ["model_name", "engine", *metric.labels]
        return kind(name=metric.name, documentation=metric.help, labelnames=labels, **more)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take the numbers of a step."""
        del iteration_stats, mm_cache_stats
        found = scheduler_stats.kv_connector_stats if scheduler_stats is not None else None
        if not found or KEY not in found:
            return
        assert scheduler_stats is not None
        series, lengths = found[KEY]
        scheduler_stats.kv_connector_stats = {
            name: value for name, value in found.items() if name != KEY
        } or None
        self._shown[engine_idx].add(series, lengths)
        self._lines[engine_idx].add(series)

    def log(self) -> None:
        """Sum up what was done since the last call, in a line for each engine that did anything."""
        for index, line in self._lines.items():
            text = line.take()
            if text is not None and self.logs:
                logger.info("Engine %03d: Ouroboros: %s", index, text)

    def log_engine_initialized(self) -> None:
        """Nothing to say yet."""


def _observe(histogram: Any, value: float, times: int) -> None:
    """Let a histogram observe a value several times. prometheus_client has no method for that; its
    parts do it in the time of one, where a histogram has them.
    """
    try:
        total, buckets, bounds = histogram._sum, histogram._buckets, histogram._upper_bounds
    except AttributeError:  # Ray's, or those of another version
        for _ in range(times):
            histogram.observe(value)
    else:
        total.inc(value * times)
        buckets[bisect_left(bounds, value)].inc(times)


def stat_logger(others: list[Any] | None, *, alone: bool = True) -> type[OuroborosStatLogger]:
    """The class of logger for an engine that has these loggers of its own: Ray Serve's metrics go
    where those of its `PrometheusStatLogger` go.

    Args:
        others: classes or factories of loggers.
        alone: whether the engine has no other front end.
    """
    kinds = [one for one in others or [] if isinstance(one, type)]
    found = [one for one in kinds if issubclass(one, PrometheusStatLogger)]

    class StatLogger(OuroborosStatLogger):
        classes = found[0] if found else PrometheusStatLogger
        logs = alone

    return StatLogger


class _Shown:
    """The metrics of an engine.

    Args:
        made: all metrics by name.
        labels: the engine's.
    """

    def __init__(self, made: Mapping[str, Any], labels: list[str]) -> None:
        series = [
            made[metric.name].labels(*labels, *((value,) if value else ()))
            for metric, value in SERIES
        ]
        self._counters = [counter.inc for counter in series[:NUM_COUNTERS]]
        self._gauges = [gauge.set for gauge in series[NUM_COUNTERS:]]
        self._lengths = made[ACCEPTED_LENGTH.name].labels(*labels)

    def add(self, series: list[float], lengths: list[int]) -> None:
        """What a step has brought."""
        # a counter takes nothing below zero, and an error here would end the server
        for inc, number in zip(self._counters, series, strict=False):
            if number > 0:
                inc(number)
        for show, number in zip(self._gauges, series[NUM_COUNTERS:], strict=True):
            show(number)
        for length, count in enumerate(lengths):
            if count:
                _observe(self._lengths, length, count)


class _Line:
    """Sums of an engine's steps until the next line of the log."""

    def __init__(self) -> None:
        self._sums = [0.0] * len(SERIES)
        self._since = time.monotonic()

    def add(self, series: list[float]) -> None:
        sums = [*map(add, self._sums, series)]
        self._sums = sums[:NUM_COUNTERS] + series[NUM_COUNTERS:]

    def take(self) -> str | None:
        """The line; None if nothing was done."""
        found, now = by_name(self._sums), time.monotonic()
        seconds, self._since = now - self._since, now
        self._sums[:NUM_COUNTERS] = [0.0] * NUM_COUNTERS
        drafted = found["ouroboros_steps"]
        steps = sum(drafted.values())
        if not steps:
            return None
        emitted = found["ouroboros_emitted_tokens"]
        accepted = found["ouroboros_accepted_tokens"]
        nodes = found["ouroboros_verified_nodes"][""]
        phases = found["ouroboros_phase_seconds"]
        busy = sum(phases.values()) or 1.0
        saves = found["ouroboros_pool_save_failures"][""]
        faults = {kind: int(n) for kind, n in found["ouroboros_faults"].items() if n}
        parts = [
            f"{sum(emitted.values()) / steps:.2f} tokens a step",
            f"{sum(emitted.values()) / seconds:.1f} tokens/s",
            f"accepted {sum(accepted.values()):.0f} of {nodes:.0f} nodes "
            f"({accepted['draft']:.0f} drafted, {accepted['phrases']:.0f} of phrases, "
            f"{accepted['prediction']:.0f} predicted)",
            f"steps drafted by the model {drafted['model'] / steps:.0%}, "
            f"by phrases alone {drafted['phrases'] / steps:.0%}",
            f"time in the target {phases['target'] / busy:.0%}, "
            f"in the draft model {phases['draft'] / busy:.0%}",
            f"pool {found['ouroboros_pool_phrases']['']:.0f} phrases",
        ]
        if faults:
            parts.append(f"faults {faults}")
        if saves:
            parts.append(f"failed saves {saves:.0f}")
        return ", ".join(parts)
