"""What the commands of ``vllm-ouroboros`` share: exit codes, errors, types of options."""

from __future__ import annotations

from enum import Enum
from typing import NoReturn

import typer

EXIT_DIFFERENT, EXIT_ERROR = 1, 2


class Dtype(str, Enum):
    """Types of weights and activations that vLLM takes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong, and end with `EXIT_ERROR`."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(EXIT_ERROR)
