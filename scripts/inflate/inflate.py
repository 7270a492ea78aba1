"""Gives the shipped pair the cost of a real one: larger models that say the same.

\b
    python scripts/inflate/inflate.py --preset cpu --out DIR              # DIR/target and DIR/draft
    python scripts/inflate/inflate.py --preset 8b --out DIR --role target
    python scripts/inflate/inflate.py --preset 34b --out DIR --dry-run    # sizes alone

Nothing is downloaded. Added layers have output projections (o_proj, down_proj) of zero, added heads
and feed-forward channels have zero columns there, added residual channels stay zero (or repeat the
others, where the ratio of widths is no power of four) and the norms are rescaled by powers of two;
everything else added is random. So texts are the source's but for the order of floating point sums:
the same in float32, while in bfloat16 near-ties can fall the other way. Acceptance is that of the
shipped pair, which is no measure of a real model's: a table made with an inflated model says so.
Its config.json has `inflated_from`.

\b
preset         hidden  layers  heads       ffn    vocabulary  parameters
demo   target    1024       8   16/8 of 64   2816      4096      0.10 B
cpu    target    1024      24   16/8 of 64   4096      4096      0.38 B
both   draft      128       2    2/1 of 64    352      4096      0.9 M, the shipped draft
8b     target    4096      32  64/16 of 64  14336    128256      7.50 B, as Llama 3 8B
8b     draft     2048      16   32/8 of 64   8192    128256      1.24 B, as Llama 3.2 1B
34b    target    8192      48 128/16 of 64  22016     32000     33.48 B, as Code Llama 34B
34b    draft     2048      22   32/4 of 64   5632     32000      1.03 B, as TinyLlama 1.1B

Heads keep their size, since attention is scaled by it and rotary frequencies hang on it: 64 heads
of 64 stand for 32 of 128, with projections and KV cache as large. Embeddings stay tied, which takes
memory off the targets, not work. Added tokens have logits far below all others, so that neither
argmax nor sampling ever takes one; a seeded request draws other noise than with the source's
vocabulary.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from inflate_dims import PRESETS, Dims, InflateError, inflated_dims
from inflate_head import inflate_head
from inflate_weights import Inflation, Source
from rich.console import Console
from tqdm import tqdm

from vllm_ouroboros.cli.inputs import PAIR
from vllm_ouroboros.cli.weights import save_weights

COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
NOTE = """# {name}, inflated

A function-preserving inflation of `{name}`, made by `scripts/inflate/inflate.py`: it costs
what a model of its size costs and says what the small one says. Tables made with it must say that
it is inflated.

- source: {old}
- inflated: {new}, {dtype}
"""
app = typer.Typer(rich_markup_mode=None, add_completion=False)
console = Console(stderr=True)


class Preset(StrEnum):
    demo = "demo"
    cpu = "cpu"
    llama_8b = "8b"
    llama_34b = "34b"


class Role(StrEnum):
    target = "target"
    draft = "draft"
    both = "both"


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


Size = Annotated[int | None, typer.Option(min=1, help="Instead of the preset's; needs --role.")]


@app.command(help=__doc__, no_args_is_help=True)
def inflate(
    out: Annotated[Path, typer.Option(help="Directory that gets target/ and draft/.")],
    preset: Annotated[Preset, typer.Option(help="Sizes, see above.")] = Preset.cpu,
    role: Annotated[Role, typer.Option(help="Which model of the pair.")] = Role.both,
    source: Annotated[Path, typer.Option(help="Directory with target/ and draft/.")] = PAIR,
    head: Annotated[
        Path | None,
        typer.Option(help="Draft head of the source's target, which gets head/ beside the target."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = Dtype.bfloat16,
    vocab: Annotated[
        int | None, typer.Option(min=1, help="Tokens, for both models; default: the preset's.")
    ] = None,
    hidden_size: Size = None,
    layers: Size = None,
    ffn: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    shard_gb: Annotated[
        float, typer.Option(min=0.001, max=5.0, help="Largest file, and about the memory, in GB.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Print the sizes, write nothing.")] = False,
) -> None:
    roles = ("target", "draft") if role is Role.both else (role.value,)
    options = {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    given = {key: size for key, size in options.items() if size}
    if given and role is Role.both:
        raise InflateError(
            f"{', '.join(given)}: given for both models; say which with --role target or draft"
        )
    if head is not None and "target" not in roles:
        raise InflateError(f"--head: '{head}' goes with a target; leave out --role draft")
    jobs: list[tuple[Path, Inflation]] = []
    for name in roles:
        model = Source(source / name)
        sizes = PRESETS[preset.value][name] | given | ({"vocab_size": vocab} if vocab else {})
        try:
            dims = inflated_dims(model.dims, sizes)
        except InflateError as error:
            raise InflateError(f"{name}: {error}") from None
        jobs.append((out / name, Inflation(model, dims, getattr(torch, dtype.value), seed)))
    for directory in [*(directory for directory, _ in jobs), *([out / "head"] if head else [])]:
        if directory.exists():
            raise InflateError(f"--out: '{directory}' exists; remove it or name another directory")
    for directory, inflation in jobs:
        typer.echo(f"{directory.name}: {inflation.dims}, {dtype.value}")
    if head is not None:
        typer.echo(f"head: of {head}")
    if dry_run:
        return
    needed = sum(_bytes(i.dims, i.dtype) for _, i in jobs)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < needed * 1.01:
        raise InflateError(
            f"--out: '{out}' has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; "
            "name a directory on another disk"
        )
    if head is not None:
        target = jobs[0][1]
        inflate_head(head, target.source.dims, target.dims, target.dtype, out / "head")
    for directory, inflation in jobs:
        write(directory, inflation, int(shard_gb * 1e9))
    console.print(f"wrote {out}")


def write(directory: Path, inflation: Inflation, shard_bytes: int) -> None:
    """Writes a Hugging Face directory, one shard of weights in memory at a time.

    config.json comes last: a directory that was not finished cannot be loaded.
    """
    directory.mkdir(parents=True)
    dims, source = inflation.dims, inflation.source
    for name in COPIED:
        if (source.directory / name).exists():
            shutil.copyfile(source.directory / name, directory / name)
    total = _bytes(dims, inflation.dtype)
    shards = shard_names(dims, inflation.dtype.itemsize, shard_bytes)
    with tqdm(total=total, desc=directory.name, unit="B", unit_scale=True, disable=None) as bar:
        for file, shapes in shards.items():
            tensors = {}
            for name, shape in shapes.items():
                tensors[name] = inflation.tensor(name, shape)
                bar.update(tensors[name].nbytes)
            save_weights(tensors, directory / file)
    if len(shards) > 1:
        places = {name: file for file, shapes in shards.items() for name in shapes}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(directory / "model.safetensors.index.json", index)
    # The last two folders name a model of a pair; the rest of the path is nobody's business.
    name = "/".join(source.directory.resolve().parts[-2:])
    dtype = str(inflation.dtype).removeprefix("torch.")
    config = {k: v for k, v in source.config.items() if k != "torch_dtype"} | asdict(dims)
    config |= {"rms_norm_eps": inflation.norm_eps, "dtype": dtype}
    if dims != source.dims:
        note = NOTE.format(name=name, old=source.dims, new=dims, dtype=dtype)
        (directory / "README.md").write_text(note)
        origin = {"source": name, **asdict(source.dims), "parameters": source.dims.parameters}
        config["inflated_from"] = origin
    _write_json(directory / "config.json", config)


def shard_names(
    dims: Dims, itemsize: int, shard_bytes: int
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Files of weights, each with the names and shapes of its tensors."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in dims.tensors():
        size = torch.Size(shape).numel() * itemsize
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    last = len(groups)
    return {f"model-{i:05}-of-{last:05}.safetensors": g for i, g in enumerate(groups, start=1)}


def _bytes(dims: Dims, dtype: torch.dtype) -> int:
    return dims.parameters * dtype.itemsize


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Entry point: a user's mistake becomes one line on stderr and exit status 2."""
    try:
        app()
    except InflateError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
