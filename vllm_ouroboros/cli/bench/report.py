"""What the benchmark shows in the end: the best setting of each method, by load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_ouroboros.cli.bench.methods import TITLES
from vllm_ouroboros.cli.bench.rows import Load
from vllm_ouroboros.cli.provenance import hardware_line

Row = Mapping[str, Any]
HEADINGS = (
    "tokens/s", "min..max", "ratio [95 %]", "first token ms", "ms/token", "tokens/target fwd",
    "draft fwd/token", "nodes/token", "MiB", "outputs",
)  # fmt: skip

BY_TASK = {
    "ratio": ("times vanilla vLLM", 2),
    "tokens_per_target_forward": ("tokens/target fwd", 2),
    "verified_nodes_per_token": ("nodes/token", 2),
    "first_token_ms": ("first token ms", 0),
    "time_per_token_ms": ("ms/token", 1),
}
"""Figures of a task, and what they are called; some exist at batch 1 alone."""


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Of each method and load the row with the most tokens per second, else one that says why not.

    Methods and loads stay in their order.
    """
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["batch"], row["rate"], row["method"])
        if key not in best or _rank(row) > _rank(best[key]):
            best[key] = row
    return list(best.values())


def _rank(row: Row) -> tuple[bool, float]:
    return row["status"] == "ok", row["tokens_per_second"] or 0.0


def show_report(console: Console, rows: Sequence[Row]) -> None:
    """Tables, then everything that failed or differs, then where it was measured."""
    shown = best_rows(rows)
    for load in dict.fromkeys((row["batch"], row["rate"]) for row in shown):
        table = Table(
            title=str(Load(*load)),
            title_justify="left", box=None, pad_edge=False,
        )  # fmt: skip
        table.add_column("method, best setting", overflow="fold")
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        for row in shown:
            if (row["batch"], row["rate"]) == load:
                name = f"{TITLES[row['method']]} {row['setting']}".strip()
                if row["status"] == "ok":
                    table.add_row(name, *_cells(row))
                else:
                    table.add_row(name, row["status"])
        console.print(table)
        console.print()
        _show_tasks(console, [row for row in shown if (row["batch"], row["rate"]) == load])
    for row in rows:
        _show_trouble(console, row)
    _show_facts(console, rows[0])


def _show_tasks(console: Console, rows: Sequence[Row]) -> None:
    """Figures by task, of the rows of one load that have them."""
    rows = [row for row in rows if row.get("tasks")]
    tasks = [*rows[0]["tasks"]] if rows else []
    for figure, (title, digits) in BY_TASK.items():
        found = [[row["tasks"].get(task, {}).get(figure) for task in tasks] for row in rows]
        if not any(value is not None for values in found for value in values):
            continue
        table = Table(box=None, pad_edge=False)
        table.add_column("method, best setting", overflow="fold")
        for task in tasks:
            table.add_column(task, justify="right")
        for row, values in zip(rows, found, strict=True):
            name = f"{TITLES[row['method']]} {row['setting']}".strip()
            table.add_row(name, *(_number(value, digits) for value in values))
        console.print(f"{_load(rows[0])}, {title} by task", style="italic")
        console.print(table)
        console.print()


def _cells(row: Row) -> list[str]:
    low, high = row["ratio_low"], row["ratio_high"]
    interval = f" [{low:.2f}, {high:.2f}]" if low is not None else ""
    return [
        _number(row["tokens_per_second"], 1),
        f"{row['tokens_per_second_min']:.1f}..{row['tokens_per_second_max']:.1f}",
        _number(row["ratio"]) + interval,
        _number(row["first_token_ms"], 0),
        _number(row["time_per_token_ms"], 1),
        _number(row["tokens_per_target_forward"]),
        _number(row["draft_forwards_per_token"]),
        _number(row["verified_nodes_per_token"]),
        _number(row["peak_memory_mib"], 0),
        "-" if row["outputs_equal"] is None else f"{row['outputs_equal']}/{row['outputs_total']}",
    ]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def row_title(row: Row) -> str:
    """Method, setting and load in words."""
    return ", ".join(filter(None, (TITLES[row["method"]], row["setting"], _load(row))))


def _load(row: Row) -> str:
    return str(Load(row["batch"], row["rate"]))


def _show_trouble(console: Console, row: Row) -> None:
    if row["status"] != "ok":
        reason = f": {row['reason']}" if row["reason"] else ""
        style = "red" if row["status"] == "failed" else "dim"
        console.print(f"{row['status']}: {row_title(row)}{reason}", style=style, soft_wrap=True)
    elif row["differences"]:
        at = row["differences"][0]
        gaps = ", ".join(_number(one["gap"], 3) for one in row["differences"])
        console.print(
            f"different: {row_title(row)}: {len(row['differences'])} of {row['outputs_total']} "
            f"outputs ({row['dtype']}); first in prompt {at['prompt']} at {at['unit']} {at['at']}: "
            f"{at['found']!r}, vanilla has {at['vanilla']!r}; vanilla's logit is above by {gaps}",
            style="red" if row["dtype"] == "float32" else "yellow",
            soft_wrap=True,
        )


def _show_facts(console: Console, row: Row) -> None:
    origin = (row["inflated"] or {}).get("model")
    console.print(
        f"{hardware_line(row['hardware'])}; "
        + ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        + f"; commit {row['commit']}"
        + (f"; inflated from {origin}: acceptance is the small pair's" if origin else ""),
        style="dim",
        soft_wrap=True,
    )


def all_well(rows: Sequence[Row]) -> bool:
    """Whether no cell has failed and, in float32, no output differs from vanilla's."""
    return not any(
        row["status"] == "failed" or (row["differences"] and row["dtype"] == "float32")
        for row in rows
    )
