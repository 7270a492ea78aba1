"""The cost of a forward on this machine: seconds by rows, measured, then kept up to date."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256, 512)
"""Rows at which forwards are measured."""
REPEATS = 3
MEASURING_LIMIT_S = 4.0  # that a measurement may take, the size it is at included once more
OBSERVATION_WEIGHT = 0.05  # of a new observation in averages
EARLY_OBSERVATIONS = 8  # that weigh more
BEND_REACH = 3.0  # doublings of rows over which an observation counts for other sizes
FILE_SUFFIX = ".costs.json"
"""What the name of a pool's file gets for that of the costs."""
HOST_COSTS = ("overhead", "planning", "drafting")
"""Fields of `Costs` beside those of forwards."""
MAX_DRAFTING_SHARE = 0.75  # of the overhead that a first observation of drafting may come to
MAX_DEVIATION = 3.0  # an observation counts as at most so many times what was expected


def measure(
    run: Callable[[int], object],
    most: int,
    clock: Callable[[], float] = time.perf_counter,
    graphs: Sequence[int] = (),
) -> CostCurve:
    """Time forwards of up to ``most`` rows; the fastest of some runs of each size counts.

    Large sizes are left out where they would take too long.

    Args:
        run: runs a forward of so many rows and waits for it.
        most: rows that a forward can have.
        clock: seconds.
        graphs: see `CostCurve`.
    """
    begin = clock()
    sizes: list[int] = []
    seconds: list[float] = []
    for size in SIZES:
        if sizes and (size > most or (len(sizes) > 1 and clock() - begin > MEASURING_LIMIT_S)):
            break
        run(size)  # the first of a shape may compile
        times: list[float] = []
        while not times or (len(times) < REPEATS and clock() - begin < MEASURING_LIMIT_S):
            start = clock()
            run(size)
            times.append(clock() - start)
        sizes.append(size)
        seconds.append(min(times))
    return CostCurve(sizes, seconds, graphs=graphs)


@dataclass
class CostCurve:
    """Seconds of a forward by rows, never falling; linear between and behind measured sizes.

    Attributes:
        sizes: rows, ascending.
        seconds: measured for each.
        graphs: rows of the graphs that forwards are padded to, ascending; larger ones are not.
        factor: what forwards took online, against this; see `observe`.
        observed: how many of them there were.
    """

    sizes: Sequence[int]
    seconds: Sequence[float]
    factor: float = 1.0
    observed: int = 0
    graphs: Sequence[int] = ()
    _table: np.ndarray = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        # whatever disturbs a measurement makes it longer: fewer rows never cost more than more rows
        falling = np.asarray(self.seconds, float)[::-1]
        self.seconds = np.minimum.accumulate(falling)[::-1].tolist()

    def table(self, rows: int) -> np.ndarray:
        """Seconds float64 [rows + 1] of forwards of 0, 1, 2 ... rows; none costs nothing."""
        return self._whole(rows)[: rows + 1] * self.factor

    def at(self, rows: int) -> float:
        """Seconds of a forward of so many rows."""
        return self._at(rows) * self.factor

    def observe(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` rows took so long: slower contexts and neighbours show here."""
        expected = self._at(rows)
        if rows > 0 and expected > 0:
            lowest, highest = self.factor / MAX_DEVIATION, self.factor * MAX_DEVIATION
            seen = min(max(seconds / expected, lowest), highest)
            # what these rows cost against others, then what all cost against the start; the first
            # observations weigh more, for the start may have been unlike what came then
            self._bend(rows, OBSERVATION_WEIGHT * (seen / self.factor - 1.0))
            self.observed += 1
            weight = 0.5 if self.observed <= EARLY_OBSERVATIONS else OBSERVATION_WEIGHT
            self.factor += weight * (seen - self.factor)

    def _bend(self, rows: int, share: float) -> None:
        """Change the seconds of the sizes around ``rows`` by up to this share.

        Of sizes far and wide, the less the farther: a bump where forwards happen to be would keep
        them there.
        """
        seconds = np.asarray(self.seconds, float)
        far = np.abs(np.log2(rows / np.asarray(self.sizes, float)))
        seconds *= 1.0 + share * np.maximum(0.0, 1.0 - far / BEND_REACH)
        self.seconds = np.maximum.accumulate(seconds).tolist()
        self._table = np.empty(0)

    def _at(self, rows: int) -> float:
        return float(self._whole(rows)[rows])

    def _whole(self, rows: int) -> np.ndarray:
        """Seconds by rows, up to these at least, without the factor."""
        if rows >= len(self._table):
            last = self.sizes[-1]
            asked = np.arange(2 * max(rows, int(last)) + 1, dtype=float)
            if len(self.graphs):
                padded = asked[: self.graphs[-1] + 1]
                padded[:] = np.asarray(self.graphs)[np.searchsorted(self.graphs, padded)]
            self._table = np.interp(asked, self.sizes, self.seconds)
            if len(self.sizes) == 1:
                self._table *= np.maximum(1.0, asked / last)
            else:
                rise = (self.seconds[-1] - self.seconds[-2]) / (last - self.sizes[-2])
                self._table += rise * np.maximum(0.0, asked - last)
            self._table[0] = 0.0
        return self._table


@dataclass
class Costs:
    """Costs of an engine's steps.

    Attributes:
        target: forwards of the target.
        draft: forwards of the draft model; None without one.
        overhead: seconds of a step outside the forwards, this plugin's work included.
        planning: seconds of a round of drafting outside its forward.
        drafting: seconds beyond overhead and rounds that a step takes which drafts.
    """

    target: CostCurve
    draft: CostCurve | None
    overhead: float = 0.0
    planning: float = 0.0
    drafting: float = 0.0

    @classmethod
    def of(cls, shown: dict[str, Any]) -> Costs:
        """Costs from what `as_dict` showed."""
        curves = {
            name: CostCurve(
                [int(n) for n in shown[name]], [ms / 1000 for ms in shown[name].values()]
            )
            for name in ("target", "draft")
            if name in shown
        }
        seconds = {name: shown[name] / 1000 for name in HOST_COSTS if name in shown}
        return cls(curves["target"], curves.get("draft"), **seconds)

    def round(self, rows: int) -> float:
        """Seconds of a round of drafting with so many rows."""
        return self.planning + (self.draft.at(rows) if self.draft is not None else 0.0)

    def observe_round(self, rows: int, forward: float, seconds: float) -> None:
        """A round took so many seconds, the forward included."""
        if self.draft is not None:
            self.draft.observe(rows, forward)
            self.planning = update_average(self.planning, seconds - forward, self.draft.at(rows))

    def observe_overhead(self, seconds: float, drafted: bool = False) -> None:
        """A step spent so long outside forwards and rounds of drafting, if it had any."""
        if drafted and 0 < self.overhead <= seconds:
            more = seconds - self.overhead
            usual = MAX_DRAFTING_SHARE * self.overhead / MAX_DEVIATION
            self.drafting = update_average(self.drafting, more, usual)
        else:
            self.overhead = update_average(self.overhead, seconds, self.target.at(1))

    def as_dict(self) -> dict[str, Any]:
        """Milliseconds, by name, as shown to people."""
        curves = {"target": self.target, "draft": self.draft}
        shown: dict[str, Any] = {
            name: {str(n): round(1000 * curve.at(n), 3) for n in curve.sizes}
            for name, curve in curves.items()
            if curve is not None
        }
        return shown | {name: round(1000 * getattr(self, name), 3) for name in HOST_COSTS}

    def save(self, pool_path: str) -> Path:
        """Write `as_dict` beside a pool's file, in one go; returns where.

        It is readable by its owner alone.

        Raises:
            OSError: it cannot be written.
        """
        # pathlib's own raises on an unknown user
        path = Path(os.path.expanduser(f"{pool_path}{FILE_SUFFIX}"))  # noqa: PTH111
        fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(json.dumps(self.as_dict(), indent=1) + "\n")
        fresh.replace(path)
        return path


def read_costs(path: Path) -> dict[str, Any]:
    """What `Costs.save` wrote; other names are left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else.
    """
    try:
        found = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict) or "target" not in found:
        raise ValueError("no costs of an engine")
    curves = {name: found[name] for name in ("target", "draft") if name in found}
    hosts = {name: found[name] for name in HOST_COSTS if name in found}
    if not all(map(_is_curve, curves.values())) or not all(map(_is_time, hosts.values())):
        raise ValueError("no costs of an engine")
    return curves | hosts


def _is_curve(found: object) -> bool:
    """Whether this is milliseconds by rows, ascending."""
    if not isinstance(found, dict) or not all(map(_is_time, found.values())):
        return False
    # no more than anybody measures: tables of costs are as long
    rows = [int(name) for name in found if len(name) < 6 and name.isdecimal()]
    return [str(n) for n in sorted({*rows} - {0})] == [*found] != []


def _is_time(found: object) -> bool:
    return type(found) in (int, float) and 0 <= found < 1e12  # type: ignore[operator]


def update_average(average: float, seen: float, usual: float) -> float:
    """An average with one more observation, be it seconds or a share.

    The first one is all there is. Any may have waited for a compiler, so it is bounded by the
    average so far, or else by what is usual.
    """
    seen = min(max(seen, 0.0), MAX_DEVIATION * (average or usual))
    return average + OBSERVATION_WEIGHT * (seen - average) if average else seen
