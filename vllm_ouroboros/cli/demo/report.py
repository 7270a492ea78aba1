"""What the demo shows: texts with their origins, then speeds and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vllm_ouroboros.cli.demo.engine import EngineResult, Generation
from vllm_ouroboros.cli.loops import loops
from vllm_ouroboros.cli.provenance import inflated

if TYPE_CHECKING:
    from vllm_ouroboros.cli.demo.job import Job

NAMES = {"vanilla": "vanilla vLLM", "ouroboros": "Ouroboros"}
ORIGINS = (
    ("target", "yellow"),
    ("draft model", "green"),
    ("suffix phrase", "bold magenta"),
    ("prediction", "cyan"),
)


@dataclass(frozen=True)
class Comparison:
    """One prompt through both engines."""

    id: str
    prompt: str
    vanilla: Generation
    ouroboros: Generation
    chat: bool = False

    @property
    def identical(self) -> bool:
        """Whether every pass of both engines gave the same tokens."""
        expected = self.vanilla.token_ids[0]
        return all(ids == expected for ids in self.vanilla.token_ids + self.ouroboros.token_ids)

    @property
    def loops(self) -> bool:
        """Whether the text repeats itself, which flatters any speculative decoder."""
        return loops(self.vanilla.token_ids[0])

    def tokens(self, engine: str) -> int:
        """Tokens of one pass of an engine ("vanilla" or "ouroboros")."""
        return len(getattr(self, engine).token_ids[0])

    def seconds(self, engine: str) -> float:
        """Time of one pass of an engine."""
        return float(getattr(self, engine).seconds)

    @property
    def ratio(self) -> float:
        """How many times as fast Ouroboros is."""
        speeds = _speeds([self])
        return speeds["ouroboros"] / speeds["vanilla"]


def compare(job: Job, vanilla: EngineResult, ouroboros: EngineResult) -> list[Comparison]:
    """Each prompt of a job through both engines."""
    found = zip(job.prompts, vanilla.generations, ouroboros.generations, strict=True)
    return [Comparison(*prompt, one, other, job.chat) for prompt, one, other in found]


def show_report(
    console: Console, job: Job, rows: Sequence[Comparison], counters: Mapping[str, int]
) -> None:
    """Show everything on the console; ``counters`` are Ouroboros's over the timed passes."""
    for row in rows:
        show_text(console, row)
    _show_prompts(console, job, rows)
    show_totals(console, job, rows, counters)


def show_text(console: Console, row: Comparison, *, soft_wrap: bool = True) -> None:
    """Prompt and text, each token in the colour of its origin, and what it is made of.

    With ``soft_wrap`` long lines are left to the terminal.
    """
    console.print(Rule(row.id, style="dim", align="left"))
    text = Text().append(row.prompt, style="dim")
    if row.chat:
        text.append("\n\n")
    for piece, origin in zip(row.ouroboros.pieces, row.ouroboros.origins, strict=True):
        text.append(piece, style=ORIGINS[origin][1])
    console.print(text, soft_wrap=soft_wrap)
    counts = Counter(row.ouroboros.origins)
    legend = Text("\n")
    for origin, (name, style) in enumerate(ORIGINS):
        if name == "prediction" and not counts[origin]:
            continue
        legend.append("■ ", style=style)
        legend.append(f"{name} {counts[origin]}   ")
    if row.identical:
        legend.append("identical")
    else:
        legend.append("DIFFERENT", style="bold red")
    console.print(legend)
    if not row.identical:
        _show_difference(console, row)
    console.print()


def _show_difference(console: Console, row: Comparison) -> None:
    expected = row.vanilla.token_ids[0]
    for name in ("vanilla", "ouroboros"):
        for number, ids in enumerate(getattr(row, name).token_ids):
            if ids == expected:
                continue
            at = 0
            while ids[at : at + 1] == expected[at : at + 1]:
                at += 1
            console.print(
                f"{NAMES[name]}, pass {number}: token {at} is {ids[at : at + 1]}, "
                f"vanilla's first pass has {expected[at : at + 1]}",
                style="red",
            )


def _show_prompts(console: Console, job: Job, rows: Sequence[Comparison]) -> None:
    one = "task" if job.chat else "prompt"
    table = Table(title=f"Each {one}, tokens/s", title_justify="left", box=None, pad_edge=False)
    table.add_column(one, overflow="ellipsis", no_wrap=True)
    for heading in ("tokens", "vanilla", NAMES["ouroboros"], "ratio"):
        table.add_column(heading, justify="right", min_width=len(heading))
    table.add_column("output")
    for row in rows:
        speeds = _speeds([row])
        output = "identical" if row.identical else "DIFFERENT"
        table.add_row(
            row.id,
            str(row.tokens("vanilla")),
            f"{speeds['vanilla']:.1f}",
            f"{speeds['ouroboros']:.1f}",
            f"{row.ratio:.2f}",
            output + (", loops" if row.loops else ""),
        )
    console.print(table)
    console.print()


def show_totals(
    console: Console, job: Job, rows: Sequence[Comparison], counters: Mapping[str, int]
) -> None:
    """Speeds and counts over all prompts, and how they were measured."""
    speeds = _speeds(rows)
    tokens = sum(row.tokens("ouroboros") for row in rows)
    forwards = counters["target_forwards"] / job.rounds
    drafts = counters["draft_forwards"] / job.rounds
    same = sum(row.identical for row in rows)
    table = Table(title="All prompts", title_justify="left", box=None, pad_edge=False)
    table.add_column("engine")
    for heading in (
        "tokens/s", "ratio", "tokens per target forward", "draft forwards per token",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    table.add_column("output")
    table.add_row(NAMES["vanilla"], f"{speeds['vanilla']:.1f}", "1.00", "1.00", "0.00", "")
    table.add_row(
        NAMES["ouroboros"],
        f"{speeds['ouroboros']:.1f}",
        f"{speeds['ouroboros'] / speeds['vanilla']:.2f}",
        f"{tokens / forwards:.2f}" if forwards else "-",
        f"{drafts / tokens:.2f}" if tokens else "-",
        "identical" if same == len(rows) else f"DIFFERENT in {len(rows) - same} of {len(rows)}",
    )
    console.print(table)
    if forwards and speeds["ouroboros"] < speeds["vanilla"]:
        console.print(
            f"Slower: a step of Ouroboros took {1e3 * tokens / forwards / speeds['ouroboros']:.1f} "
            f"ms for {tokens / forwards:.2f} tokens, a step of vanilla vLLM "
            f"{1e3 / speeds['vanilla']:.1f} ms for one. Drafting pays where a forward of "
            "the target costs many of the draft model's."
        )
    straight = [row for row in rows if not row.loops]
    if straight and len(straight) < len(rows):
        speeds = _speeds(straight)
        console.print(
            f"Without the prompts whose text loops: ratio "
            f"{speeds['ouroboros'] / speeds['vanilla']:.2f}."
        )
    console.print(
        f"Greedy, {job.dtype}, at most {job.max_tokens} tokens a prompt, one request at a time, "
        f"timed passes: {job.rounds} (median), each from an empty phrase pool.",
        style="dim",
    )
    for role, model in (("Target", job.model), ("Draft model", job.draft_model)):
        if (origin := inflated(model)) is not None:
            console.print(
                f"{role}: {origin}, inflated. It writes what the small model writes and costs what "
                "one of its size costs.",
                style="dim",
            )


def _speeds(rows: Sequence[Comparison]) -> dict[str, float]:
    """Tokens per second of each engine over some prompts."""
    return {
        engine: sum(row.tokens(engine) for row in rows)
        / max(sum(row.seconds(engine) for row in rows), 1e-9)
        for engine in NAMES
    }
