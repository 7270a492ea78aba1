"""Options of ``vllm-ouroboros pool``; what it needs is imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from vllm_ouroboros.cli.shared import PlainOption, fail

app = typer.Typer(
    name="pool", help="Phrase pools in files: made of texts, shown, merged.", no_args_is_help=True
)
CapacityOption = Annotated[
    int, typer.Option(min=8, help="Most keys, as the engine's option pool_capacity.")
]
SetSizeOption = Annotated[int, typer.Option(min=1, max=64, help="Most phrases of a key.")]


@app.command()
def build(
    corpus: Annotated[list[Path], typer.Argument(help="Files: .jsonl, .parquet, .txt, .md.")],
    tokenizer: Annotated[
        str, typer.Option(help="The target that will use the pool: folder or hub id.")
    ],
    out: Annotated[Path, typer.Option(help="The pool's file, for the option pool_path.")],
    field: Annotated[
        str | None, typer.Option(help="Field of the rows that has the text. Default: usual names.")
    ] = None,
    capacity: CapacityOption = 262144,
    guess_set_size: SetSizeOption = 10,
    phrase_len: Annotated[int, typer.Option(min=1, max=32, help="Tokens of a phrase.")] = 6,
    plain: PlainOption = False,
) -> None:
    """Fill a pool from texts, logs of answers for instance, and write its file.

    Texts that come last count most. Memory is that of the pool and of a row, however many there
    are.

    Exit status: 0 when the file is written, 2 on an error.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from vllm_ouroboros.cli.inputs import InputError, check_files, check_writable
    from vllm_ouroboros.cli.pool import corpus as texts
    from vllm_ouroboros.cli.pool.files import file_for, insert_texts, rows_of, save
    from vllm_ouroboros.phrases.pool import PhrasePool

    try:
        check_files(corpus, "corpus", texts.KINDS)
        file, encode = file_for(check_writable(out, "--out"), tokenizer)
        pool = PhrasePool(capacity, guess_set_size, phrase_len)
        console = Console(stderr=True, quiet=plain)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:

            def read() -> Iterator[str]:
                for path in corpus:
                    task = progress.add_task(path.name, total=path.stat().st_size)
                    for text, size in texts.texts_of(path, field):
                        yield text
                        progress.advance(task, size)

            total = insert_texts(pool, read(), encode)
        rows = rows_of(pool, file.form.vocab_size)
        if not len(rows["keys"]):
            raise InputError("the corpus has no text of two tokens: nothing to write")
        save(file, rows)
    except InputError as error:
        fail(str(error))
    typer.echo(f"{file.path}: {len(rows['keys'])} phrases of {total} tokens")


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="A pool's file.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a pool's file holds.

    Exit status: 0 when it is sound, 2 on an error.
    """
    from vllm_ouroboros.cli.inputs import InputError
    from vllm_ouroboros.cli.pool.files import describe

    try:
        found = describe(path)
    except InputError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:{width}}  {value}")


@app.command()
def merge(
    paths: Annotated[list[Path], typer.Argument(help="Files of pools for one tokenizer.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    capacity: CapacityOption = 262144,
    guess_set_size: SetSizeOption = 10,
) -> None:
    """Merge pools; what stands in later files counts most.

    Exit status: 0 when the file is written, 2 on an error.
    """
    from vllm_ouroboros.cli.inputs import InputError, check_writable
    from vllm_ouroboros.cli.pool.files import merge as merge_files

    try:
        phrases = merge_files(paths, check_writable(out, "--out"), capacity, guess_set_size)
    except InputError as error:
        fail(str(error))
    typer.echo(f"{out}: {phrases} phrases")
