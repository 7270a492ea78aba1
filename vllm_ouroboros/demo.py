"""The demo: the same prompts through vanilla vLLM and through Ouroboros.

This module checks what the user asked for and runs the two engines one after the other, in
processes of their own (`demo_engine`); `demo_report` shows texts and figures. Neither vLLM nor
torch is imported here.
"""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
import subprocess
import sys
import tempfile
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
    child_code,
    end_group,
    environ,
    log_cause,
    next_event,
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
            rounds=self.rounds,
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
    with _progress(job, live=not plain and not verbose) as show:
        vanilla = _run_engine(job.engine(ouroboros=False), "vanilla", show, verbose)
        ouroboros = _run_engine(job.engine(ouroboros=True), "ouroboros", show, verbose)
    console = Console(no_color=plain or None, highlight=False, emoji=False, markup=False)
    return show_report(console, job, vanilla, ouroboros)


# -- options -----------------------------------------------------------------------------------


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


_CHILD = child_code("vllm_ouroboros.demo_engine")


def _environ(job: EngineJob, *, verbose: bool) -> dict[str, str]:
    return environ([job.model, (job.ouroboros or {}).get("draft_model")], verbose=verbose)


def _run_engine(job: EngineJob, name: str, show: _Show, verbose: bool) -> EngineResult:
    """Run one engine from start to end in a session of its own."""
    receive, send = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryFile(prefix="vllm-ouroboros-") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(send.fileno())],
            stdin=subprocess.PIPE,
            stdout=sys.stderr if verbose else log,
            stderr=None if verbose else log,
            env=_environ(job, verbose=verbose),
            pass_fds=[send.fileno()],
            start_new_session=True,
        )
        send.close()
        assert child.stdin is not None
        try:
            pickle.dump(job, child.stdin)
            child.stdin.flush()
            while True:
                kind, value = next_event(child, receive)
                if kind == "result":
                    return value
                if kind == "error":
                    if "Engine core initialization failed" in value:
                        value = log_cause(log) or value
                    raise DemoError(f"{NAMES[name]}: {value}{_hint(verbose)}")
                if kind == "phase":
                    show(name, value, 0)
                else:
                    show(name, "", value)
        except (EOFError, BrokenPipeError):
            cause = log_cause(log) or f"the engine's process ended with status {child.wait()}"
            raise DemoError(f"{NAMES[name]}: {cause}{_hint(verbose)}") from None
        except KeyboardInterrupt:
            child.terminate()
            raise
        finally:
            end_group(child)
            child.stdin.close()
            receive.close()


def _hint(verbose: bool) -> str:
    return "" if verbose else " (--verbose shows the log)"
