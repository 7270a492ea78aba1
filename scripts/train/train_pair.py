"""Trains the tiny code pair (target and draft) from the Python sources on this machine.

\b
    python scripts/train/train_pair.py corpus   --work DIR [--init-from PAIR] [--exclude FILE.jsonl]
    python scripts/train/train_pair.py target   --work DIR --minutes 60
    python scripts/train/train_pair.py unloop   --work DIR --minutes 10
    python scripts/train/train_pair.py draft    --work DIR --minutes 25
    python scripts/train/train_pair.py export   --work DIR --out PAIR
    python scripts/train/train_pair.py evaluate PAIR --prompts FILE.jsonl

Every training command resumes from its checkpoint in the work directory, may be stopped at any
time (the last two minutes are lost), and starts from what the commands before it left there.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pair_data
import pair_stages
import torch
import typer
from pair_card import write_card
from pair_data import Exclusion, PairError, load_tokenizer
from pair_eval import evaluate_pair
from pair_model import (
    DRAFT_SHAPE,
    TARGET_SHAPE,
    Llama,
    Shape,
    load_model,
    replace_text,
    save_model,
)
from pair_samples import Samples, encode
from pair_train import NextStep, Settings, train
from train_app import console, run

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None)

Work = Annotated[Path, typer.Option(help="Directory for the corpus, checkpoints and results.")]
Minutes = Annotated[float, typer.Option(min=0.0, help="Time budget of the stage, wall clock.")]
MaxSteps = Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Device = Annotated[str, typer.Option(help='"cpu" or "cuda".')]
Seed = Annotated[int, typer.Option(help="Seed of the order of samples.")]
Rate = Annotated[
    float, typer.Option(min=0.0, help="Peak rate of Muon; AdamW for embeddings and norms has half.")
]
BatchTokens = Annotated[int, typer.Option(min=16, help="Tokens of one corpus batch.")]
MaxNew = Annotated[int, typer.Option(min=8, help="Longest continuation generated, tokens.")]
GenerationBatch = Annotated[int, typer.Option(min=1, help="Prompts continued at a time.")]


@app.command()
def corpus(
    work: Work,
    sources: Annotated[
        list[Path] | None,
        typer.Option(
            help="Directories with Python files; default: all standard libraries and "
            "site-packages found."
        ),
    ] = None,
    exclude: Annotated[
        list[Path] | None,
        typer.Option(help='JSON lines with "prompt": functions that begin so are left out.'),
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option(help="Pair to go on from: its tokenizer and its weights.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=16, help="Longer functions are left out.")] = 320,
    vocab_size: Annotated[int, typer.Option(min=300, help="Tokens of a new tokenizer.")] = 4096,
    workers: Annotated[int, typer.Option(min=1, help="Processes that parse files.")] = 2,
    seed: Seed = 0,
) -> None:
    """Collects functions, splits them and writes tokens, tokenizer and starting weights."""
    work.mkdir(parents=True, exist_ok=True)
    directories = sources or pair_data.default_sources()
    exclusion = Exclusion.from_files(exclude or [])
    with console.status("reading Python sources"):
        found = list(pair_data.read_functions(directories, workers))
    functions = [function for function in found if function not in exclusion]
    held_out = [function for function in functions if pair_data.is_held_out(function)]
    training = [function for function in functions if not pair_data.is_held_out(function)]
    if not training or not held_out:
        raise PairError(
            f"--sources: {len(training)} training and {len(held_out)} held-out functions in "
            f"{', '.join(map(str, directories))}; name directories with more Python files"
        )
    random.Random(seed).shuffle(training)
    random.Random(seed).shuffle(held_out)
    with console.status(f"encoding {len(training):,} functions"):
        if init_from:
            tokenizer = load_tokenizer(init_from / "target")
        else:
            texts = (function.text for function in training[:100_000])
            tokenizer = pair_data.build_tokenizer(texts, vocab_size)
        samples = encode(training, tokenizer, max_tokens)
        held_samples = encode(held_out, tokenizer, max_tokens)
    samples.save(work / "train.npz")
    held_samples.save(work / "held_out.npz")
    with_bos = pair_data.add_bos(tokenizer)
    for name, shape in (("target", TARGET_SHAPE), ("draft", DRAFT_SHAPE)):
        torch.manual_seed(seed)
        if init_from:
            model = load_model(init_from / name)
        else:
            model = Llama(Shape(**asdict(shape) | {"vocab_size": tokenizer.get_vocab_size()}))
        save_model(model, work / "init" / name, with_bos.to_str(pretty=True))
    prompts = [function.prompt for function in held_out if function.prompt]
    rows = (json.dumps({"id": f"held{i}", "prompt": p}) for i, p in enumerate(prompts))
    (work / "held_out.jsonl").write_text("\n".join(rows) + "\n")
    facts = {
        "sources": len(directories),
        "excluded": len(found) - len(functions),
        "held_out": len(held_samples),
        "samples": len(samples),
        "tokens": len(samples.tokens),
        "max_tokens": max_tokens,
        "initialised": init_from is not None,
    }
    (work / "corpus.json").write_text(json.dumps(facts, indent=2))
    console.print(facts)


@app.command()
def target(
    work: Work,
    minutes: Minutes = 60.0,
    threads: Threads = 2,
    device: Device = "cpu",
    max_steps: MaxSteps = None,
    seed: Seed = 0,
    rate: Rate = 6e-4,
    batch_tokens: BatchTokens = 4096,
) -> None:
    """Trains the target on the next token. From scratch, --rate 2e-3 is a good start."""
    settings = Settings("target", minutes, batch_tokens, rate, max_steps, seed)
    samples, model = _start(work, "target", ("unloop", "target"), threads, device)
    _run(work, model, settings, pair_stages.target_steps(model, samples, settings))


@app.command()
def unloop(
    work: Work,
    minutes: Minutes = 10.0,
    threads: Threads = 2,
    device: Device = "cpu",
    max_steps: MaxSteps = None,
    seed: Seed = 0,
    rate: Rate = 4e-4,
    batch_tokens: BatchTokens = 1024,
    max_new: MaxNew = 256,
    generation_batch: GenerationBatch = 16,
    weight: Annotated[float, typer.Option(min=0.0, help="Weight of the unlikelihood.")] = 0.5,
) -> None:
    """Teaches the target not to loop: unlikelihood of its own repetitions.

    Some 50 steps are enough; many more, or a high rate, make its texts very short.
    """
    settings = Settings("unloop", minutes, batch_tokens, rate, max_steps, seed)
    samples, model = _start(work, "target", ("unloop", "target"), threads, device)
    steps = pair_stages.unloop_steps(
        model, samples, settings, max_new, generation_batch, weight=weight
    )
    _run(work, model, settings, steps)


@app.command()
def draft(
    work: Work,
    minutes: Minutes = 25.0,
    threads: Threads = 2,
    device: Device = "cpu",
    max_steps: MaxSteps = None,
    seed: Seed = 0,
    rate: Rate = 2e-3,
    batch_tokens: BatchTokens = 4096,
    max_new: MaxNew = 256,
    generation_batch: GenerationBatch = 64,
    own_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of steps on the target's own texts.")
    ] = 0.8,
) -> None:
    """Distils the draft from the target, on the corpus and on the target's own texts."""
    detail = f", {own_share:.0%} of the steps on the target's own texts"
    settings = Settings("draft", minutes, batch_tokens, rate, max_steps, seed, detail)
    samples, model = _start(work, "draft", ("draft",), threads, device)
    teacher = _latest(work, "target", ("unloop", "target")).to(device)
    steps = pair_stages.draft_steps(
        model, teacher, samples, settings, max_new, own_share, batch=generation_batch
    )
    _run(work, model, settings, steps)


@app.command()
def export(
    work: Work,
    out: Annotated[Path, typer.Option(help="Directory of the pair: target/, draft/, CARD.md.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help='More JSON lines with "prompt" to evaluate the pair on.'),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts evaluated per file.")] = 200,
    note: Annotated[str, typer.Option(help="A paragraph for the card: machine, history.")] = "",
    threads: Threads = 2,
) -> None:
    """Writes the pair as Hugging Face directories and its card with the evaluation."""
    torch.set_num_threads(threads)
    tokenizer_json = load_tokenizer(work / "init" / "target").to_str(pretty=True)
    save_model(_latest(work, "target", ("unloop", "target")), out / "target", tokenizer_json)
    save_model(_latest(work, "draft", ("draft",)), out / "draft", tokenizer_json)
    evaluations = {
        name: evaluate_pair(out, file, limit)[0]
        for name, file in (
            ("held-out functions", work / "held_out.jsonl"),
            *((file.stem, file) for file in prompts or []),
        )
    }
    history = work / "stages.jsonl"
    lines = history.read_text().splitlines() if history.exists() else []
    facts = json.loads((work / "corpus.json").read_text())
    records = [json.loads(line) for line in lines]
    card = write_card(facts, records, evaluations, (out / "target", out / "draft"), note)
    replace_text(out / "CARD.md", card)
    console.print(f"wrote {out}")


@app.command()
def evaluate(
    pair: Annotated[Path, typer.Argument(help="Directory with target/ and draft/.")],
    prompts: Annotated[Path, typer.Option(help='JSON lines with "prompt".')],
    limit: Annotated[int, typer.Option(min=1, help="Prompts evaluated.")] = 200,
    max_new: Annotated[int, typer.Option(min=1, help="Tokens generated per prompt.")] = 256,
    threads: Threads = 2,
    show: Annotated[int, typer.Option(min=0, help="Texts to print.")] = 0,
) -> None:
    """Shares of ended and looping greedy texts, and how often the draft agrees."""
    torch.set_num_threads(threads)
    result, texts = evaluate_pair(pair, prompts, limit, max_new)
    typer.echo(json.dumps(asdict(result), indent=2))
    for prompt, text in texts[:show]:
        typer.echo(f"{'-' * 80}\n{prompt}⟶{text}")


def _latest(work: Path, model_name: str, stages: tuple[str, ...]) -> Llama:
    """The model after the last of `stages` that was run, or its starting weights."""
    model = load_model(work / "init" / model_name)
    done = [path for stage in stages if (path := work / f"{stage}.pt").exists()]
    if done:
        newest = max(done, key=lambda path: path.stat().st_mtime)
        model.load_state_dict(torch.load(newest, map_location="cpu"))
    return model


def _start(
    work: Path, model_name: str, stages: tuple[str, ...], threads: int, device: str
) -> tuple[Samples, Llama]:
    if device == "cuda" and not torch.cuda.is_available():
        raise PairError("--device: 'cuda' but PyTorch finds no CUDA device; use 'cpu'")
    if not (work / "train.npz").exists():
        raise PairError(f"--work: '{work}' has no corpus; run the corpus command first")
    torch.set_num_threads(threads)
    return Samples.load(work / "train.npz"), _latest(work, model_name, stages).to(device)


def _run(work: Path, model: Llama, settings: Settings, steps: NextStep) -> None:
    held_out = Samples.load(work / "held_out.npz")
    (work / "pid").write_text(str(os.getpid()))
    record = train(
        model, settings, steps, lambda: pair_stages.validation_loss(model, held_out), work
    )
    console.print(record)


if __name__ == "__main__":
    run(app)
