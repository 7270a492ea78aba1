"""Evaluation of the tiny pair: endings, loops and greedy agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pair_data import EOS_ID, PairError, load_tokenizer, read_prompts
from pair_generate import generate
from pair_model import Llama, load_model
from pair_samples import pad_rows
from rich.progress import track

from vllm_ouroboros.cli.loops import loops

BATCH = 32  # prompts


@dataclass(frozen=True)
class Evaluation:
    """Greedy behaviour of a pair in float32; shares between 0 and 1."""

    prompts: int
    max_new: int  # tokens
    ended: float  # share of texts that end with </s> within max_new tokens
    looping: float  # share of texts in which a token 4-gram occurs more than 8 times
    mean_length: float  # tokens per text
    agreement: float  # draft's greedy token equals the target's, over the target's own texts
    agreement_clean: float  # the same over the texts that do not loop
    positions: int  # tokens compared for `agreement`


def evaluate(
    target: Llama, draft: Llama, prompts: Sequence[list[int]], max_new: int = 256
) -> tuple[Evaluation, list[list[int]]]:
    """Continues `prompts` (with `<s>`) greedily; the draft then guesses each of the tokens."""
    ordered = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: list[list[int]] = [[] for _ in prompts]
    agreed = np.zeros(len(prompts))
    for start in track(range(0, len(ordered), BATCH), "evaluate"):
        part = ordered[start : start + BATCH]
        given = [prompts[i] for i in part]
        outputs = generate(target, given, max_new)
        rows = [np.array(p + o) for p, o in zip(given, outputs, strict=True)]
        inputs, labels = pad_rows(rows, [len(p) for p in given])
        with torch.inference_mode():
            device = draft.embed_tokens.weight.device
            guesses = draft.logits(draft(inputs.to(device))).argmax(-1).cpu()
        for row, i in enumerate(part):
            texts[i] = outputs[row]
            agreed[i] = int((guesses[row] == labels[row]).sum())
    lengths = np.array([len(text) for text in texts])
    clean = np.array([not loops(text) for text in texts])
    return Evaluation(
        prompts=len(prompts),
        max_new=max_new,
        ended=float(np.mean([text[-1] == EOS_ID for text in texts])),
        looping=float(1 - clean.mean()),
        mean_length=float(lengths.mean()),
        agreement=float(agreed.sum() / lengths.sum()),
        agreement_clean=float(agreed[clean].sum() / max(lengths[clean].sum(), 1)),
        positions=int(lengths.sum()),
    ), texts


def evaluate_pair(
    pair: Path, file: Path, limit: int, max_new: int = 256
) -> tuple[Evaluation, list[tuple[str, str]]]:
    """Evaluates the pair in a directory on a prompt file; also gives prompts with their texts."""
    tokenizer = load_tokenizer(pair / "target")
    target, draft = load_model(pair / "target"), load_model(pair / "draft")
    room = target.shape.max_position_embeddings - max_new
    # Without its last line break: that is one token with the indentation that follows.
    encoded = [tokenizer.encode(text.rstrip("\n")).ids for text in read_prompts(file)]
    kept = [ids for ids in encoded if len(ids) <= room][:limit]
    if not kept:
        raise PairError(f"'{file}' holds no prompt of at most {room} tokens; give one that does")
    result, texts = evaluate(target, draft, kept, max_new)
    decoded = [
        (tokenizer.decode(ids), tokenizer.decode(text))
        for ids, text in zip(kept, texts, strict=True)
    ]
    return result, decoded
