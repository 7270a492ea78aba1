"""The demo's progress, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Show(Protocol):
    """Where the demo says what it does, how many requests are done, and how a text goes on."""

    def phase(self, text: str, requests: int | None = None) -> None: ...

    def done(self, what: int | str) -> None: ...


class _Lines:
    """A line for each phase, where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, text: str, requests: int | None = None) -> None:
        del requests
        self._console.print(f"{text} ...", markup=False)

    def done(self, what: int | str) -> None:
        pass


class _Bars:
    """A live bar of the phase's requests."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._task = progress, progress.add_task("", total=None, text="")

    def phase(self, text: str, requests: int | None = None) -> None:
        self._progress.reset(self._task, total=requests, description=text, text="")

    def done(self, what: int | str) -> None:
        if isinstance(what, str):
            self._progress.update(self._task, text=" ".join(what.split()))
        else:
            self._progress.advance(self._task, what)


@contextmanager
def show_progress(*, live: bool) -> Iterator[Show]:
    """Progress on stderr."""
    console = Console(stderr=True, highlight=False, emoji=False)
    if not live or not console.is_terminal:
        yield _Lines(console)
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[text]}", style="dim", markup=False),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        yield _Bars(progress)
