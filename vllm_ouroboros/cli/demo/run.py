"""The demo: the same prompts through vanilla vLLM and through Ouroboros.

This module checks what the user asked for and runs the two engines, in processes of their own
(`demo_engine`); `demo_report` shows texts and figures. Neither vLLM nor torch is imported here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_ouroboros.demo_engine import EngineJob, EngineResult
from vllm_ouroboros.demo_report import NAMES, show_report
from vllm_ouroboros.engine_process import (
    EngineError,
    EngineProcess,
    available_memory,
    peak_memory,
)

ASSETS = Path(__file__).parent / "assets"
TARGET = ASSETS / "tiny-code" / "target"
DRAFT = ASSETS / "tiny-code" / "draft"
PROMPTS = ASSETS / "prompts.jsonl"


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
            model=model_reference(str(TARGET) if model is None else model, "--model"),
            draft_model=None
            if draft_model == "none"
            else model_reference(draft_model, "--draft-model"),
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
        )


def shipped_prompts() -> tuple[tuple[str, str], ...]:
    """Ids and texts of the prompts inside the package."""
    try:
        rows = [json.loads(line) for line in PROMPTS.read_text().splitlines() if line.strip()]
        return tuple((str(row["id"]), str(row["prompt"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"the shipped prompts cannot be read, reinstall ({error})") from None


def model_reference(value: str, option: str) -> str:
    """A model's folder as an absolute path, or a hub id as it is.

    Raises:
        DemoError: neither; the message names ``option``.
    """
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


def run(job: Job, *, plain: bool = False, verbose: bool = False) -> bool:
    """Run both engines and show the comparison; True if all outputs are identical.

    Raises:
        DemoError: an engine did not start or failed.
    """
    with _progress(live=not plain and not verbose) as show:
        results = _run_engines(job, show, verbose)
    console = Console(no_color=plain or None, highlight=False, emoji=False, markup=False)
    return show_report(console, job, results["vanilla"], results["ouroboros"])


# -- options -----------------------------------------------------------------------------------


def _given(prompts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for prompt in prompts:
        if not prompt.strip():
            raise DemoError(f"--prompt {prompt!r}: is empty")
    return tuple((f"prompt {i}", prompt) for i, prompt in enumerate(prompts, 1))


# -- engines -----------------------------------------------------------------------------------


class _Show(Protocol):
    def phase(self, text: str, requests: int | None = None) -> None: ...

    def done(self, count: int) -> None: ...


class _Lines:
    """A line for each phase, where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, text: str, requests: int | None = None) -> None:
        del requests
        self._console.print(f"{text} ...", markup=False)

    def done(self, count: int) -> None:
        pass


class _Bars:
    """A live bar of the phase's requests."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("", total=None)

    def phase(self, text: str, requests: int | None = None) -> None:
        self._progress.reset(self._task, total=requests, description=text)

    def done(self, count: int) -> None:
        self._progress.advance(self._task, count)


@contextmanager
def _progress(*, live: bool) -> Iterator[_Show]:
    """Progress on stderr."""
    console = Console(stderr=True, highlight=False, emoji=False)
    if not live or not console.is_terminal:
        yield _Lines(console)
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        yield _Bars(progress)


def _run_engines(job: Job, show: _Show, verbose: bool) -> dict[str, EngineResult]:
    """Both engines, pass by pass in turns: what slows the machine for a while slows both.

    Where only one fits at a time, one after the other.
    """
    alive: dict[str, EngineProcess] = {}
    results: dict[str, EngineResult] = {}
    try:
        for name, title in NAMES.items():
            for other in alive.values():
                other.pause()
            with _named(name):
                show.phase(f"{title}: starting the engine")
                alive[name] = engine = _start(job.engine(ouroboros=name != "vanilla"), verbose)
                show.phase(f"{title}: warming up", len(job.prompts))
                engine.ask("warm", show.done)
            if name == [*NAMES][-1] or not _fits_again(engine):
                results |= _time(job, alive, show)
                while alive:
                    alive.popitem()[1].end()
        return results
    finally:
        while alive:
            alive.popitem()[1].end()


def _start(job: EngineJob, verbose: bool) -> EngineProcess:
    models = [job.model, (job.ouroboros or {}).get("draft_model")]
    return EngineProcess("vllm_ouroboros.demo_engine", job, models, verbose=verbose)


def _fits_again(engine: EngineProcess) -> bool:
    """Whether there is room for another one like it; an engine takes most of a GPU's memory."""
    return engine.facts["device"] == "cpu" and available_memory() > 2 * peak_memory(engine.group)


def _time(job: Job, alive: dict[str, EngineProcess], show: _Show) -> dict[str, EngineResult]:
    titles = " and ".join(NAMES[name] for name in alive)
    turns = ", in turns" if len(alive) > 1 else ""
    show.phase(f"{titles}: generating{turns}", job.rounds * len(alive) * len(job.prompts))
    results: dict[str, EngineResult] = {}
    for ask in ["time"] * job.rounds + ["result"]:
        for name, engine in alive.items():
            for other in alive.values():
                other.pause()
            engine.resume()
            with _named(name):
                results[name] = engine.ask(ask, show.done)
    return results


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say whose error it is."""
    try:
        yield
    except EngineError as error:
        raise DemoError(f"{NAMES[name]}: {error}") from None
