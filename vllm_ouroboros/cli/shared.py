"""What the commands of ``vllm-ouroboros`` share: exit codes, errors, options."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NoReturn

import typer

EXIT_DIFFERENT, EXIT_ERROR = 1, 2


class Dtype(StrEnum):
    """Types of weights and activations that vLLM takes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong, and end with `EXIT_ERROR`."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(EXIT_ERROR)


TargetOption = Annotated[
    str | None, typer.Option(help="Target model: folder or hub id. Default: the shipped one.")
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        help="Draft model of the same vocabulary, or 'none' to draft from the phrase pool alone. "
        "Default: the shipped one for the shipped target, else none."
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="In 16 bits near-ties between tokens may be decided otherwise.")
]
PlainOption = Annotated[bool, typer.Option("--plain", help="No colours, no progress display.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the engines' logs.")]
