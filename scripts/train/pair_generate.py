"""Batched greedy and sampled generation with the tiny models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pair_data import BOS_ID, EOS_ID
from pair_model import Cache, Llama


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new: int,
    temperature: float = 0.0,
    stop_cycle: int = 0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continuations of `prompts`, each up to and with `</s>` or `max_new` tokens long.

    Greedy at temperature 0. With `stop_cycle`, a row also ends once its last `stop_cycle` tokens
    repeat the `stop_cycle` before them at any period up to 32 (it would go on for ever).
    """
    longest = max(map(len, prompts))
    device = model.embed_tokens.weight.device
    padded = torch.tensor([[BOS_ID] * (longest - len(p)) + list(p) for p in prompts], device=device)
    padding = torch.tensor([longest - len(p) for p in prompts], device=device)
    cache = Cache(model, padding, longest + max_new)
    outputs: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    step = padded
    for _ in range(max_new):
        logits = model.logits(model(step, cache)[:, -1]).float()
        if temperature > 0:
            probabilities = (logits / temperature).softmax(-1)
            chosen = torch.multinomial(probabilities, 1, generator=generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        going: list[int] = []
        for row, token in enumerate(chosen[:, 0].tolist()):
            text = outputs[alive[row]]
            text.append(token)
            if token != EOS_ID and not (stop_cycle and _cycles(text, stop_cycle)):
                going.append(row)
        if not going:
            break
        if len(going) < len(alive):
            rows = torch.tensor(going, device=device)
            cache.keep(rows)
            chosen, alive = chosen[rows], [alive[row] for row in going]
        step = chosen
    return outputs


def _cycles(text: list[int], span: int) -> bool:
    tail = text[-span:]
    return len(text) >= span + 32 and any(text[-span - p : -p] == tail for p in range(1, 33))
