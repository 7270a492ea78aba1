"""Options of ``vllm-ouroboros batch``; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ouroboros.cli.shared import (
    EXIT_DIFFERENT,
    DraftOption,
    PlainOption,
    TargetOption,
    VerboseOption,
    fail,
)


def batch(
    inputs: Annotated[list[Path], typer.Argument(help="Files of rows: .jsonl, .parquet.")],
    out: Annotated[
        Path, typer.Option(help="Answers: a .jsonl file, or a .parquet folder; goes on with it.")
    ],
    model: TargetOption = None,
    draft_model: DraftOption = None,
    ouroboros_config: Annotated[
        str, typer.Option(help="JSON object as for vllm serve.", metavar="JSON")
    ] = "{}",
    engine_args: Annotated[
        str,
        typer.Option(
            help='Arguments of every engine, such as {"tensor_parallel_size": 2}.', metavar="JSON"
        ),
    ] = "{}",
    replicas: Annotated[
        str, typer.Option(help="Engines: a number, or FEWEST-MOST, between which Ray scales.")
    ] = "1",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Rows that an engine takes at a time; it works on two such.")
    ] = 32,
    sampling_params: Annotated[
        str,
        typer.Option(
            help="Sampling parameters; a row's own come first. Default: greedy, max_tokens 256.",
            metavar="JSON",
        ),
    ] = "{}",
    id_column: Annotated[str, typer.Option(help="Where rows have their id.")] = "id",
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Answer rows again that are errors in --out.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster. Default: RAY_ADDRESS, or a new local one.")
    ] = None,
    plain: PlainOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer rows of files on a Ray cluster, Ouroboros on in every engine.

    A row has a text "prompt" or chat "messages", and may have an "id" and "sampling_params".
    Started again, the command answers what has no answer yet. A row that cannot be answered gets
    an "error" and stops nothing.

    Exit status: 0 when every row has an answer, 1 when some ended in an error, 2 on an error.
    """
    from vllm_ouroboros.cli.batch.engines import engine_arguments, replica_bounds
    from vllm_ouroboros.cli.batch.job import Job, Progress, connect, run
    from vllm_ouroboros.cli.inputs import InputError, json_object

    try:
        config = json_object(ouroboros_config, "--ouroboros-config", '{"phrase_len": 8}')
        arguments = json_object(engine_args, "--engine-args", '{"max_model_len": 4096}')
        sampling = json_object(sampling_params, "--sampling-params", '{"max_tokens": 64}')
        target, engine = engine_arguments(model, draft_model, config, arguments)
        job = Job(
            tuple(inputs), out, target, engine, replica_bounds(replicas), batch_size,
            sampling, id_column, retry_errors,
        )  # fmt: skip
        connect(address, verbose=verbose)
        with _shown(plain) as progressed:
            done: Progress = run(job, progressed)
    except InputError as error:
        fail(str(error))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        fail(
            f"the engines ended: {lines[-1] if lines else repr(error)}; --verbose shows their "
            f"logs, the same command goes on with {out}"
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; the answers so far are in {out}, the same command goes on", err=True)
        raise typer.Exit(130) from None
    typer.echo(
        f"{out}: {done.answered} answers and {done.failed} errors of {done.total} rows, "
        f"{done.before} were there before"
    )
    raise typer.Exit(EXIT_DIFFERENT if done.failed else 0)


def _shown(plain: bool):
    """A block with a function that shows progress."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    @contextmanager
    def block():
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        console = Console(stderr=True, quiet=plain)
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task("rows", total=None)

            def show(done) -> None:
                finished = done.before + done.answered + done.failed
                what = f"rows, {done.failed} errors" if done.failed else "rows"
                bar.update(task, completed=finished, total=done.total, description=what)

            yield show

    return block()
