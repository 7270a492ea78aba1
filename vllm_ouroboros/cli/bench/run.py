"""The benchmark: ways to decode, on the same prompts and machine, in turn.

Each round runs every method once, in an order that rotates from round to round; a method's run at
one load is a *cell* (`rows`). This module keeps the order and writes rows; engines are in `process`
and `serve`. Neither vLLM nor torch is imported here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_ouroboros.cli.bench import serve as bench_serve
from vllm_ouroboros.cli.bench.engine import Place, Prompt, RunSpec, Turns
from vllm_ouroboros.cli.bench.methods import VANILLA, Method
from vllm_ouroboros.cli.bench.plan import Plan, visits
from vllm_ouroboros.cli.bench.process import AnyEngine, Engines, MeasuredEngine
from vllm_ouroboros.cli.bench.report import all_well, show_report
from vllm_ouroboros.cli.bench.rows import Cell, Load, cell_row, differences, run_row
from vllm_ouroboros.cli.engine_process import EngineError
from vllm_ouroboros.cli.inputs import InputError
from vllm_ouroboros.cli.provenance import facts

Progressed = Callable[[str, int], None]


class Bench:
    """A benchmark under way; ``start`` and ``serve`` are replaced in tests."""

    def __init__(
        self,
        plan: Plan,
        about: dict[str, Any],
        *,
        start: Callable[[Method], AnyEngine],
        serve: Callable[..., Any] = bench_serve.measure,
        verbose: bool = False,
    ) -> None:
        self.plan, self.about, self.verbose = plan, about, verbose
        self.engines = Engines(plan.alive, start)
        self.serve = serve
        self.cells = [Cell(method, load) for load in plan.loads for method in plan.methods]

    def run(self, progressed: Progressed) -> None:
        """All rounds; the rows of runs are written as they come."""
        order = list(visits([m for m in self.plan.methods if not m.missing], self.plan.rounds))
        try:
            self._converse(progressed)
            for i, (number, method) in enumerate(order):
                upcoming = [later.engine for _, later in order[i + 1 :]]
                for cell in self.cells:
                    if cell.method is method and cell.failure is None:
                        progressed(f"round {number + 1}: {method.title}, {cell.load}", 0)
                        self._run(cell, number, upcoming, progressed)
            self._measure_gaps(progressed)
        finally:
            self.engines.end()

    def rows(self) -> list[dict[str, Any]]:
        """One row a cell, from what has been measured so far."""
        tasks = self.plan.tasks
        return [
            cell_row(cell, self._vanilla(cell.load), self.about, tasks[: cell.load.prompts])
            for cell in self.cells
        ]

    def _converse(self, progressed: Progressed) -> None:
        """Make prompts of later turns, which hold what vanilla answered before."""
        if not any(self.plan.later):
            return
        progressed("answers to first turns: vanilla vLLM", 0)
        vanilla = next(method for method in self.plan.methods if method.name == VANILLA)

        def answer(prompts: tuple[Prompt, ...]) -> list[str]:
            engine = self.engines.get(vanilla, [])
            return engine.texts(Turns(prompts, self.plan.max_tokens))

        self.plan = self.plan.conversed(answer)

    def _vanilla(self, load: Load) -> Cell | None:
        same = (c for c in self.cells if c.method.name == VANILLA and c.load == load)
        return next(same, None)

    def _measure_gaps(self, progressed: Progressed) -> None:
        """Ask vanilla how close a call it was wherever an output is not its own."""
        gaps: dict[Place, float | None] = {}
        for cell in self.cells:
            vanilla = self._vanilla(cell.load)
            for one in differences(cell, vanilla):
                if vanilla is None or one["unit"] != "token" or None in one.values():
                    continue  # texts of a server, or one output is the beginning of the other
                tokens = vanilla.answers[one["prompt"]]
                place = Place(
                    self.plan.prompts[one["prompt"]], tuple(tokens[: one["at"]]),
                    one["found"], one["vanilla"],
                )  # fmt: skip
                if place not in gaps:
                    progressed("where outputs differ: vanilla vLLM", 0)
                    try:
                        gaps[place] = self.engines.get(vanilla.method, []).gap(place)
                    except EngineError:
                        return
                if (gap := gaps[place]) is not None:
                    cell.gaps[one["prompt"]] = gap

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows to the file."""
        with self.plan.out.open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _run(
        self, cell: Cell, number: int, upcoming: Sequence[str], progressed: Progressed
    ) -> None:
        try:
            if cell.load.rate is None:
                self._run_batch(cell, number, upcoming, progressed)
            else:
                self._run_rate(cell, number)
                progressed("", len(self.plan.prompts))
        except EngineError as error:
            cell.failure = f"round {number + 1}: {error}"
            self.engines.drop(cell.method)
        else:
            if number in cell.runs:
                self.write([run_row(cell, number, self.about)])

    def _run_batch(
        self, cell: Cell, number: int, upcoming: Sequence[str], progressed: Progressed
    ) -> None:
        assert cell.load.batch is not None
        try:
            engine = self.engines.get(cell.method, upcoming)
        except EngineError as error:
            for other in self.cells:  # it would not start for them either
                if other.method.engine == cell.method.engine and other.load.rate is None:
                    other.failure = f"round {number + 1}: does not start: {error}"
            return
        run = RunSpec(
            prompts=self.plan.prompts[: cell.load.prompts],
            batch=cell.load.batch,
            max_tokens=self.plan.max_tokens,
            ignore_eos=self.plan.ignore_eos,
            before=self.plan.fill(cell),
        )
        cell.runs[number] = engine.run(run, lambda n: progressed("", n))
        cell.peaks.append(engine.peak())
        cell.facts = engine.facts

    def _run_rate(self, cell: Cell, number: int) -> None:
        assert cell.load.rate is not None
        self.engines.end()  # nothing else may live beside a server
        cell.runs[number], peak = self.serve(
            self.plan.engine(cell.method, server=True),
            prompts=self.plan.prompts,
            others=self.plan.fill(cell),
            rate=cell.load.rate,
            max_tokens=self.plan.max_tokens,
            ignore_eos=self.plan.ignore_eos,
            timeout=self.plan.timeout,
            verbose=self.verbose,
        )
        cell.peaks.append(peak)
        cell.facts = {"dtype": self.plan.dtype, "max_model_len": self.plan.max_model_len}


def run(plan: Plan, *, plain: bool = False, verbose: bool = False) -> bool:
    """Run a benchmark and show it; True if nothing failed and no float32 output differs.

    Raises:
        KeyboardInterrupt: after the rows so far have been written and shown.
    """
    about = facts(plan.model, plan.draft_model) | {
        "head": plan.head,
        "prompts_others": len(plan.others),
        "max_tokens": plan.max_tokens,
        "ignore_eos": plan.ignore_eos,
        "max_num_seqs": plan.engine(plan.methods[0]).max_num_seqs,
        "enforce_eager": plan.enforce_eager,
        "prefix_caching": plan.prefix_caching,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "temperature": 0.0,
    }

    def start(method: Method) -> AnyEngine:
        return MeasuredEngine(plan.engine(method), timeout=plan.timeout, verbose=verbose)

    bench = Bench(plan, about, start=start, verbose=verbose)
    plan.out.write_text("")
    interrupted: KeyboardInterrupt | None = None
    try:
        with _progress(plan, live=not plain and not verbose) as progressed:
            bench.run(progressed)
    except EngineError as error:
        raise InputError(f"vanilla vLLM: {error}") from None
    except KeyboardInterrupt as stop:
        interrupted = stop
    rows = _with_dtype(bench.rows(), plan)
    bench.write(rows)
    width = None if sys.stdout.isatty() else 160  # a file need not wrap the table
    console = Console(
        no_color=plain or None, highlight=False, emoji=False, markup=False, width=width
    )
    show_report(console, rows)
    console.print(f"{len(rows)} rows of cells, and one for each run, in {plan.out}", style="dim")
    if interrupted is not None:
        raise interrupted
    return all_well(rows)


def _with_dtype(rows: list[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Rows of servers and of failed cells say which type "auto" was, if any engine has told."""
    known = [row["dtype"] for row in rows if row.get("dtype", "auto") != "auto"]
    dtype = known[0] if known else plan.dtype
    return [
        row | {"dtype": dtype} if row.get("dtype", "auto") == "auto" else row for row in rows
    ]  # fmt: skip


@contextmanager
def _progress(plan: Plan, *, live: bool) -> Iterator[Progressed]:
    """Progress on stderr: a bar on a terminal, else one line for each run."""
    console = Console(stderr=True, highlight=False, emoji=False, markup=False)
    if not live or not console.is_terminal:

        def lines(what: str, advance: int) -> None:
            if not advance:
                console.print(f"{what} ...", soft_wrap=True)

        yield lines
        return
    runs = plan.rounds * sum(not m.missing for m in plan.methods)
    whole = len(plan.prompts) + sum(map(len, plan.later))
    prompts = sum(min(whole, load.prompts or whole) for load in plan.loads)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} prompts"), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("", total=runs * prompts)

        def bar(what: str, advance: int) -> None:
            if advance:
                progress.advance(task, advance)
            else:
                progress.update(task, description=what)

        yield bar
