"""Statistics of the benchmark, and its rows.

A *cell* is a method with a setting at one load: a batch size, or a request rate. Its runs, one a
round, become one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from vllm_ouroboros.cli.bench.engine import RunResult
from vllm_ouroboros.cli.bench.methods import VANILLA, Method

RESAMPLES, SEED = 4000, 0


@dataclass(frozen=True)
class Load:
    """A batch size, or the rate of a server's requests a second.

    ``prompts`` is how many of the prompts it takes; None: all.
    """

    batch: int | None = None
    rate: float | None = None
    prompts: int | None = None

    def __str__(self) -> str:
        return f"batch {self.batch}" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass
class Cell:
    """A method at a load, and what came of it.

    Attributes:
        runs: results by round.
        peaks: bytes of the largest resident memory, one a run.
        failure: why it has failed.
        gaps: for prompts whose output is not vanilla's, by how much vanilla's logit of its own
            token is above that of the other one.
    """

    method: Method
    load: Load
    runs: dict[int, RunResult] = field(default_factory=dict)
    peaks: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    gaps: dict[int, float] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """ "ok", "failed", "skipped" (cannot run here) or "not run" (interrupted before)."""
        if self.failure is not None:
            return "failed"
        if self.method.missing is not None:
            return "skipped"
        return "ok" if self.runs else "not run"

    @property
    def answers(self) -> list[Any]:
        """Outputs of its first run; what all others of a load are compared with is vanilla's."""
        return next(iter(self.runs.values())).outputs if self.runs else []


def speed(run: RunResult) -> float:
    """Tokens per second of a run, prompt processing included."""
    tokens, seconds = map(sum, zip(*run.groups, strict=True))
    return float(tokens / max(seconds, 1e-9))


def ratio(
    mine: Mapping[int, RunResult], vanilla: Mapping[int, RunResult]
) -> tuple[float, float | None, float | None] | None:
    """Ratio of tokens per second, and its 95 % percentile bootstrap interval.

    Runs are paired by round and, within it, by group of requests; rounds and groups are resampled
    independently. With fewer than three pairs there is no interval.
    """
    rounds = sorted(mine.keys() & vanilla.keys())
    if not rounds or len({len(r[n].groups) for r in (mine, vanilla) for n in rounds}) != 1:
        return None
    # [engine, round, group, tokens or seconds]
    data = np.array([[run[n].groups for n in rounds] for run in (mine, vanilla)], dtype=float)
    counts = data.shape[1:3]
    value = float(_ratio(data.sum(axis=(1, 2))[None])[0])
    if counts[0] * counts[1] < 3:
        return value, None, None
    random = np.random.default_rng(SEED)
    by_round, by_group = (
        random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float) for n in counts
    )
    sums = np.einsum("br,ergv,bg->bev", by_round, data, by_group)
    low, high = np.percentile(_ratio(sums), [2.5, 97.5])
    return value, float(low), float(high)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Speed of the first engine over that of the second; sums [B, engine, tokens or seconds]."""
    speeds = sums[..., 0] / np.maximum(sums[..., 1], 1e-9)
    return speeds[:, 0] / np.maximum(speeds[:, 1], 1e-9)


def counts(method: Method, load: Load, run: RunResult) -> dict[str, float | None]:
    """Tokens per target forward, draft forwards and verified nodes per token of a run.

    A target forward here is one verification of one request, as in the paper; draft forwards are
    those of whole batches. vLLM does not count its draft model's: it runs K in each engine step.
    Nor does it count verifications: at batch 1 they are its steps; else they are told from the
    accepted tokens, a little too few, for vLLM counts those beyond an answer's last token as well.
    """
    tokens = sum(map(len, run.outputs)) if not _texts(run) else sum(t for t, _ in run.groups)
    got = run.counters
    forwards: float | None = None
    drafts: float | None = None
    nodes = got.get("draft_nodes", 0)
    if "steps" in got:
        forwards, drafts, nodes = got["steps"], got["draft_forwards"], got["verified_nodes"]
    elif method.name == VANILLA:
        forwards = tokens
    elif load.batch == 1 and "engine_steps" in got:
        forwards = got["engine_steps"]
    elif "accepted" in got:
        forwards = tokens - got["accepted"]
    if drafts is None and not method.draft_tokens:
        drafts = None if method.ouroboros else 0
    elif drafts is None and "engine_steps" in got:
        drafts = (method.draft_tokens or 0) * got["engine_steps"]
    return {
        "tokens_per_target_forward": tokens / forwards if forwards and forwards > 0 else None,
        "draft_forwards_per_token": drafts / tokens if tokens and drafts is not None else None,
        "verified_nodes_per_token": nodes / tokens if tokens else None,
    }


def _texts(run: RunResult) -> bool:
    return bool(run.outputs) and isinstance(run.outputs[0], str)


def compare(runs: Sequence[RunResult], expected: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """The prompts of which an output is not the expected one in some run, and where it begins."""
    found = []
    for prompt, wanted in enumerate(expected):
        wrong = next((run.outputs[prompt] for run in runs if run.outputs[prompt] != wanted), None)
        if wrong is not None:
            at = 0
            while wrong[at : at + 1] == wanted[at : at + 1]:
                at += 1
            found.append(
                {
                    "prompt": prompt,
                    "unit": "character" if isinstance(wanted, str) else "token",
                    "at": at,
                    "found": wrong[at] if at < len(wrong) else None,
                    "vanilla": wanted[at] if at < len(wanted) else None,
                }
            )
    return found


def differences(cell: Cell, vanilla: Cell | None) -> list[dict[str, Any]]:
    """Where a cell's outputs leave those of vanilla's first run."""
    return compare([*cell.runs.values()], vanilla.answers if vanilla is not None else [])


def run_row(cell: Cell, number: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The row of one run, written as soon as it is there."""
    run = cell.runs[number]
    return {
        "kind": "run",
        **_names(cell),
        "round": number,
        "tokens_per_second": speed(run),
        "groups": [[tokens, round(seconds, 6)] for tokens, seconds in run.groups],
        "counters": run.counters,
        "costs": run.costs,
        "commit": facts["commit"],
        "time": facts["time"],
    }


def by_task(
    cell: Cell, vanilla: Mapping[int, RunResult], tasks: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Latencies of the prompts of each task and, at batch 1, their speed, ratio and counts."""
    found: dict[str, dict[str, Any]] = {}
    mine = cell.runs
    for task in dict.fromkeys(tasks) if mine else ():
        kept = {n: _only(run, tasks, task) for n, run in mine.items()}
        figures = {"prompts": tasks.count(task), **_latencies([*kept.values()])}
        runs = [run for run in kept.values() if run.groups]
        theirs = {n: _only(run, tasks, task) for n, run in vanilla.items()}
        if runs and (compared := ratio(kept, theirs)) is not None:
            counted = [counts(cell.method, cell.load, run) for run in runs]
            figures |= {
                "tokens": sum(tokens for tokens, _ in runs[0].groups),
                "tokens_per_second": median(speed(run) for run in runs),
                **dict(zip(("ratio", "ratio_low", "ratio_high"), compared, strict=True)),
                **{name: _median([one[name] for one in counted]) for name in counted[0]},
            }
        found[task] = figures
    return found


def _only(run: RunResult, tasks: Sequence[str], task: str) -> RunResult:
    """The part of a run that belongs to a task; without groups where those hold several tasks."""
    places = [i for i, kind in enumerate(tasks) if kind == task]
    apart = len(run.groups) == len(tasks)
    counters: Counter[str] = Counter()
    for i in places if len(run.group_counters) == len(tasks) else ():
        counters.update(run.group_counters[i])
    return RunResult(
        groups=[run.groups[i] for i in places] if apart else [],
        outputs=[run.outputs[i] for i in places],
        first=[run.first[i] for i in places],
        each=[run.each[i] for i in places],
        counters=dict(counters),
    )


def _latencies(runs: Sequence[RunResult]) -> dict[str, float | None]:
    return {
        "first_token_ms": _ms([s for run in runs for s in run.first]),
        "time_per_token_ms": _ms([s for run in runs for s in run.each]),
    }


def cell_row(
    cell: Cell, vanilla: Cell | None, facts: Mapping[str, Any], tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """The row of a cell over all its rounds; figures are null where there are none."""
    runs = list(cell.runs.values())
    speeds = [speed(run) for run in runs]
    found = [counts(cell.method, cell.load, run) for run in runs]
    compared = ratio(cell.runs, vanilla.runs) if vanilla is not None else None
    value, low, high = compared or (None, None, None)
    compared_to = len(runs[0].outputs) if runs and vanilla is not None and vanilla.runs else None
    different = [
        one | {"gap": cell.gaps.get(one["prompt"])} for one in differences(cell, vanilla)
    ]  # fmt: skip
    return {
        "kind": "cell",
        **_names(cell),
        "rule": cell.method.rule,
        "status": cell.status,
        "reason": cell.failure or (cell.method.missing if cell.status == "skipped" else None),
        "rounds": len(runs),
        "prompts": len(runs[0].outputs) if runs else None,
        "tokens_per_second": median(speeds) if runs else None,
        "tokens_per_second_min": min(speeds, default=None),
        "tokens_per_second_max": max(speeds, default=None),
        "ratio": value,
        "ratio_low": low,
        "ratio_high": high,
        **_latencies(runs),
        **{
            name: _median([f[name] for f in found])
            for name in counts(cell.method, cell.load, _NOTHING)
        },
        "peak_memory_mib": round(max(cell.peaks) / 2**20) if cell.peaks else None,
        "outputs_equal": None if compared_to is None else compared_to - len(different),
        "outputs_total": compared_to,
        "differences": different,
        "tasks": by_task(cell, vanilla.runs if vanilla is not None else {}, tasks),
        **cell.facts,
        **facts,
    }


_NOTHING = RunResult([], [], [], [])


def _names(cell: Cell) -> dict[str, Any]:
    return {
        "method": cell.method.name,
        "setting": cell.method.setting,
        "batch": cell.load.batch,
        "rate": cell.load.rate,
    }


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ms(seconds: Sequence[float | None]) -> float | None:
    middle = _median(seconds)
    return None if middle is None else 1e3 * middle
