"""Training stages of the tiny pair: next token, unlikelihood of loops, distillation."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from pair_generate import generate
from pair_loss import mixed_loss, next_token_loss
from pair_model import Llama
from pair_samples import Samples, batches, pad_rows
from pair_train import NextStep, Settings, Step
from torch import Tensor

from vllm_ouroboros.cli.loops import LOOP_NGRAM

PROMPT_TOKENS = (8, 128)  # shortest and longest prompt continued in training
MARKED_PER_TEXT = 32  # tokens; a loop is left where it begins, the rest only costs time


def autocast(model: Llama) -> torch.autocast:
    """bfloat16 on the model's device; 1.4 times as fast as float32 on a CPU with AVX512-BF16."""
    return torch.autocast(model.embed_tokens.weight.device.type, torch.bfloat16)


def _to(model: Llama, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    device = model.embed_tokens.weight.device
    return tensors[0].to(device), tensors[1].to(device)


def corpus_loss(model: Llama, samples: Samples, indices: Sequence[int]) -> Step:
    """Next-token loss of one batch of the corpus."""
    inputs, labels = _to(model, samples.batch(indices))
    with autocast(model):
        loss = next_token_loss(model(inputs), model.embed_tokens.weight, labels)
    return loss, inputs.numel()


def target_steps(model: Llama, samples: Samples, settings: Settings) -> NextStep:
    """Stage 1: next-token training on the corpus."""
    order = batches(samples, settings.batch_tokens, settings.seed)
    return lambda: corpus_loss(model, samples, next(order))


def repeated_positions(continuation: Sequence[int], allowed: int) -> list[int]:
    """Positions that end a 4-gram seen at least `allowed` times before in the continuation."""
    counts: Counter[tuple[int, ...]] = Counter()
    found = []
    for end in range(LOOP_NGRAM, len(continuation) + 1):
        ngram = tuple(continuation[end - LOOP_NGRAM : end])
        if counts[ngram] >= allowed:
            found.append(end - 1)
        counts[ngram] += 1
    return found


class PromptFeed:
    """Endless batches of prompts of nearly the same length, in random order."""

    def __init__(self, prompts: list[list[int]], batch: int, seed: int) -> None:
        ordered = sorted(prompts, key=len)
        self._batches = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
        self._random = random.Random(seed)

    def next(self) -> list[list[int]]:
        return self._random.choice(self._batches)


def unloop_steps(
    model: Llama,
    samples: Samples,
    settings: Settings,
    max_new: int = 256,
    batch: int = 64,
    allowed: int = 2,
    weight: float = 1.0,
) -> NextStep:
    """Stage 2: sequence-level unlikelihood (Welleck et al. 2019, arXiv 1908.04319) + next token.

    Each step continues a batch of prompts greedily and lowers the probability, -log(1 - p), of
    tokens that end a 4-gram for the third time or later; twice is common in good code.
    """
    order = batches(samples, settings.batch_tokens, settings.seed)
    feed = PromptFeed(samples.prompts(*PROMPT_TOKENS), batch, settings.seed)

    def step() -> Step:
        prompts = feed.next()
        with autocast(model):
            outputs = generate(model, prompts, max_new, stop_cycle=32)
        loss, tokens = corpus_loss(model, samples, next(order))
        rows: list[np.ndarray] = []
        given: list[int] = []
        places: list[tuple[int, int]] = []  # row and position whose next token is marked
        for prompt, output in zip(prompts, outputs, strict=True):
            found = repeated_positions(output, allowed)[:MARKED_PER_TEXT]
            if found:
                places += [(len(rows), len(prompt) - 1 + at) for at in found]
                rows.append(np.array(prompt + output[: found[-1] + 1]))
                given.append(len(prompt))
        if not rows:
            return loss, tokens
        inputs, labels = _to(model, pad_rows(rows, given))
        index = torch.tensor(places, device=inputs.device).T
        with autocast(model):
            hidden = model(inputs)[index[0], index[1]]
            logits = model.logits(hidden)
        p = logits.float().softmax(-1).gather(1, labels[index[0], index[1]][:, None])
        unlikelihood = -torch.log1p(-p.clamp(max=1 - 1e-4)).mean()
        return loss + weight * unlikelihood, tokens + inputs.numel()

    return step


class OwnTexts:
    """Replay buffer of the target's own continuations of corpus prompts, greedy and sampled."""

    def __init__(
        self, target: Llama, samples: Samples, max_new: int, batch: int, seed: int
    ) -> None:
        self._target, self._max_new = target, max_new
        self._feed = PromptFeed(samples.prompts(*PROMPT_TOKENS), batch, seed)
        self._random = random.Random(seed)
        self._generator = torch.Generator(target.embed_tokens.weight.device).manual_seed(seed)
        self._texts: deque[Samples] = deque(maxlen=400)  # batches

    def generate(self, sampled: bool) -> None:
        """Adds the continuations of one batch of prompts."""
        prompts = self._feed.next()
        temperature = 0.7 if sampled else 0.0
        with autocast(self._target):
            outputs = generate(
                self._target, prompts, self._max_new, temperature, 64, self._generator
            )
        rows = [p + o for p, o in zip(prompts, outputs, strict=True)]
        self._texts.append(Samples.from_lists(rows, [len(p) for p in prompts]))

    def batches(self, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches from the buffer."""
        while True:
            texts = self._random.choice(self._texts)
            indices = next(batches(texts, batch_tokens, self._random.randrange(2**32)))
            yield texts.batch(indices)


def draft_steps(
    draft: Llama,
    target: Llama,
    samples: Samples,
    settings: Settings,
    max_new: int = 256,
    own_share: float = 0.8,
    reuse: int = 4,
    batch: int = 128,
) -> NextStep:
    """Stage 3: the draft learns the target's distribution by KL, with a little next-token loss.

    A share of the steps uses the target's own continuations (on-policy for the text that the pair
    will see), where the next token is the target's choice and so weighs more.
    """
    corpus = batches(samples, settings.batch_tokens, settings.seed)
    own = OwnTexts(target, samples, max_new, batch, settings.seed)
    own_batches = own.batches(settings.batch_tokens)
    chance = random.Random(settings.seed)
    used = reuse

    def step() -> Step:
        nonlocal used
        if chance.random() < own_share:
            if used >= reuse:
                own.generate(sampled=chance.random() < 0.2)
                used = 0
            used += 1
            tensors, soft = next(own_batches), 0.6
        else:
            tensors, soft = samples.batch(next(corpus)), 0.9
        inputs, labels = _to(draft, tensors)
        with autocast(draft):
            with torch.no_grad():
                teacher = target(inputs)
            loss = mixed_loss(
                draft(inputs),
                draft.embed_tokens.weight,
                labels,
                teacher,
                target.embed_tokens.weight,
                soft,
            )
        return loss, inputs.numel()

    return step


@torch.no_grad()
def validation_loss(model: Llama, samples: Samples, limit: int = 400) -> float:
    """Next-token loss in nats per token after the prompt, on up to `limit` held-out samples."""
    picked = np.argsort(samples.lengths[:limit])
    total = count = 0.0
    for start in range(0, len(picked), 32):
        inputs, labels = _to(model, samples.batch(picked[start : start + 32].tolist()))
        real = int((labels >= 0).sum())
        with autocast(model):
            total += next_token_loss(model(inputs), model.embed_tokens.weight, labels).item() * real
        count += real
    return total / count
