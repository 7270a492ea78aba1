"""What an engine shows, and what came on top between two steps."""

from __future__ import annotations

import pytest

from vllm_ouroboros.metrics.counters import Counters, Fault
from vllm_ouroboros.metrics.exported import (
    METRICS,
    NUM_COUNTERS,
    SERIES,
    Exported,
    by_name,
    increments,
)
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.draft_tree import NodeSource
from vllm_ouroboros.trees.drafting import Drafting

D, S, P = NodeSource.DRAFT, NodeSource.SUFFIX, NodeSource.PREDICTION


class World:
    """An engine's numbers, on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.paused = 0.0, False
        self.counters, self.clock = Counters(), StepClock(now=lambda: self.now)
        self.pool = PhrasePool(64, 2, 3)
        drafting = Drafting(
            self.pool, max_requests=1, budget=4, draft_tokens=2, num_suffixes=1, window_size=2,
            max_len=64,
        )  # fmt: skip
        self.exported = Exported(self.counters, self.clock, drafting, lambda: self.paused)

    def read(self):
        return by_name(self.exported.read().series)


def test_names_are_told_apart_and_in_the_style_of_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(name.startswith("ouroboros_") and name.islower() for name in names)
    assert not any(name.endswith("_total") for name in names)  # prometheus_client adds it
    assert all(metric.help.endswith(".") for metric in METRICS)
    assert all(metric.kind == "counter" for metric, _ in SERIES[:NUM_COUNTERS])
    assert all(metric.kind == "gauge" for metric, _ in SERIES[NUM_COUNTERS:])


def test_each_number_stands_under_its_name() -> None:
    world = World()
    counters = world.counters
    counters.target_forwards, counters.draft_forwards = 7, 5
    counters.steps, counters.emitted_tokens = 4, 11
    counters.count_tree([D, D, S], [D, S], 1.5)
    counters.count_tree([S, P, P, P], [P, P, P], None)
    counters.faults[Fault.MEMORY] = 2
    world.pool.insert(1, [2, 3], PhraseSource.PROMPT)
    world.pool.insert(1, [4], PhraseSource.WINDOW)
    world.pool.lookup(1)
    world.pool.lookup(9)
    with world.clock.phase("learn"):
        world.now += 2.0
    with world.clock.model("target"):
        world.now += 3.0
    world.clock.end_step(1)
    world.paused = True
    found = world.read()
    assert found["ouroboros_target_forwards"] == {"": 7}
    assert found["ouroboros_draft_forwards"] == {"": 5}
    assert found["ouroboros_steps"] == {"no": 2, "phrases": 1, "model": 1}
    accepted = {"draft": 1, "phrases": 1, "prediction": 3}
    assert found["ouroboros_accepted_tokens"] == accepted
    assert found["ouroboros_emitted_tokens"] == {"target": 6, **accepted}
    assert found["ouroboros_verified_nodes"] == {"": 7}
    assert found["ouroboros_policy_expected_tokens"] == {"": 1.5}
    assert found["ouroboros_policy_accepted_tokens"] == {"": 2}
    assert found["ouroboros_pool_lookups"] == {"": 2}
    assert found["ouroboros_pool_hits"] == {
        "prompt": 1, "window": 0, "verification": 0, "history": 0
    }  # fmt: skip
    assert found["ouroboros_pool_insertions"] == {
        "prompt": 1, "window": 1, "verification": 0, "history": 0
    }  # fmt: skip
    phases = found["ouroboros_phase_seconds"]
    assert {name: seconds for name, seconds in phases.items() if seconds} == {
        "learn": 2.0, "target": 3.0
    }  # fmt: skip
    assert found["ouroboros_faults"] == {"exception": 0, "memory": 2, "nonfinite": 0, "pool": 0}
    assert found["ouroboros_pool_phrases"] == {"": 2}
    assert found["ouroboros_pool_bytes"] == {"": world.pool.bytes}
    assert found["ouroboros_paused"] == {"": 1}
    assert world.exported.read().lengths == [0, 0, 1, 1]


def test_the_pool_is_counted_now_and_then() -> None:
    world = World()
    assert world.read()["ouroboros_pool_phrases"] == {"": 0}
    world.pool.insert(1, [2, 3], PhraseSource.PROMPT)
    assert world.read()["ouroboros_pool_phrases"] == {"": 0}
    world.now += 1.0
    assert world.read()["ouroboros_pool_phrases"] == {"": 1}


def test_saves_are_those_of_the_file() -> None:
    class File:
        saves, failures = 3, 1

    world = World()
    world.exported.file = File()
    found = world.read()
    assert found["ouroboros_pool_saves"] == {"": 3}
    assert found["ouroboros_pool_save_failures"] == {"": 1}


def test_increments_add_up_to_the_sums() -> None:
    world = World()
    before, total, lengths = None, [0.0] * len(SERIES), [0] * 8
    for step in range(1, 5):
        world.counters.steps += step
        world.counters.count_tree([S] * step, [S] * step, 0.5)
        now = world.exported.read()
        more = increments(now, before)
        before = now
        for i, number in enumerate(more.series):
            total[i] = total[i] + number if i < NUM_COUNTERS else number
        for length, count in enumerate(more.lengths):
            lengths[length] += count
    assert total == pytest.approx(before.series)
    assert lengths == [0, 1, 1, 1, 1, 0, 0, 0]
