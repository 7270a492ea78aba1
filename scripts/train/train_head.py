"""Trains a draft head (EAGLE, FSPAD) for a Llama or Qwen target on text that the target writes.

\b
    python scripts/train/train_head.py data     --target DIR --work DIR --minutes 30
    python scripts/train/train_head.py features --target DIR --work DIR
    python scripts/train/train_head.py train    --target DIR --work DIR --minutes 30
    python scripts/train/train_head.py compare  --work DIR
    python scripts/train/train_head.py export   --target DIR --work DIR --out HEAD

Every command resumes from the work directory and may be stopped at any time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import head_data
import numpy as np
import torch
import typer
from head_checkpoint import load_head, save_head
from head_compare import compare, tallies_path
from head_loss import accepted_counts, head_loss
from head_model import Arm, Head
from head_target import (
    Features,
    begin_as_last_layer,
    fast_dtype,
    frequent_tokens,
    head_shape,
    load_target,
    teacher_of,
)
from pair_data import PairError
from pair_samples import Samples, batches
from pair_train import AdamW, Settings, train
from rich.table import Table
from train_app import console, run

DEPTH = 5  # tokens of the chain, or levels of the tree, that held-out agreement is told for
WIDTHS = 1, 3  # of a chain and of a tree of 35 nodes


app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None)

Target = Annotated[str, typer.Option(help="Folder or hub id of the target.")]
Work = Annotated[Path, typer.Option(help="Directory for texts, features and checkpoints.")]
Name = Annotated[str, typer.Option(help="Name of this head in the work directory.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]
Device = Annotated[str, typer.Option(help='"cpu" or "cuda".')]


@app.command()
def data(
    target: Target,
    work: Work,
    minutes: Annotated[float, typer.Option(min=0.0, help="Time to write texts in.")] = 30.0,
    batch: Annotated[int, typer.Option(min=1, help="Conversations at a time.")] = 128,
    answer_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of an answer.")] = 256,
    follow_up: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of conversations that go on.")
    ] = 0.3,
    own: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share that the target begins beside --texts.")
    ] = 0.5,
    texts: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines with "prompt": user turns to be answered as well; without a chat '
            "template, texts to continue."
        ),
    ] = None,
) -> None:
    """Lets the target write conversations, through vLLM."""
    from vllm import LLM
    from vllm.platforms import current_platform

    work.mkdir(parents=True, exist_ok=True)
    path = work / "conversations.jsonl"
    written = path.read_text().count("\n") if path.exists() else 0
    llm = LLM(
        target, dtype=fast_dtype(current_platform.device_type), max_model_len=1024,
        max_num_seqs=batch, seed=written, enable_prefix_caching=True,
    )  # fmt: skip
    turns = [json.loads(line)["prompt"] for line in texts.open()] if texts else []
    if llm.get_tokenizer().chat_template is None:
        if not turns:
            raise PairError(f"--target: '{target}' has no chat template; give it --texts")
        head_data.write_continuations(llm, path, turns, batch=batch, answer_tokens=answer_tokens)
        return
    head_data.write_conversations(
        llm, path, minutes=minutes, batch=batch, answer_tokens=answer_tokens, turns=turns,
        follow_up=follow_up, own=own,
    )  # fmt: skip


@app.command()
def features(
    target: Target,
    work: Work,
    max_tokens: Annotated[int, typer.Option(min=32, help="Longer texts are cut.")] = 512,
    held_out: Annotated[
        int, typer.Option(min=2, help="One conversation in so many is held out.")
    ] = 15,
    threads: Threads = 2,
    device: Device = "cpu",
) -> None:
    """Splits the texts and writes the target's features of them."""
    torch.set_num_threads(threads)
    parts = head_data.split(work / "conversations.jsonl", max_tokens, held_out)
    model = load_target(target, device)
    batch_tokens = max_tokens if device == "cpu" else 32 * max_tokens  # a CPU gains by no padding
    for name, samples in zip(("train", "held_out"), parts, strict=True):
        samples.save(work / f"{name}.npz")
        console.print(f"{name}: {len(samples):,} texts, {len(samples.tokens):,} tokens")
        Features(work / f"{name}.features", samples, model.config.hidden_size).write(
            model, batch_tokens
        )


@app.command("train")
def train_(
    target: Target,
    work: Work,
    name: Name = "fspad",
    arm: Annotated[Arm, typer.Option(help="Which head.")] = Arm.fspad,
    passes: Annotated[
        int, typer.Option(min=1, help="Passes on the head's own predictions, the first included.")
    ] = 1,
    vocabulary: Annotated[
        int, typer.Option(min=0, help="Tokens that may be drafted, the most frequent; 0 for all.")
    ] = 8192,
    minutes: Annotated[float, typer.Option(min=0.0, help="Time budget, wall clock.")] = 30.0,
    max_steps: Annotated[int | None, typer.Option(min=0, help="Stop after so many.")] = None,
    rate: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 1e-3,
    batch_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a batch.")] = 4096,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step.")] = 1,
    noise: Annotated[float, typer.Option(min=0.0, help="Noise on features, of their size.")] = 0.05,
    start: Annotated[
        Path | None, typer.Option(help="A head that was exported, to go on from.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    threads: Threads = 2,
    device: Device = "cpu",
) -> None:
    """Trains one head; tells how many tokens of a chain agree with held-out text."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = load_target(target, device)
    samples, held_out = (_samples(work, part) for part in ("train", "held_out"))
    size = min(vocabulary or model.config.vocab_size, model.config.vocab_size)
    ids = frequent_tokens(samples, model.config.vocab_size, size)
    teacher = teacher_of(model, ids)
    of_training = Features(work / "train.features", samples, model.config.hidden_size)
    of_held_out = Features(work / "held_out.features", held_out, model.config.hidden_size)
    order = batches(samples, batch_tokens, seed)
    first = of_training.batch(next(order), device)
    size_of_feature = float(first.features.abs().mean())
    size_of_embedding = float(teacher.embeddings[first.tokens].abs().mean())
    head = Head(head_shape(model.config, arm), size_of_feature / size_of_embedding).to(device)
    if start is not None:
        load_head(head, start)
    else:
        begin_as_last_layer(head, model)

    def step() -> tuple[torch.Tensor, int]:
        tokens = 0
        for left in reversed(range(accumulate)):
            batch = of_training.batch(next(order), device, prompts=True)
            with _autocast(device):
                loss = head_loss(head, teacher, batch, passes, noise * size_of_feature)
            loss = loss / accumulate
            if left:
                loss.backward()
            tokens += int(batch.counts.sum())
        return loss, tokens

    def validate() -> float:
        return _figures(_tallies(head, teacher, of_held_out, batch_tokens, device))[0][0]

    detail = f"{arm.value}, {passes} passes, {size} tokens, {len(samples.tokens)} tokens of text"
    settings = Settings(name, minutes, batch_tokens, rate, max_steps, seed, detail)
    record = train(head, settings, step, validate, work, AdamW)
    tallies = _tallies(head, teacher, of_held_out, batch_tokens, device)
    np.save(tallies_path(work, name), tallies.numpy())
    accepted, shares = _figures(tallies)
    result = {"arm": arm.value, "passes": passes, "seed": seed, "chain": accepted[0],
              "tree": accepted[1], "agreement": shares[0], "agreement_tree": shares[1],
              **vars(record)}  # fmt: skip
    with (work / "heads.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")
    np.save(work / f"{name}.ids.npy", ids.numpy())
    (work / f"{name}.arm").write_text(arm.value)
    console.print(result)


@app.command("compare")
def compare_(
    work: Work,
    baseline: Annotated[Arm, typer.Option(help="Arm that others are held against.")] = Arm.eagle,
    passes: Annotated[int, typer.Option(min=1, help="Its passes.")] = 1,
) -> None:
    """Tells accepted tokens of all heads in a work directory, with paired bootstrap intervals."""
    for shape, title in enumerate((f"chain of {DEPTH}", f"tree of {DEPTH} levels")):
        table = Table(
            "arm", "passes", "seeds", "accepted", "difference", "95 % interval", title=title
        )
        for one in compare(work, (baseline.value, passes), shape):
            table.add_row(
                one.kind[0], str(one.kind[1]), str(one.seeds), f"{one.accepted:.3f}",
                f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}",
            )  # fmt: skip
        console.print(table)


@app.command()
def export(
    target: Target,
    work: Work,
    out: Annotated[Path, typer.Option(help="Directory of the head.")],
    name: Name = "fspad",
) -> None:
    """Writes a trained head as vLLM's eagle method and Ouroboros load it."""
    model = load_target(target, "cpu")
    arm = Arm((work / f"{name}.arm").read_text())
    head = Head(head_shape(model.config, arm))
    head.load_state_dict(torch.load(work / f"{name}.pt", map_location="cpu"))
    save_head(head, model, np.load(work / f"{name}.ids.npy"), out)
    console.print(f"wrote {out}")


def _autocast(device: str) -> torch.autocast:
    dtype = fast_dtype(device)
    return torch.autocast(device, dtype, enabled=dtype == torch.bfloat16)


def _samples(work: Path, part: str) -> Samples:
    path = work / f"{part}.npz"
    if not path.exists():
        raise PairError(f"--work: '{work}' has no {part} texts; run data and features first")
    return Samples.load(path)


def _tallies(
    head: Head, teacher: Any, features: Features, batch_tokens: int, device: str
) -> torch.Tensor:
    """Accepted tokens of each held-out text as `accepted_counts` tells them."""
    lengths = features.samples.lengths
    counts = torch.zeros(len(lengths), len(WIDTHS), DEPTH + 1, dtype=torch.long)
    indices = np.argsort(lengths, kind="stable").tolist()
    most = max(1, batch_tokens // int(lengths.max()))
    with _autocast(device):
        for first in range(0, len(indices), most):
            some = indices[first : first + most]
            batch = features.batch(some, device)
            if batch.tokens.shape[1] >= DEPTH + 2:
                counts[some] = accepted_counts(head, teacher, batch, DEPTH, WIDTHS).cpu()
    return counts


def _figures(tallies: torch.Tensor) -> tuple[list[float], list[list[float]]]:
    """For a chain and a tree: accepted tokens, and the share that a level accepts of what reached
    it.
    """
    reached = tallies.sum(0).flip(1).cumsum(1).flip(1).double()
    shares = (reached[:, 1:] / reached[:, :-1].clamp(min=1)).tolist()
    accepted = (reached[:, 1:].sum(1) / reached[:, 0].clamp(min=1)).tolist()
    return accepted, [[round(share, 4) for share in level] for level in shares]


if __name__ == "__main__":
    run(app)
