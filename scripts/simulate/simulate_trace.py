"""Traces for simulation: what a target wrote, and what a draft model would have said at each token.

A trace holds for each request the prompt, the target's greedy answer, and for every place of that
text the draft model's first tokens with their probabilities, if there is one. With it drafting,
verification and the policy run again without any model; see `simulate.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.numpy

FIRST = 4  # of the draft model's tokens at each place


@dataclass
class Text:
    """One request.

    Attributes:
        tokens: int32 [n], prompt and answer.
        prompt: tokens of the prompt.
        first: int32 [n, FIRST], what the draft model would say behind each token, best first;
            without one the first of them is what the text says there.
        odds: float32 [n, FIRST], its probabilities; 0 without one.
        task: what kind of task it is, or "".
    """

    tokens: np.ndarray
    prompt: int
    first: np.ndarray
    odds: np.ndarray
    task: str = ""

    @classmethod
    def without_draft(cls, prompt: Sequence[int], answer: Sequence[int], task: str = "") -> Text:
        """A request of a target that has no draft model."""
        tokens = np.array([*prompt, *answer], np.int32)
        first = np.zeros((len(tokens), FIRST), np.int32)
        first[:-1, 0] = tokens[1:]
        return cls(tokens, len(prompt), first, np.zeros(first.shape, np.float32), task)


@dataclass
class Trace:
    """Requests of one pair of models.

    Attributes:
        texts: the requests.
        vocab: ids are below.
        eos: id that ends a text.
    """

    texts: list[Text]
    vocab: int
    eos: int

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read what `save` wrote."""
        with safetensors.safe_open(path, "np") as file:
            facts = file.metadata()
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        ends = np.cumsum(columns["lengths"])[:-1]
        split = [np.split(columns[name], ends) for name in ("tokens", "first", "odds")]
        tasks = json.loads(facts.get("tasks", "null")) or [""] * len(columns["prompts"])
        texts = [
            Text(tokens.astype(np.int32), int(prompt), first.astype(np.int32), odds / 255, task)
            for tokens, first, odds, prompt, task in zip(
                *split, columns["prompts"], tasks, strict=True
            )
        ]
        return cls(texts, int(facts["vocab"]), int(facts["eos"]))

    @property
    def has_draft(self) -> bool:
        """Whether a draft model read the texts."""
        return any(text.odds.any() for text in self.texts)

    def save(self, path: Path) -> None:
        """Write it: ids as uint32, probabilities in steps of 1/255."""
        columns = {
            "lengths": np.array([len(text.tokens) for text in self.texts], np.uint32),
            "prompts": np.array([text.prompt for text in self.texts], np.uint32),
            "tokens": np.concatenate([text.tokens for text in self.texts]).astype(np.uint32),
            "first": np.concatenate([text.first for text in self.texts]).astype(np.uint32),
            "odds": np.concatenate([np.rint(255 * t.odds) for t in self.texts]).astype(np.uint8),
        }
        facts = {"vocab": str(self.vocab), "eos": str(self.eos)}
        facts["tasks"] = json.dumps([text.task for text in self.texts])
        safetensors.numpy.save_file(columns, path, facts)

    def misled(self) -> Trace:
        """The same texts with a draft model that is as sure of itself, and wrong.

        Its ids are those of the recorded one, rotated through the vocabulary.
        """
        shift = self.vocab // 2
        texts = [replace(t, first=(t.first + shift) % self.vocab) for t in self.texts]
        return Trace(texts, self.vocab, self.eos)

    def repeated(self, count: int) -> Trace:
        """``count`` requests, from the start again where there are fewer."""
        return Trace([self.texts[i % len(self.texts)] for i in range(count)], self.vocab, self.eos)
