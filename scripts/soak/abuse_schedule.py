"""What happens when in a run of abuse. All times are seconds since the load began."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WINDOWS = 6
"""Of ten minutes in an hour; nothing is broken in the first one."""
LEAD = 1 / 30
"""Part of a run after a start of the server that is left out of latencies."""
SAVES = 30
"""Periodic saves of the pool in a run."""
EVENTS = (
    ("truncated", 0.17), ("garbage", 0.26), ("foreign", 0.35), ("unwritable", 0.44), ("full", 0.53),
    ("clock_forwards", 0.63), ("clock_backwards", 0.72), ("engine_killed", 0.82),
    ("server_killed", 0.91),
)  # fmt: skip
"""Events and when they come, as parts of a run. Kills are last: memory is judged by a long life."""


@dataclass(frozen=True)
class Planned:
    """An event: what is broken stays so for some seconds; a killed server is started at once."""

    name: str
    at: float
    seconds: float


@dataclass(frozen=True)
class Outage:
    """No server answers, from a kill until the next one is ready."""

    begin: float
    end: float = math.inf


@dataclass(frozen=True)
class Span:
    """Time in which one server answered."""

    begin: float
    end: float = math.inf


def save_seconds(minutes: float) -> float:
    """Time between two saves of the pool: in an hour two minutes, of which five are usual."""
    return max(4.0, minutes * 60 / SAVES)


def plan(minutes: float) -> list[Planned]:
    """All events of a run; what is broken meets a save of the pool."""
    broken = 1.2 * save_seconds(minutes)
    return [
        Planned(name, part * minutes * 60, 0.0 if name.endswith("killed") else broken)
        for name, part in EVENTS
    ]


def windows(seconds: float) -> list[Span]:
    """The windows of a run."""
    size = seconds / WINDOWS
    return [Span(i * size, (i + 1) * size) for i in range(WINDOWS)]


def settled(at: float, lives: Sequence[Span], lead: float) -> bool:
    """Whether a server has been under load for a while."""
    return any(life.begin + lead <= at < life.end for life in lives)


def excuse(outages: Sequence[Outage], begun: float, ended: float) -> str | None:
    """Why a request may have failed: "cut" by a kill, or "refused" since there was no server."""
    for outage in outages:
        if begun < outage.begin <= ended:
            return "cut"
        if outage.begin <= begun < outage.end:
            return "refused"
    return None
