"""What clients ask of the abused server: request ``index`` of a seed is the same in every run."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any

from abuse_prompts import NOTES, ChatPrompts, Worded, fill
from soak_requests import Request, random_request

CONTEXT = 1024
"""Tokens of prompt and output together (--max-model-len)."""
PROBES = 40
WARMING = 300
"""oneDNN keeps 1024 primitives, of which each number of tokens in a step takes one for each of the
four shapes of weights: its cache is full after 256 numbers, and takes 300 MB then."""
SHAPES, SLOW_SHAPES = 120, 48
"""So many requests have shapes of their own: kind, parameters and lengths, of which each window of
a run has the same mix. Words are of each request alone."""
KINDS = {
    "usual": 66, "leaving": 10, "long": 8, "options": 8, "longest": 4, "too_long": 2,
    "wrong_options": 2,
}  # fmt: skip
"""Kinds of requests, and how many of 100 are of each."""
WITHOUT = frozenset({"priority"})


@dataclass(frozen=True)
class Asked:
    """A request, and the words of the 400 that it must be answered with, if it must."""

    kind: str
    request: Request
    refusal: str | None = None


def abuse_request(index: int, seed: int, prompts: ChatPrompts) -> Asked:
    """The request of an index."""
    shape = index % SHAPES
    rng = random.Random(f"abuse:{seed}:{shape}")
    worded = Worded(prompts, f"{seed}:{index}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind in ("usual", "options"):
        usual = replace(random_request(shape, seed, worded, WITHOUT), index=index)
        return Asked(kind, usual if kind == "usual" else _with_options(usual, _options(rng)))
    if kind == "wrong_options":
        wrong, named = _wrong_options(rng)
        body = _plain(worded.draw(rng, 40), rng.randint(4, 16))
        return Asked(kind, _with_options(Request(index, body), wrong), named)
    if kind == "long":
        body = _plain(worded.exact(rng, rng.randint(400, 900)), rng.randint(8, 64))
        return Asked(kind, Request(index, body | _maybe_sampled(rng)))
    if kind == "longest":  # to the last token that there is room for, in the middle of a draft
        left = rng.choice((1, rng.randint(8, 48)))
        body = _plain(worded.exact(rng, CONTEXT - left), left) | {"ignore_eos": True}
        return Asked(kind, Request(index, body))
    if kind == "leaving":  # each piece is a step, so this is long before the end
        body = _plain(worded.draw(rng, rng.randint(20, 200)), 96) | {"ignore_eos": True}
        body |= {"stream": True} | _maybe_sampled(rng)
        return Asked(kind, Request(index, body, leave_after_pieces=rng.randint(1, 3)))
    over = rng.choice((0, 0, rng.randint(1, 1000)))
    body = _plain(worded.exact(rng, CONTEXT + over), 1)
    return Asked(kind, Request(index, body), str(CONTEXT) if over else "max_tokens")


def slow_request(index: int, seed: int, prompts: ChatPrompts) -> Asked:
    """What a client asks that reads a piece, waits, and reads the next one."""
    rng = random.Random(f"slow:{seed}:{index % SLOW_SHAPES}")
    worded = Worded(prompts, f"slow:{seed}:{index}")
    body = _plain(worded.draw(rng, rng.randint(40, 160)), 48)
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return Asked("slow", Request(index, body | stream, pause_seconds=rng.uniform(1, 3)))


def probe_requests(prompts: ChatPrompts) -> list[Request]:
    """The probes, half of them greedy, half with a seed; all have as many tokens to write."""
    rng = random.Random("probes")
    probes = []
    for i in range(PROBES):
        body = _plain(prompts.exact(rng, rng.randint(60, 160)), 32) | {"ignore_eos": True}
        if i % 2:
            body |= {"temperature": rng.choice((0.4, 0.8, 1.0)), "seed": rng.randrange(2**31)}
            body |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 40}))
        if i % 4 > 1:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if i % 10 == 0:
            body |= {"logprobs": 3}
        probes.append(Request(i, body))
    return probes


def warming_requests(vocabulary: int) -> list[Request]:
    """Prompts of each length up to `WARMING` tokens, of which none begins as another one does and
    the pool learns nothing: each is a step of so many tokens if it is alone.
    """
    rng = random.Random("warming")
    firsts = rng.sample(range(vocabulary // 2, vocabulary), WARMING)
    return [
        _with_options(Request(i, _plain([first] * (i + 1), 1)), {"learn": False})
        for i, first in enumerate(firsts)
    ]


def _plain(prompt: str | list[int], tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip


def _maybe_sampled(rng: random.Random) -> dict[str, Any]:
    return rng.choice(
        ({}, {"temperature": 0.8}, {"temperature": 0.8, "seed": rng.randrange(2**31)})
    )


def _with_options(request: Request, options: dict[str, Any]) -> Request:
    """The request with options of its own: vLLM takes no objects there, so they are JSON text."""
    return replace(request, body=request.body | {"vllm_xargs": {"ouroboros": json.dumps(options)}})


def _options(rng: random.Random) -> dict[str, Any]:
    known = {
        "speculate": rng.random() < 0.5,
        "learn": rng.random() < 0.5,
        "scope": rng.choice(("harbour", "clinic", "école")),
        "prediction": "".join(fill(rng, rng.choice(NOTES)) + "\n" for _ in range(3)),
    }
    return {name: known[name] for name in rng.sample(list(known), rng.randint(1, 3))}


def _wrong_options(rng: random.Random) -> tuple[dict[str, Any], str]:
    """Options that must be refused, and the key that the refusal names."""
    return rng.choice(
        (
            ({"lern": False}, "lern"),
            ({"learn": False, "draft_tokens": 4}, "draft_tokens"),
            ({"speculate": "perhaps"}, "speculate"),
            ({"scope": ""}, "scope"),
        )
    )
