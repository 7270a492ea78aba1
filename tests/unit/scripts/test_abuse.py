"""scripts/soak/abuse.py: what happens when, and how a run is judged."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "soak"))

import abuse_verdicts as verdicts
from abuse_clock import DAY, ShiftedClock
from abuse_latencies import Latency, compare
from abuse_prompts import ChatPrompts
from abuse_requests import (
    CONTEXT,
    KINDS,
    SHAPES,
    WARMING,
    abuse_request,
    probe_requests,
    warming_requests,
)
from abuse_schedule import (
    EVENTS,
    Outage,
    Span,
    excuse,
    plan,
    save_seconds,
    settled,
    windows,
)
from abuse_slope import growth, slope

from vllm_ouroboros.cli.inputs import TARGET


@pytest.mark.parametrize("minutes", [3, 60])
def test_every_event_ends_before_the_next_one(minutes) -> None:
    events = plan(minutes)
    assert [one.name for one in events] == [name for name, _ in EVENTS]
    assert all(one.at > minutes * 60 / 6 for one in events), "nothing breaks in the first window"
    for one, other in itertools.pairwise(events):
        assert one.at + one.seconds < other.at
        assert one.name.endswith("killed") or one.seconds > save_seconds(minutes)
    assert events[-1].at < minutes * 60


def test_windows_cover_the_run() -> None:
    found = windows(3600)
    assert found[0] == Span(0, 600)
    assert [one.end for one in found] == [600, 1200, 1800, 2400, 3000, 3600]


def test_what_a_kill_excuses() -> None:
    outages = [Outage(100, 130)]
    assert excuse(outages, 90, 101) == "cut"
    assert excuse(outages, 110, 111) == "refused"
    assert excuse(outages, 50, 60) is None
    assert excuse(outages, 131, 140) is None
    assert settled(160, [Span(0, 100), Span(130)], 20)
    assert not settled(140, [Span(0, 100), Span(130)], 20)
    assert not settled(110, [Span(0, 100), Span(130)], 20)


def test_growth_is_found_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    at = np.arange(0, 3600, 2.0)
    noise = np.convolve(rng.normal(size=len(at) + 20), np.ones(20) / 20)[: len(at)] * 1e6
    grown = slope(at, 2e9 + 50e6 * at / 3600 + noise)
    assert grown.low < 50e6 < grown.high
    assert grown.low > 30e6
    assert not grown.flat, "more than 1 % an hour"
    level = slope(at, 2e9 + noise)
    assert level.flat
    assert slope(at, 2e9 - 50e6 * at / 3600 + noise).flat, "it may shrink"
    assert slope(at[:10], noise[:10]) is None
    assert not slope(at, 2e9 + 400 * noise).flat, "nobody can tell"


def test_a_step_is_told_from_a_leak() -> None:
    rng = np.random.default_rng(0)
    at = np.arange(0, 3000, 2.0)
    noise = rng.normal(size=len(at)) * 1e6
    stepped = growth(at, 2e9 + 40e6 * (at > 1000) + noise, 600)
    assert not stepped.warm.flat
    assert stepped.latter.flat
    assert verdicts.memory(stepped, judged=True).passed is False
    level = growth(at, 2e9 + noise, 600)
    assert verdicts.memory(level, judged=True).passed is True
    leaking = growth(at, 2e9 + 40e6 * at / 3600 + noise, 600)
    assert not leaking.latter.flat
    assert verdicts.memory(leaking, judged=True).passed is False
    assert verdicts.memory(leaking, judged=False).passed is None
    short = growth(at[:20], noise[:20], 600)
    assert short == growth([], [], 600)
    assert verdicts.memory(short, judged=True).passed is False


def test_latencies_are_compared_probe_by_probe() -> None:
    """The second window has other probes than the first: that is no change."""
    spans = [*windows(60), Span(10, 60)]
    first = [Latency(0, 1, 1.0), Latency(0, 2, 3.0), Latency(0, 3, 1.2), Latency(1, 4, 10.0)]
    alike, slower = [Latency(0, 11, 1.2)], [Latency(1, 21, 11.0), Latency(0, 22, 1.32)]
    found = compare([*first, *alike, *slower], spans)
    assert found[1].ratio == pytest.approx(1.0)
    assert found[2].ratio == pytest.approx(1.1)
    assert [one.within for one in found[:3]] == [True, True, False]
    assert found[3].seconds is None and found[3].within
    assert verdicts.latency(found, judged=True).passed is False
    assert verdicts.latency(found, judged=False).passed is None
    assert verdicts.latency([*found[:2], found[1]], judged=True).passed is True


def test_a_window_of_many_answers_is_slower_or_may_be_luck() -> None:
    """Answers take 10 to 30 s, neighbours alike; a window is a third slower, another one 3 %."""
    rng = np.random.default_rng(0)
    spans = [*windows(3600), Span(600, 3600)]

    def answers(begin: float, factor: float) -> list[Latency]:
        waits = 20 + 4 * np.convolve(rng.normal(size=410), np.ones(10), "valid") / 10**0.5
        return [Latency(0, begin + 1.49 * i, factor * wait) for i, wait in enumerate(waits)]

    level = [
        one for i, factor in enumerate((1, 1.03, 1, 0.97, 1, 1)) for one in answers(600 * i, factor)
    ]
    found = compare(level, spans)
    assert not any(one.slower for one in found)
    assert found[-1].low < 1 < found[-1].high
    assert verdicts.latency(found, judged=True).passed is True
    found = compare([one for one in level if one.at < 3000] + answers(3000, 1.33), spans)
    assert [one.slower for one in found] == [False] * 5 + [True, False]
    assert verdicts.latency(found, judged=True).passed is False


def test_verdicts() -> None:
    assert verdicts.requests({"answered": 9}, []).passed is True
    assert verdicts.requests({}, []).passed is False
    failed = verdicts.requests({"answered": 9}, [{"problems": ["no answer"]}])
    assert failed.passed is False and "no answer" in failed.found
    assert verdicts.connected([256] * 3, 256).passed is True
    assert verdicts.connected([200] * 3, 256).passed is False
    assert verdicts.log([]).passed is True
    assert verdicts.log(["ERROR x"]).passed is False
    check = {"when": "start", "right": 40, "of": 40}
    assert verdicts.same_texts([check] * 4, 4).passed is True
    assert verdicts.same_texts([check] * 3, 4).passed is False
    assert verdicts.same_texts([check] * 3 + [{**check, "right": 39}], 4).passed is False
    assert verdicts.speculation([{verdicts.ACCEPTED: 3.0}, {}]).passed is False
    assert verdicts.speculation([{verdicts.ACCEPTED: 3.0}]).passed is True
    event = {"event": "full", "problems": []}
    assert verdicts.events([event], 1).passed is True
    assert verdicts.events([event], 2).passed is False
    assert verdicts.events([{**event, "problems": ["no save failed"]}], 1).passed is False
    skipped = verdicts.events([{**event, "skipped": "no tmpfs"}], 1)
    assert skipped.passed is True and "skipped: full (no tmpfs)" in skipped.found
    assert verdicts.own_counters([{"ouroboros_faults_total": 1.0}]).passed is False
    assert verdicts.own_counters([{"ouroboros_faults_total": 0.0}]).passed is True
    assert verdicts.ended("the server ended").passed is False


def test_prompts_have_the_length_that_is_asked_for() -> None:
    prompts = ChatPrompts(TARGET)
    for tokens in (1, 7, 60, CONTEXT - 1, CONTEXT, 1500):
        assert len(prompts.exact(random.Random(tokens), tokens)) == tokens


def test_requests_of_a_seed_are_the_same_and_of_all_kinds() -> None:
    prompts = ChatPrompts(TARGET)
    asked = [abuse_request(i, 0, prompts) for i in range(SHAPES)]
    assert asked[:5] == [abuse_request(i, 0, ChatPrompts(TARGET)) for i in range(5)]
    for one in asked:
        long = isinstance(ids := one.request.body["prompt"], list) and len(ids) >= CONTEXT
        assert (one.refusal is not None) == (long or one.kind == "wrong_options")
    again = [abuse_request(i, 0, prompts) for i in range(SHAPES, 2 * SHAPES)]
    assert [one.kind for one in again] == [one.kind for one in asked], "shapes come again"
    sizes = [one.request.body["max_tokens"] for one in asked]
    assert [one.request.body["max_tokens"] for one in again] == sizes
    words = [one.request.body["prompt"] for one in again]
    known = [one.request.body["prompt"] for one in asked]
    assert sum(a != b for a, b in zip(words, known, strict=True)) > 100, "but for the shortest"
    assert {one.kind for one in asked} == KINDS.keys()
    leaving = [one for one in asked if one.kind == "leaving"]
    assert len(leaving) > 5
    assert all(27 * one.request.leave_after_pieces < 96 for one in leaving), "before the end"
    drafting = [one for one in asked if one.kind == "longest" and sizes[asked.index(one)] > 1]
    assert all(len(one.request.body["prompt"]) < CONTEXT - 1 for one in drafting) and drafting
    probes = probe_requests(prompts)
    assert probes == probe_requests(ChatPrompts(TARGET))
    assert all(probe.deterministic for probe in probes)


def test_warming_asks_each_length_and_shares_no_prefix() -> None:
    prompts = [request.body["prompt"] for request in warming_requests(49152)]
    assert [len(prompt) for prompt in prompts] == list(range(1, WARMING + 1))
    assert len({prompt[0] for prompt in prompts}) == WARMING


def test_the_clock_of_another_process_jumps(tmp_path: Path) -> None:
    clock = ShiftedClock(tmp_path)
    if clock.missing:
        pytest.skip(clock.missing)
    code = (
        "import threading, time; a = time.monotonic(); time.sleep(0.01)\n"
        "threading.Event().wait(0.01); print(time.time(), time.monotonic() - a)"
    )
    for days in (0, 3, -5):
        with clock.jumped(days):
            done = subprocess.run(
                [sys.executable, "-S", "-c", code], env={**os.environ, **clock.environment},
                capture_output=True, text=True, timeout=30, check=True,
            )  # fmt: skip
        seen, waited = map(float, done.stdout.split())
        assert abs(seen - time.time() - days * DAY) < 30
        assert waited < 10
