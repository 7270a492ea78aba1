"""The model card of a trained pair."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pair_data import MAX_LINES, MIN_LINES, SPECIAL_TOKENS
from pair_eval import Evaluation

from vllm_ouroboros.cli.loops import LOOP_COUNT, LOOP_NGRAM

STAGE_TEXT = {
    "target": "target: next token",
    "unloop": "target: unlikelihood of its own repetitions + next token",
    "draft": "draft: KL to the target + next token",
}
SHAPE_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
)


def write_card(
    facts: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Evaluation],
    directories: tuple[Path, Path],
    note: str = "",
) -> str:
    """Markdown from what the stages recorded; `directories` are those of target and draft."""
    return "\n".join(
        [
            "# tiny-code: target and draft",
            "",
            "Two Llama-architecture models of single Python functions, for tests, demo and "
            "benchmarks of speculative decoding. Not for writing code. Made by "
            "`scripts/train/train_pair.py`, which also wrote this card.",
            "",
            *_shapes(directories),
            "",
            *_data(facts),
            "",
            *_training(records),
            "",
            *([note, ""] if note else []),
            *_evaluation(evaluations),
            "",
        ]
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def _shapes(directories: tuple[Path, Path]) -> list[str]:
    columns = []
    for directory in directories:
        config = json.loads((directory / "config.json").read_text())
        size = (directory / "model.safetensors").stat().st_size
        shape = " / ".join(str(config[key]) for key in SHAPE_KEYS)
        columns.append((shape, f"{size / 2e6:.1f} M", f"{size / 1e6:.1f} MB"))
    names = (
        "hidden / layers / heads / kv heads / ffn / head size",
        "parameters (tied)",
        "bf16 file",
    )
    return _table(["", "target", "draft"], list(zip(names, *columns, strict=True)))


def _data(facts: Mapping[str, Any]) -> list[str]:
    start, end = SPECIAL_TOKENS
    text = (
        f"Data: {facts['samples']:,} distinct functions ({facts['tokens'] / 1e6:.1f} M tokens) "
        f"of {MIN_LINES} to {MAX_LINES} lines and at most {facts['max_tokens']} tokens, from the "
        f"Python files under {facts['sources']} directories of standard libraries and installed "
        f"packages; {facts['held_out']:,} held out by a hash of signature and docstring, "
        f"{facts['excluded']:,} left out because a benchmark prompt begins like them. Left out "
        "too: test functions without docstring and functions that loop themselves. One function "
        f"per sample, `{start} def ... {end}` (ids 0 and 1); tokens of signature and docstring "
        "are context and carry no loss."
    )
    lines = [text]
    if facts["initialised"]:
        lines += [
            "",
            "Weights and tokenizer of an earlier pair of the same shapes were the start. That pair "
            "had its own split, so it may have seen some of the functions held out here.",
        ]
    return lines


def _training(records: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            STAGE_TEXT[r["name"]] + r["detail"],
            f"{r['minutes']:.0f}",
            f"{r['steps']:,}",
            f"{r['tokens'] / 1e6:.1f} M",
            f"{r['validation_before']:.3f}",
            f"{r['validation_after']:.3f}",
        )
        for r in records
    ]
    header = ["stage", "minutes", "steps", "tokens", "validation before", "after"]
    return [
        "Training: Muon for the layers' matrices, AdamW for the rest, bfloat16 autocast. "
        "Validation is the next-token loss after the prompt, nats per token, on held-out "
        "functions.",
        "",
        *_table(header, rows),
    ]


def _evaluation(evaluations: Mapping[str, Evaluation]) -> list[str]:
    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    names = (
        "prompts",
        "end with `</s>`",
        "loop",
        "mean tokens",
        "agreement",
        "without loops",
        "positions",
    )
    rows = [
        (
            name,
            e.prompts,
            percent(e.ended),
            percent(e.looping),
            f"{e.mean_length:.0f}",
            percent(e.agreement),
            percent(e.agreement_clean),
            f"{e.positions:,}",
        )
        for name, e in evaluations.items()
    ]
    return [
        "Evaluation: signature and docstring without the last line break (a line break and its "
        "indentation are one token), continued greedily in float32 for up to 256 tokens. A text "
        f"loops if a token {LOOP_NGRAM}-gram occurs more than {LOOP_COUNT} times. Agreement: the "
        "draft's greedy token equals the target's, over the target's own texts; also over those "
        "that do not loop.",
        "",
        *_table(["prompts from", *names], rows),
    ]
