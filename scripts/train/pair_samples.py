"""Tokens of the tiny pair's corpus: samples, their storage and training batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pair_data import BOS_ID, EOS_ID, Function
from tokenizers import Tokenizer

from vllm_ouroboros.cli.loops import loops


@dataclass(frozen=True)
class Samples:
    """Token sequences `<s> ... </s>` in one flat array; a prompt is a sample's first tokens."""

    tokens: np.ndarray  # uint32, all samples one after another
    offsets: np.ndarray  # int64, [samples + 1]
    prompt_lengths: np.ndarray  # int32, tokens of `<s>` and prompt; 0 without a docstring

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of some samples, see `pad_rows`."""
        return pad_rows([self[i] for i in indices], self.prompt_lengths[list(indices)].tolist())

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> Samples:
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        tokens = np.fromiter((t for row in rows for t in row), np.uint32, int(offsets[-1]))
        return cls(tokens, offsets, np.asarray(prompt_lengths, np.int32))

    def prompts(self, shortest: int, longest: int) -> list[list[int]]:
        """Prompts of `shortest` to `longest` tokens."""
        wanted = (self.prompt_lengths >= shortest) & (self.prompt_lengths <= longest)
        return [self[i][: self.prompt_lengths[i]].tolist() for i in np.flatnonzero(wanted)]

    def save(self, path: Path) -> None:
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Samples:
        with np.load(path) as arrays:
            return cls(**arrays)


def encode(functions: Sequence[Function], tokenizer: Tokenizer, max_tokens: int) -> Samples:
    """Tokens of the functions that are not longer than `max_tokens` and do not loop themselves."""
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    for start in range(0, len(functions), 4096):
        part = functions[start : start + 4096]
        bodies = tokenizer.encode_batch_fast([f.text for f in part], add_special_tokens=False)
        heads = tokenizer.encode_batch_fast([f.prompt for f in part], add_special_tokens=False)
        for body, head in zip(bodies, heads, strict=True):
            if len(body.ids) + 2 <= max_tokens and not loops(body.ids):
                rows.append([BOS_ID, *body.ids, EOS_ID])
                prompt_lengths.append(len(head.ids) + 1 if head.ids else 0)
    return Samples.from_lists(rows, prompt_lengths)


def pad_rows(
    rows: Sequence[np.ndarray], prompt_lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and next-token labels [rows, longest - 1]; -100 marks prompts and padding.

    Padding comes last, so causal attention needs no mask. Prompts are given when the models are
    used, so their tokens are context, not something to learn to predict.
    """
    longest = max(len(row) for row in rows)
    inputs = torch.zeros(len(rows), longest - 1, dtype=torch.long)
    labels = torch.full((len(rows), longest - 1), -100)
    for i, (row, given) in enumerate(zip(rows, prompt_lengths, strict=True)):
        tokens = torch.from_numpy(np.asarray(row, np.int64))
        first = max(given, 1)
        inputs[i, : len(row) - 1] = tokens[:-1]
        labels[i, first - 1 : len(row) - 1] = tokens[first:]
    return inputs, labels


def batches(samples: Samples, batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of about `batch_tokens` tokens of samples of nearly the same length."""
    rng = random.Random(seed)
    lengths = samples.lengths
    while True:
        order = sorted(range(len(samples)), key=lambda i: (lengths[i] // 8, rng.random()))
        epoch: list[list[int]] = []
        longest = 0
        for i in order:
            longest = max(longest, lengths[i])
            if not epoch or (len(epoch[-1]) + 1) * longest > batch_tokens:
                epoch.append([])
                longest = lengths[i]
            epoch[-1].append(i)
        rng.shuffle(epoch)
        yield from epoch
