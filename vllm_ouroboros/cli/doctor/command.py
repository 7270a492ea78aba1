"""Options of ``vllm-ouroboros doctor``; what it needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ouroboros.cli.shared import fail


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Target model of a planned command line.")
    ] = None,
    draft_model: Annotated[
        str | None, typer.Option(help='Draft model; same as "draft_model" in --config.')
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="JSON object as for --ouroboros-config.", metavar="JSON")
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(help="Show what forwards cost an engine with this pool_path, nothing else."),
    ] = None,
) -> None:
    """Show versions and platform, and say what would be refused and why.

    Exit status: 0 when nothing is wrong, 1 when there are problems, 2 on an error.
    """
    from vllm_ouroboros.cli.doctor.report import run, show_costs

    if costs is not None:
        wrong = show_costs(costs)
        if wrong is not None:
            fail(wrong)
        return
    options: dict[str, Any] = {}
    if config is not None:
        try:
            options = json.loads(config)
        except ValueError as error:
            fail(f"--config is not JSON ({error}): {config!r}")
        if not isinstance(options, dict):
            fail(f'--config must be a JSON object such as {{"draft_tokens": 8}}, not {config!r}')
    if draft_model is not None and "draft_model" in options:
        fail("--draft-model and the draft_model of --config exclude each other")
    raise typer.Exit(1 if run(model, draft_model, options) else 0)
