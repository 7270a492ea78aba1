"""Numbers on their way from the worker to ``/metrics`` and to the log."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import msgspec
import pytest
from prometheus_client import REGISTRY, Counter, Histogram, generate_latest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_ouroboros.integration import stat_logger as module
from vllm_ouroboros.integration.stat_logger import KEY, Carrier, OuroborosStatLogger, attach
from vllm_ouroboros.metrics.exported import NUM_COUNTERS, SERIES, Reading

CONFIG = SimpleNamespace(model_config=SimpleNamespace(served_model_name="tiny"))
STEPS = next(i for i, (metric, _) in enumerate(SERIES) if metric.name == "ouroboros_steps")
EMITTED = next(i for i, (m, _) in enumerate(SERIES) if m.name == "ouroboros_emitted_tokens")


def reading(count: float, lengths=()) -> Reading:
    """Every number of an engine, and trees by what was accepted of them."""
    return Reading([float(count)] * len(SERIES), [*lengths])


def carried(carrier: Carrier, found: Reading | None, **more) -> SchedulerStats:
    """Statistics of a step, after their way to the front end."""
    output = SimpleNamespace()
    if found is not None:
        attach(output, found)
    carrier.take(output)
    stats = SchedulerStats(**more)
    carrier.give(stats)
    sent = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    return MsgpackDecoder(EngineCoreOutputs).decode(sent).scheduler_stats


def value(name: str, engine: int = 0, **labels) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "tiny", "engine": str(engine), **labels})


def test_steps_bring_what_came_on_top() -> None:
    carrier = Carrier()
    logger = OuroborosStatLogger(CONFIG, [0])
    for found in (reading(2, [1]), None, reading(5, [1, 0, 2])):
        logger.record(carried(carrier, found), None)
    assert value("ouroboros_target_forwards_total") == 5
    assert value("ouroboros_steps_total", drafted="model") == 5
    assert value("ouroboros_pool_bytes") == 5
    assert value("ouroboros_accepted_length_count") == 3
    assert value("ouroboros_accepted_length_sum") == 4
    assert value("ouroboros_accepted_length_bucket", le="0.0") == 1
    text = generate_latest().decode()
    assert "# HELP ouroboros_pool_lookups_total Lookups in the phrase pool." in text


def test_statistics_without_a_reader_lose_nothing() -> None:
    """A scheduler makes none with --disable-log-stats, and now and then for no step."""
    carrier = Carrier()
    logger = OuroborosStatLogger(CONFIG, [0])
    carrier.take(SimpleNamespace(ouroboros=reading(2)))
    carrier.give(None)
    logger.record(carried(carrier, reading(3)), None)
    logger.record(None, None)
    assert value("ouroboros_target_forwards_total") == 3


def test_each_engine_has_its_own(caplog) -> None:
    logger = OuroborosStatLogger(CONFIG, [0, 1])
    logger.record(carried(Carrier(), reading(2)), None, engine_idx=0)
    logger.record(carried(Carrier(), reading(7)), None, engine_idx=1)
    assert value("ouroboros_target_forwards_total", 0) == 2
    assert value("ouroboros_target_forwards_total", 1) == 7


def test_front_ends_that_share_an_engine_add_up() -> None:
    carrier = Carrier()
    readings = reading(2, [1]), reading(5, [2]), reading(6, [2, 1])
    series = [carried(carrier, found).kv_connector_stats[KEY] for found in readings]
    assert sum(numbers[0] for numbers, _ in series) == 6
    assert [lengths for _, lengths in series] == [[1], [1], [0, 1]]


def test_what_a_kv_connector_says_stays() -> None:
    logger = OuroborosStatLogger(CONFIG, [0])
    stats = carried(Carrier(), reading(1), kv_connector_stats={"transfers": 3})
    logger.record(stats, None)
    assert stats.kv_connector_stats == {"transfers": 3}
    alone = carried(Carrier(), reading(1))
    logger.record(alone, None)
    assert alone.kv_connector_stats is None, "vLLM's loggers would look for a connector"


def test_a_second_engine_of_a_process() -> None:
    for _ in range(2):
        logger = OuroborosStatLogger(CONFIG, [0])
        logger.record(carried(Carrier(), reading(2)), None)
    assert value("ouroboros_target_forwards_total") == 2


def test_a_line_for_what_was_done(monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module.logger, "info", lambda *args: lines.append(args[0] % args[1:]))
    logger = OuroborosStatLogger(CONFIG, [0, 1])
    logger.log()
    assert lines == [], "nothing was done"
    series = [0.0] * len(SERIES)
    series[STEPS : STEPS + 3] = [1, 1, 2]
    series[EMITTED : EMITTED + 4] = [4, 3, 2, 1]
    logger.record(carried(Carrier(), Reading(series, [])), None, engine_idx=1)
    logger.log()
    logger.log()
    [line] = lines
    assert line.startswith("Engine 001: Ouroboros: 2.50 tokens a step, ")
    assert "drafted by the model 50%, by phrases alone 25%" in line
    assert "fault" not in line and "saves" not in line


def test_one_of_several_front_ends_writes_no_line(monkeypatch) -> None:
    """It sees a part of the steps; vLLM's own lines are off then, too."""
    lines: list[str] = []
    monkeypatch.setattr(module.logger, "info", lambda *args: lines.append(args[0]))
    for alone in (False, True):
        logger = module.stat_logger(None, alone=alone)(CONFIG, [0])
        logger.record(carried(Carrier(), reading(3)), None)
        logger.log()
        assert len(lines) == alone
    assert value("ouroboros_target_forwards_total") == 3


def test_metrics_go_where_those_of_the_engine_go() -> None:
    """Ray Serve has classes of its own."""
    made = []

    class OwnCounter(Counter):
        def __init__(self, *args, **kwargs) -> None:
            made.append(kwargs.get("name"))
            super().__init__(*args, **kwargs)

    class OwnLogger(PrometheusStatLogger):
        _counter_cls = OwnCounter

    module.stat_logger([OwnLogger])(CONFIG, [0])
    assert "ouroboros_target_forwards" in made
    made.clear()
    module.stat_logger(None)(CONFIG, [0])
    assert made == []


@pytest.mark.parametrize("own", [True, False], ids=["prometheus_client's", "another class"])
def test_lengths_are_those_of_single_trees(own) -> None:
    def histogram() -> Histogram:
        return Histogram("lengths", "", buckets=module.LENGTH_BUCKETS, registry=None)

    class Wrapped:
        def __init__(self, inner) -> None:
            self.observe = inner.observe

    counted, single = histogram(), histogram()
    for length in range(70):
        times = length % 5
        module._observe(counted if own else Wrapped(counted), length, times)
        for _ in range(times):
            single.observe(length)

    def samples(found) -> list:
        (family,) = found.collect()
        kept = [one for one in family.samples if not one.name.endswith("_created")]
        return [[one.name, one.labels, one.value] for one in kept]

    assert samples(counted) == samples(single)


def test_a_reading_is_small() -> None:
    series = [123456.789] * len(SERIES)
    assert len(msgspec.msgpack.encode([series, [10_000] * 27])) < 1000
    assert len(SERIES) > NUM_COUNTERS


@pytest.fixture(autouse=True)
def _own_metrics():
    yield
    OuroborosStatLogger._unregister()
    logging.captureWarnings(False)
