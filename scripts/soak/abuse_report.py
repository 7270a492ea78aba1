"""The report of a run, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abuse_latencies import Window
from abuse_verdicts import Row

from vllm_ouroboros.cli.provenance import commit, hardware, hardware_line, versions


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A file with a line of JSON for each row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Report:
    """What a run has found."""

    rows: Sequence[Row]
    windows: Sequence[Window]
    lives: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    checks: Sequence[Mapping[str, Any]]
    counts: Mapping[str, int]
    settings: Mapping[str, Any]

    def table(self) -> str:
        """The verdicts, as text."""
        width = max(len(row.name) for row in self.rows)
        return "\n".join(
            f"{row.verdict:>10}  {row.name:<{width}}  {row.found}" for row in self.rows
        )

    def write(self, folder: Path) -> None:
        """Write report.json and report.md."""
        made_on = {
            "commit": commit(),
            "hardware": hardware(),
            "versions": versions(),
        }
        content = {
            "settings": dict(self.settings), **made_on,
            "rows": [{"name": r.name, "passed": r.passed, "found": r.found} for r in self.rows],
            "windows": [
                {**w._asdict(), "span": [w.span.begin, w.span.end]} for w in self.windows
            ],
            "lives": list(self.lives), "events": list(self.events), "checks": list(self.checks),
            "counts": dict(self.counts),
        }  # fmt: skip
        (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "report.md").write_text(self._markdown(made_on))

    def _markdown(self, made_on: Mapping[str, Any]) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))
        parts = [
            f"# Abuse: {settings}",
            f"Commit {made_on['commit']}, {hardware_line(made_on['hardware'])}, "
            f"{made_on['versions']}.",
            _rows(("verdict", "what", "found"), ((r.verdict, r.name, r.found) for r in self.rows)),
            "## Latency of the probes\n\nMedians. The ratio is of latencies divided by the "
            "same probe's in the first window.",
            _rows(("minutes", "answers", "seconds", "ratio, 95 %"), map(_window, self.windows)),
            "## Memory of each life\n\nMB an hour, 95 %.",
            _rows(
                ("life", "ready (s)", "ended (s)", "without the first minutes", "latter half"),
                map(_life, self.lives),
            ),
            "## Events",
            _rows(
                ("event", "at (s)", "mended (s)", "effect", "problems"), map(_event, self.events)
            ),
            f"## Requests\n\n{counts}",
        ]
        return "\n\n".join(parts) + "\n"


def _rows(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _window(window: Window) -> tuple[object, ...]:
    begin, end = window.span.begin / 60, window.span.end / 60
    seconds = "" if window.seconds is None else f"{window.seconds:.2f}"
    ratio = "" if window.ratio is None else f"{window.ratio:.3f}"
    if window.low is not None:
        ratio += f" ({window.low:.3f} to {window.high:.3f})"
    return f"{begin:g} to {end:g}", window.answers, seconds, ratio


def _life(life: Mapping[str, Any]) -> tuple[object, ...]:
    ended = "" if life["ended"] is None else f"{life['ended']:.0f}"
    found = life["memory"]
    return (
        life["name"],
        f"{life['ready']:.0f}",
        ended,
        _grown(found["warm"]),
        _grown(found["latter"]),
    )


def _grown(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "too short"
    growth, low, high = (found[name] / 1e6 for name in ("per_hour", "low", "high"))
    return f"{growth:+.1f} ({low:+.1f} to {high:+.1f})"


def _event(event: Mapping[str, Any]) -> tuple[object, ...]:
    what = f"skipped: {event['skipped']}" if "skipped" in event else json.dumps(event["effect"])
    return event["event"], event["at"], event["mended"], what, "; ".join(event["problems"])
