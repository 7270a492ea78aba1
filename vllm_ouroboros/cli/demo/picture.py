"""The demo's result as an SVG: a few texts in the colours of their origins, and the totals."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.terminal_theme import MONOKAI

from vllm_ouroboros.cli.demo.report import Comparison, show_text, show_totals
from vllm_ouroboros.cli.inputs import InputError

if TYPE_CHECKING:
    from vllm_ouroboros.cli.demo.job import Job

WIDTH = 100  # characters
TEXTS = 3  # that are shown
HEAD, TAIL = 1, 3  # lines of a prompt that are shown, of its beginning and its end


def middle(rows: Sequence[Comparison], count: int = TEXTS) -> list[Comparison]:
    """The rows around the median ratio, in their own order: neither the best nor the worst."""
    ranked = sorted(range(len(rows)), key=lambda i: rows[i].ratio)
    first = max(0, (len(rows) - count) // 2)
    return [rows[i] for i in sorted(ranked[first : first + count])]


def shortened(prompt: str) -> str:
    """A prompt whose middle lines, if it has many, are left out."""
    lines = prompt.splitlines(keepends=True)
    if len(lines) <= HEAD + TAIL + 1:
        return prompt
    return "".join([*lines[:HEAD], "    ...\n", *lines[-TAIL:]])


def save_picture(
    path: Path, job: Job, rows: Sequence[Comparison], counters: Mapping[str, int]
) -> None:
    """Write the SVG; ``counters`` are Ouroboros's over the timed passes.

    Raises:
        InputError: the file cannot be written.
    """
    console = Console(
        record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor",
        highlight=False, emoji=False, markup=False,
    )  # fmt: skip
    for row in middle(rows):
        show_text(console, replace(row, prompt=shortened(row.prompt)), soft_wrap=False)
    show_totals(console, job, rows, counters)
    picture = console.export_svg(title="vllm-ouroboros demo", theme=MONOKAI, unique_id="demo")
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--svg {path}: {error.strerror}; pass a file's path") from None
