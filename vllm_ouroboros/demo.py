"""The demo: the same prompts through vanilla vLLM and through Ouroboros, one engine after the other.

This module checks what the user asked for, runs the two engines in processes of their own
(`demo_engine`) and shows texts and figures. It imports neither vLLM nor torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from vllm_ouroboros.demo_engine import EngineJob, EngineResult, Generation, first_cause, serve

ASSETS = Path(__file__).parent / "assets"
TARGET = ASSETS / "tiny-code" / "target"
DRAFT = ASSETS / "tiny-code" / "draft"
PROMPTS = ASSETS / "prompts.jsonl"

NAMES = {"vanilla": "vanilla vLLM", "ouroboros": "Ouroboros"}
ORIGINS = (("target", "yellow"), ("draft model", "green"), ("suffix phrase", "bold magenta"))
LOOP_NGRAM, LOOP_COUNT = 4, 8  # a text loops if one 4-gram occurs more than 8 times


class DemoError(Exception):
    """Something the user can mend; the message is one line."""


@dataclass(frozen=True)
class Job:
    """What both engines generate."""

    model: str
    draft_model: str | None
    prompts: tuple[tuple[str, str], ...]  # (id, text)
    max_tokens: int
    dtype: str
    rounds: int

    @classmethod
    def checked(
        cls,
        *,
        model: str | None,
        draft_model: str | None,
        prompts: Sequence[str] | None,
        max_tokens: int,
        dtype: str,
        rounds: int,
    ) -> Job:
        """A job from the command line's options; None means the shipped one.

        Raises:
            DemoError: a file is missing or an option makes no sense.
        """
        if draft_model is None:
            draft_model = str(DRAFT) if model is None else "none"
        return cls(
            model=_model(str(TARGET) if model is None else model, "--model"),
            draft_model=None if draft_model == "none" else _model(draft_model, "--draft-model"),
            prompts=_given(prompts) if prompts else shipped_prompts(),
            max_tokens=max_tokens,
            dtype=dtype,
            rounds=rounds,
        )

    def engine(self, *, ouroboros: bool) -> EngineJob:
        """The part of one engine."""
        return EngineJob(
            model=self.model,
            ouroboros={"draft_model": self.draft_model} if ouroboros else None,
            prompts=tuple(text for _, text in self.prompts),
            max_tokens=self.max_tokens,
            dtype=self.dtype,
            rounds=self.rounds,
        )


@dataclass(frozen=True)
class Comparison:
    """One prompt through both engines."""

    id: str
    prompt: str
    vanilla: Generation
    ouroboros: Generation

    @property
    def identical(self) -> bool:
        """Whether every pass of both engines gave the same tokens."""
        expected = self.vanilla.token_ids[0]
        return all(ids == expected for ids in self.vanilla.token_ids + self.ouroboros.token_ids)

    @property
    def loops(self) -> bool:
        """Whether the text repeats itself, which flatters any speculative decoder."""
        ids = self.vanilla.token_ids[0]
        grams = Counter(tuple(ids[i : i + LOOP_NGRAM]) for i in range(len(ids) - LOOP_NGRAM + 1))
        return max(grams.values(), default=0) > LOOP_COUNT

    def tokens(self, engine: str) -> int:
        """Tokens of one pass of an engine ("vanilla" or "ouroboros")."""
        return len(getattr(self, engine).token_ids[0])

    def seconds(self, engine: str) -> float:
        """Time of one pass of an engine."""
        return float(getattr(self, engine).seconds)


def shipped_prompts() -> tuple[tuple[str, str], ...]:
    """Ids and texts of the prompts inside the package."""
    try:
        rows = [json.loads(line) for line in PROMPTS.read_text().splitlines() if line.strip()]
        return tuple((str(row["id"]), str(row["prompt"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"the shipped prompts cannot be read, reinstall ({error})") from None


def run(job: Job, *, plain: bool = False, verbose: bool = False) -> bool:
    """Run both engines and show the comparison; True if all outputs are identical.

    Raises:
        DemoError: an engine did not start or failed.
    """
    console = Console(no_color=plain or None, highlight=False, emoji=False, markup=False)
    with _progress(job, live=not plain and not verbose) as show:
        vanilla = _run_engine(job.engine(ouroboros=False), "vanilla", show, verbose)
        ouroboros = _run_engine(job.engine(ouroboros=True), "ouroboros", show, verbose)
    rows = [
        Comparison(id_, text, left, right)
        for (id_, text), left, right in zip(
            job.prompts, vanilla.generations, ouroboros.generations, strict=True
        )
    ]
    for row in rows:
        _show_text(console, row)
    _show_prompts(console, rows)
    _show_totals(console, job, rows, ouroboros)
    return all(row.identical for row in rows)


# -- options -----------------------------------------------------------------------------------


def _model(value: str, option: str) -> str:
    """A model's folder as an absolute path, or a hub id as it is."""
    path = Path(value).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DemoError(f"{option} {value}: the folder has no config.json")
        return str(path.resolve())
    if path.exists():
        raise DemoError(f"{option} {value}: is a file; pass the folder that has config.json")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", value):
        raise DemoError(f"{option} {value}: no such folder, nor a hub id (owner/name)")
    return value


def _given(prompts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for prompt in prompts:
        if not prompt.strip():
            raise DemoError(f"--prompt {prompt!r}: is empty")
    return tuple((f"prompt {i}", prompt) for i, prompt in enumerate(prompts, 1))


# -- engines -----------------------------------------------------------------------------------


class _Show(Protocol):
    def __call__(self, engine: str, phase: str, advance: int) -> None: ...


@contextmanager
def _progress(job: Job, *, live: bool) -> Iterator[_Show]:
    """Progress on stderr: a live display on a terminal, else one line for each phase."""
    console = Console(stderr=True, highlight=False, emoji=False)
    words = {"load": "starting the engine", "warm": "warming up", "time": "generating"}
    passes = {"load": 0, "warm": 1, "time": job.rounds}
    if not live or not console.is_terminal:

        def lines(engine: str, phase: str, advance: int) -> None:
            if not advance:
                console.print(f"{NAMES[engine]}: {words[phase]} ...", markup=False)

        yield lines
        return

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=None)

        def bars(engine: str, phase: str, advance: int) -> None:
            if advance:
                progress.advance(task, advance)
            else:
                total = passes[phase] * len(job.prompts) or None
                progress.reset(task, total=total, description=f"{NAMES[engine]}: {words[phase]}")

        yield bars


def _environ(job: EngineJob, *, verbose: bool) -> dict[str, str]:
    """Settings of an engine's process; what the user has set stays."""
    values = {
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes most of the memory
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not verbose:
        values["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ.pop("VLLM_LOGGING_LEVEL", None)
    models = [job.model, (job.ouroboros or {}).get("draft_model")]
    if all(name is None or Path(name).is_dir() for name in models):
        values["HF_HUB_OFFLINE"] = "1"
    return {name: value for name, value in values.items() if name not in os.environ}


def _run_engine(job: EngineJob, name: str, show: _Show, verbose: bool) -> EngineResult:
    """Run one engine from start to end in a process group of its own."""
    # Spawned: a forked child could not start vLLM's own processes cleanly.
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="vllm-ouroboros-", suffix=".log") as log:
        process = context.Process(
            target=serve,
            args=(job, send, _environ(job, verbose=verbose), None if verbose else log.name),
        )
        process.start()
        send.close()
        try:
            while True:
                kind, value = receive.recv()
                if kind == "result":
                    return value
                if kind == "error":
                    cause = first_cause(Path(log.name).read_text(errors="replace")) or value
                    raise DemoError(f"{NAMES[name]}: {cause}{_hint(verbose)}")
                if kind == "phase":
                    show(name, value, 0)
                else:
                    show(name, "", value)
        except EOFError:
            process.join(5)
            cause = first_cause(Path(log.name).read_text(errors="replace"))
            ended = f"the engine's process ended with status {process.exitcode}"
            raise DemoError(f"{NAMES[name]}: {cause or ended}{_hint(verbose)}") from None
        except KeyboardInterrupt:
            _kill(process.pid)
            raise
        finally:
            process.join(20)  # vLLM frees its workers and shared memory
            _kill(process.pid)
            process.join()


def _hint(verbose: bool) -> str:
    return "" if verbose else " (--verbose shows the log)"


def _kill(group: int | None) -> None:
    """End what is left of an engine's process group."""
    if group is not None:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


# -- display -----------------------------------------------------------------------------------


def _show_text(console: Console, row: Comparison) -> None:
    """Prompt and text, each token in the colour of its origin, and what it is made of."""
    console.print(Rule(row.id, style="dim", align="left"))
    text = Text(row.prompt, style="dim")
    for piece, origin in zip(row.ouroboros.pieces, row.ouroboros.origins, strict=True):
        text.append(piece, style=ORIGINS[origin][1])
    console.print(text, soft_wrap=True)
    counts = Counter(row.ouroboros.origins)
    legend = Text("\n")
    for origin, (name, style) in enumerate(ORIGINS):
        legend.append("■ ", style=style)
        legend.append(f"{name} {counts[origin]}   ")
    legend.append("identical" if row.identical else "DIFFERENT", "" if row.identical else "bold red")
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
            at = next(
                (i for i, pair in enumerate(zip(ids, expected, strict=False)) if len(set(pair)) > 1),
                min(len(ids), len(expected)),
            )
            console.print(
                f"{NAMES[name]}, pass {number}: token {at} is {ids[at : at + 1]}, "
                f"vanilla's first pass has {expected[at : at + 1]}",
                style="red",
            )


def _show_prompts(console: Console, rows: Sequence[Comparison]) -> None:
    table = Table(title="Each prompt, tokens/s", title_justify="left", box=None, pad_edge=False)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    for heading in ("tokens", NAMES["vanilla"], NAMES["ouroboros"], "ratio"):
        table.add_column(heading, justify="right")
    table.add_column("output")
    for row in rows:
        speeds = _speeds([row])
        output = "identical" if row.identical else "DIFFERENT"
        table.add_row(
            row.id,
            str(row.tokens("vanilla")),
            f"{speeds['vanilla']:.1f}",
            f"{speeds['ouroboros']:.1f}",
            f"{speeds['ouroboros'] / speeds['vanilla']:.2f}",
            output + (", loops" if row.loops else ""),
        )
    console.print(table)
    console.print()


def _show_totals(
    console: Console, job: Job, rows: Sequence[Comparison], ouroboros: EngineResult
) -> None:
    speeds = _speeds(rows)
    tokens = sum(row.tokens("ouroboros") for row in rows)
    forwards = ouroboros.counters["target_forwards"] / job.rounds
    drafts = ouroboros.counters["draft_forwards"] / job.rounds
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
    straight = [row for row in rows if not row.loops]
    if straight and len(straight) < len(rows):
        speeds = _speeds(straight)
        console.print(
            f"Without the prompts whose text loops: ratio "
            f"{speeds['ouroboros'] / speeds['vanilla']:.2f}."
        )
    console.print(
        f"Greedy, {job.dtype}, at most {job.max_tokens} tokens a prompt, one request at a time, "
        f"median of {job.rounds} passes, each from an empty phrase pool.",
        style="dim",
    )


def _speeds(rows: Sequence[Comparison]) -> dict[str, float]:
    """Tokens per second of each engine over some prompts."""
    return {
        engine: sum(row.tokens(engine) for row in rows)
        / max(sum(row.seconds(engine) for row in rows), 1e-9)
        for engine in NAMES
    }
