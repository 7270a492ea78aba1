"""The demo: the same prompts through vanilla vLLM and through Ouroboros.

The two engines run in processes of their own (`engine`), in turns; `report` shows texts and
figures. Neither vLLM nor torch is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from vllm_ouroboros.cli.demo.engine import EngineJob, EngineResult
from vllm_ouroboros.cli.demo.job import Job
from vllm_ouroboros.cli.demo.picture import save_picture
from vllm_ouroboros.cli.demo.progress import Show, show_progress
from vllm_ouroboros.cli.demo.report import NAMES, compare, show_report
from vllm_ouroboros.cli.engine_process import (
    EngineError,
    EngineProcess,
    available_memory,
    peak_memory,
)
from vllm_ouroboros.cli.inputs import InputError, check_writable


def run(job: Job, *, svg: Path | None = None, plain: bool = False, verbose: bool = False) -> bool:
    """Run both engines and show the comparison; True if all outputs are identical.

    Args:
        job: what they generate.
        svg: a file that gets a picture of the result.
        plain: no colours, no progress display.
        verbose: let the engines' logs through.

    Raises:
        InputError: an engine did not start or failed, or the picture cannot be written.
    """
    if svg is not None:
        check_writable(svg, "--svg")
    with show_progress(live=not plain and not verbose) as show:
        results = _run_engines(job, show, verbose)
    console = Console(no_color=plain or None, highlight=False, emoji=False, markup=False)
    rows, counters = compare(job, **results), results["ouroboros"].counters
    show_report(console, job, rows, counters)
    if svg is not None:
        save_picture(svg, job, rows, counters)
        console.print(f"Picture: {svg}", style="dim")
    return all(row.identical for row in rows)


def _run_engines(job: Job, show: Show, verbose: bool) -> dict[str, EngineResult]:
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
    return EngineProcess("vllm_ouroboros.cli.demo.engine", job, models, verbose=verbose)


def _fits_again(engine: EngineProcess) -> bool:
    """Whether there is room for another one like it; an engine takes most of a GPU's memory."""
    return engine.facts["device"] == "cpu" and available_memory() > 2 * peak_memory(engine.group)


def _time(job: Job, alive: dict[str, EngineProcess], show: Show) -> dict[str, EngineResult]:
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
        raise InputError(f"{NAMES[name]}: {error}") from None
