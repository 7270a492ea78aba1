"""Options of ``vllm-ouroboros demo``; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_ouroboros.cli.shared import EXIT_DIFFERENT, Dtype, fail


def demo(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; repeat for more. Default: the shipped prompts."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Target model: folder or hub id. Default: the shipped one.")
    ] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(
            help="Draft model of the same vocabulary, or 'none' to draft from the phrase pool "
            "alone. Default: the shipped one for the shipped target, else none."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate per prompt.")] = 128,
    dtype: Annotated[
        Dtype, typer.Option(help="In 16 bits near-ties between tokens may be decided otherwise.")
    ] = Dtype.float32,
    rounds: Annotated[
        int, typer.Option(min=1, max=20, help="Timed passes over the prompts; the median counts.")
    ] = 3,
    svg: Annotated[
        Path | None, typer.Option(help="Draw some texts and the totals into this file.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="No colours, no progress display.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the engines' logs.")] = False,
) -> None:
    """Generate greedily with vanilla vLLM and with Ouroboros, and compare text and speed.

    Exit status: 0 when all outputs are identical, 1 when one differs, 2 on an error.
    """
    from vllm_ouroboros.cli.demo.job import Job
    from vllm_ouroboros.cli.demo.run import run
    from vllm_ouroboros.cli.inputs import InputError

    try:
        job = Job.checked(
            model=model,
            draft_model=draft_model,
            prompts=prompt,
            max_tokens=max_tokens,
            dtype=dtype.value,
            rounds=rounds,
        )
        same = run(job, svg=svg, plain=plain, verbose=verbose)
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if same else EXIT_DIFFERENT)
