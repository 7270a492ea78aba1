"""The command ``vllm-ouroboros``: its subcommands, and nothing that takes long to import."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from vllm_ouroboros.cli.batch.command import batch
from vllm_ouroboros.cli.bench.command import bench
from vllm_ouroboros.cli.demo.command import demo
from vllm_ouroboros.cli.doctor.command import doctor
from vllm_ouroboros.cli.fetch.command import fetch
from vllm_ouroboros.cli.pool.command import app as pool

app = typer.Typer(
    name="vllm-ouroboros",
    help="Ouroboros speculative decoding for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, bench, batch, doctor, fetch):
    app.command()(command)
app.add_typer(pool)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-ouroboros {version('vllm-ouroboros')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
