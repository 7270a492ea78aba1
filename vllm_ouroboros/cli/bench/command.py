"""Options of ``vllm-ouroboros bench``; what it needs is imported when it runs."""

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


def bench(
    model: TargetOption = None,
    draft_model: DraftOption = None,
    head: Annotated[
        str | None,
        typer.Option(help="Draft head (FSPAD, EAGLE) of eagle and ouroboros-head-*: a folder."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSON lines {"prompt": "text"}, or one prompt a line. Default: shipped.'),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Conversations of the shipped task set instead, with a table by task: 'all', or a "
            "list such as chat,code. Later turns hold vanilla's answers."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure the first N prompts.")] = None,
    warm_prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts that fill the warm pool; those that are measured are left out. Default: "
            "the file's prompts beyond --limit."
        ),
    ] = None,
    warm_limit: Annotated[int, typer.Option(min=1, help="Warm-up prompts at most.")] = 64,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Some of vanilla, draft_model, ngram, suffix, lookahead, ouroboros-cold, "
            "ouroboros-warm (these by default), eagle, ouroboros-head-cold, ouroboros-head-warm, "
            "ouroboros-seen (a ceiling); vanilla always runs."
        ),
    ] = None,
    draft_tokens: Annotated[
        str | None, typer.Option(help="K of vLLM's draft_model and eagle, a list. Default: 3,5,8.")
    ] = None,
    ngram: Annotated[
        str | None, typer.Option(help="MIN-MAX-K of vLLM's ngram, a list. Default: 2-4-3,2-4-8.")
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(
            help="FACTOR-PROBABILITY of vLLM's suffix decoding, a list: its max_spec_factor and "
            "min_token_prob. Default: 1-0.1, vLLM's own."
        ),
    ] = None,
    ouroboros_config: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON object as for vllm serve; repeat to compare several.", metavar="JSON"
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Node budget of a tree. Default: γ + K·β.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Requests at a time, a list such as 1:12,8:64 (with how many of the prompts); "
            "'none' for rates alone. [1]"
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            help="Requests a second to a server (vllm bench serve), a list. Default: none."
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Runs of each method, in rotating order. Default: 3.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to generate per prompt. Default: 128.")
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Generate them all, past the end of the text as well."),
    ] = False,
    prefix_caching: Annotated[
        bool,
        typer.Option("--prefix-caching", help="As servers have it by default; emptied each run."),
    ] = False,
    max_model_len: Annotated[
        int, typer.Option(min=32, help="Tokens of prompt and output together.")
    ] = 1024,
    dtype: DtypeOption = Dtype.auto,
    enforce_eager: Annotated[
        bool | None,
        typer.Option(
            "--enforce-eager/--no-enforce-eager", help="For every engine alike. Default: no."
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option("--tensor-parallel-size", "-tp", min=1, help="As in vLLM.")
    ] = 1,
    draft_tensor_parallel_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Ranks that share our draft model. Repeatable: each is a setting."
        ),
    ] = None,
    alive: Annotated[
        int,
        typer.Option(
            min=1,
            help="Engines kept in memory, stopped while another one works; 1 starts a new one for "
            "each turn.",
        ),
    ] = 1,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that an engine may be silent.")
    ] = 1800,
    out: Annotated[Path, typer.Option(help="File of the rows; is replaced.")] = Path("bench.jsonl"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Smoke run: 4 prompts, 32 tokens, 1 round, eager.")
    ] = False,
    plain: PlainOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure ways to decode on the same prompts, in turn, and compare their outputs.

    Exit status: 0 when all is well, 1 when a cell failed or a float32 output differs from vanilla
    vLLM's, 2 on an error.
    """
    from vllm_ouroboros.cli.bench.options import checked_plan
    from vllm_ouroboros.cli.bench.run import run
    from vllm_ouroboros.cli.inputs import InputError

    try:
        plan = checked_plan(
            model=model, draft_model=draft_model, head=head, prompts=prompts, limit=limit,
            warm_prompts=warm_prompts, warm_limit=warm_limit, methods=methods,
            draft_tokens=draft_tokens, ngram=ngram, suffix=suffix,
            configs=ouroboros_config or ["{}"], nodes=nodes, batch=batch, rates=rates,
            rounds=rounds, max_tokens=max_tokens,
            max_model_len=max_model_len, dtype=dtype.value, enforce_eager=enforce_eager,
            alive=alive, timeout=timeout, out=out, quick=quick, ignore_eos=ignore_eos,
            prefix_caching=prefix_caching, tensor_parallel_size=tensor_parallel_size,
            draft_ranks=draft_tensor_parallel_size or (), tasks=tasks,
        )  # fmt: skip
        well = run(plan, plain=plain, verbose=verbose)
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if well else EXIT_DIFFERENT)
