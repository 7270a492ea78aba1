"""Draws the rows of ``vllm-ouroboros bench``: how much faster than vanilla vLLM each method is.

    python scripts/bench/plot.py bench.jsonl --out bench.png

One panel for each batch size (or request rate); of each method the setting with the most tokens per
second, with its 95 % bootstrap interval. Methods that failed or could not run have no bar but the
word. Needs matplotlib (``pip install '.[bench]'``).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vllm_ouroboros.cli.bench.methods import SEEN, TITLES, VANILLA
from vllm_ouroboros.cli.bench.report import best_rows
from vllm_ouroboros.cli.provenance import hardware_line

OURS, THEIRS, LINE = "#b5482f", "#8fa3b5", "#444444"
OUR_METHODS = ("lookahead", "ouroboros-cold", "ouroboros-warm", SEEN)


def read_rows(files: list[Path]) -> list[dict[str, Any]]:
    """The rows of cells in these files, without vanilla's own.

    Raises:
        ValueError: there are none, or a line is no JSON.
    """
    rows = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}: line {number} is not JSON ({error})") from None
            if row.get("kind") == "cell" and row["method"] != VANILLA:
                rows.append(row)
    if not rows:
        raise ValueError(
            f"{', '.join(map(str, files))}: no rows of other methods than vanilla; pass what "
            "`vllm-ouroboros bench --out FILE` wrote"
        )
    return rows


def subtitle(rows: list[dict[str, Any]]) -> str:
    """Where and with what it was measured; that a model is inflated always stands here."""
    row, commits = rows[0], list(dict.fromkeys(row["commit"] for row in rows))
    text = f"{hardware_line(row['hardware'])}, {row['dtype']}, commit {', '.join(commits)}"
    for name, role in (("model", "target"), ("draft_model", "draft")):
        origin = (row.get("inflated") or {}).get(name)
        if origin:
            text += f"\n{role} inflated from {origin}: acceptance is the small pair's"
    return text


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """One panel a load, one bar a method."""
    best = best_rows(rows)
    loads = list(dict.fromkeys((row["batch"], row["rate"]) for row in best))
    widest = max(sum((r["batch"], r["rate"]) == load for r in best) for load in loads)
    figure, panels = plt.subplots(
        1, len(loads), figsize=(2.6 + 3.4 * len(loads), 1.8 + 0.42 * widest),
        sharex=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    shown: list[str] = []
    for panel, load in zip(panels[0], loads, strict=True):
        found = [row for row in best if (row["batch"], row["rate"]) == load]
        names = [TITLES[row["method"]] + _short(row) for row in found]
        _panel(panel, found, names if names != shown else [""] * len(names))
        shown = names
        batch, rate = load
        panel.set_title(f"batch {batch}" if rate is None else f"{rate:g} requests/s", fontsize=10)
    figure.suptitle("Tokens per second, vanilla vLLM = 1", fontsize=12, x=0.01, ha="left")
    figure.supxlabel(subtitle(best), fontsize=7, color=LINE, x=0.01, ha="left")
    figure.savefig(out, dpi=160)
    plt.close(figure)


def _panel(panel: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    for at, row in enumerate(rows):
        ratio, low, high = row["ratio"], row["ratio_low"], row["ratio_high"]
        if row["status"] != "ok" or ratio is None:
            panel.text(0.03, at, row["status"], va="center", fontsize=8, color=LINE)
            continue
        color = OURS if row["method"] in OUR_METHODS else THEIRS
        fill = "none" if row["method"] == SEEN else color  # a ceiling, which nobody gets
        panel.barh(at, ratio, color=fill, edgecolor=color, height=0.68)
        if low is not None:
            # The interval is one of resampled sums; with few rounds it need not hold the value.
            errors = [[max(0.0, ratio - low)], [max(0.0, high - ratio)]]
            panel.errorbar(ratio, at, xerr=errors, color=LINE, capsize=3, linewidth=1)
        panel.annotate(
            f"{ratio:.2f}", (max(ratio, high or 0.0), at), (4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    panel.set_yticks(range(len(rows)), names, fontsize=8)
    panel.invert_yaxis()
    panel.axvline(1.0, color=LINE, linewidth=0.8, linestyle="--")
    panel.margins(x=0.18)
    panel.set_xlim(left=0.0)
    panel.spines[["top", "right"]].set_visible(False)


def _short(row: dict[str, Any]) -> str:
    """Settings of vLLM's methods fit beside their names, ours stand in README."""
    return "" if row["method"] in OUR_METHODS or not row["setting"] else f", {row['setting']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", type=Path, nargs="+", help="JSON lines of vllm-ouroboros bench")
    parser.add_argument("--out", type=Path, default=Path("bench.png"))
    args = parser.parse_args()
    try:
        draw(read_rows(args.rows), args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"plot: {error}")
    print(args.out)


if __name__ == "__main__":
    main()
