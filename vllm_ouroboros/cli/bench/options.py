"""From the options of ``vllm-ouroboros bench`` to a checked `Plan`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from vllm_ouroboros.cli.bench.engine import Prompt
from vllm_ouroboros.cli.bench.methods import COMPARED, METHODS, VANILLA, build
from vllm_ouroboros.cli.bench.rows import Load
from vllm_ouroboros.cli.bench.run import Plan
from vllm_ouroboros.cli.inputs import (
    DRAFT,
    TARGET,
    InputError,
    check_writable,
    json_object,
    model_reference,
    read_prompts,
    shipped_prompts,
)
from vllm_ouroboros.cli.tasks import Task, has_chat_template, read_tasks
from vllm_ouroboros.config import ConfigError

T = TypeVar("T")
DEFAULTS: dict[str, Any] = {
    "limit": None,
    "draft_tokens": "3,5,8",
    "ngram": "2-4-3,2-4-8",
    "suffix": "1-0.1",
    "batch": "1",
    "rounds": 3,
    "max_tokens": 128,
    "enforce_eager": False,
}
QUICK = DEFAULTS | {
    "limit": 4, "draft_tokens": "3", "ngram": "2-4-3", "rounds": 1, "max_tokens": 32,
    "enforce_eager": True,
}  # fmt: skip


def checked_plan(
    *,
    model: str | None,
    draft_model: str | None,
    head: str | None,
    prompts: Path | None,
    warm_prompts: Path | None,
    warm_limit: int,
    methods: str | None,
    configs: Sequence[str],
    nodes: int | None,
    rates: str | None,
    max_model_len: int,
    dtype: str,
    alive: int,
    timeout: float,
    out: Path,
    quick: bool,
    ignore_eos: bool = False,
    prefix_caching: bool = False,
    tensor_parallel_size: int = 1,
    draft_ranks: Sequence[int] = (),
    tasks: str | None = None,
    **chosen: Any,
) -> Plan:
    """Check everything that can be checked without an engine.

    ``chosen`` are the options of `DEFAULTS`, None where the preset decides.

    Raises:
        InputError: an option cannot work.
    """
    preset = QUICK if quick else DEFAULTS
    chosen = {key: preset[key] if value is None else value for key, value in chosen.items()}
    try:
        if draft_model is None:
            draft_model = str(DRAFT) if model is None else "none"
        target = model_reference(str(TARGET) if model is None else model, "--model")
        draft = None
        if draft_model != "none":
            draft = model_reference(draft_model, "--draft-model")
        if head is not None:
            head = model_reference(head, "--head")
        kinds: tuple[str, ...] = ()
        later: tuple[tuple[str, ...], ...] = ()
        texts: tuple[Prompt, ...]
        if tasks is not None:
            if prompts is not None:
                raise InputError(f"--tasks {tasks}: excludes --prompts; give one of them")
            conversations = _tasks(tasks, target)
            texts = tuple((("user", one.turns[0]),) for one in conversations)
            kinds = tuple(one.task for one in conversations[: chosen["limit"]])
            later = tuple(one.turns[1:] for one in conversations[: chosen["limit"]])
        elif prompts is None:
            texts = tuple(text for _, text in shipped_prompts())
        else:
            texts = read_prompts(prompts, "--prompts")
        measured = texts[: chosen["limit"]]
        others = texts[len(measured) :]
        if warm_prompts is not None:
            others = read_prompts(warm_prompts, "--warm-prompts")
        others = tuple(text for text in others if text not in measured)[:warm_limit]
        found = build(
            _methods(methods),
            draft_model=draft,
            head=head,
            draft_tokens=_list(chosen["draft_tokens"], "--draft-tokens", _count, "3,5,8"),
            ngrams=_list(chosen["ngram"], "--ngram", _ngram, "2-4-5"),
            suffixes=_list(chosen["suffix"], "--suffix", _suffix, "1-0.1,2-0.2"),
            configs=[
                json_object(text, "--ouroboros-config", '{"draft_tokens": 8}') for text in configs
            ],
            nodes=nodes,
            others=len(others),
            draft_ranks=draft_ranks or (None,),
        )
    except ConfigError as error:
        raise InputError(str(error)) from None
    return Plan(
        model=target,
        draft_model=draft,
        head=head,
        methods=tuple(found),
        prompts=measured,
        others=others,
        loads=_loads(chosen["batch"], rates, len(measured)),
        rounds=chosen["rounds"],
        max_tokens=chosen["max_tokens"],
        max_model_len=min(max_model_len, _positions(target) or max_model_len),
        dtype=dtype,
        enforce_eager=chosen["enforce_eager"],
        alive=alive,
        timeout=timeout,
        out=check_writable(out, "--out"),
        ignore_eos=ignore_eos,
        prefix_caching=prefix_caching,
        tensor_parallel_size=tensor_parallel_size,
        tasks=kinds,
        later=later,
    )


def _tasks(text: str, target: str) -> list[Task]:
    """Conversations of the tasks named, or of "all", one of each task in turn."""
    if not has_chat_template(target):
        raise InputError(f"--tasks {text}: {target} has no chat template; pass a chat model")
    found: dict[str, list[Task]] = {}
    for one in read_tasks():
        found.setdefault(one.task, []).append(one)
    names = [*found] if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in found:
            raise InputError(f"--tasks {text}: {name!r} is unknown; take all, {', '.join(found)}")
    rounds = zip_longest(*(found[name] for name in dict.fromkeys(names)))
    return [one for some in rounds for one in some if one is not None]


def _methods(text: str | None) -> list[str]:
    if text is None:
        return [*COMPARED]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            raise InputError(f"--methods {text}: {name!r} is unknown; take {', '.join(METHODS)}")
    return [VANILLA, *names]  # what all others are compared with


def _loads(batch: str, rates: str | None, prompts: int) -> tuple[Load, ...]:
    loads = [] if batch == "none" else _list(batch, "--batch", _batch, "1,8 or 1:12,8:64")
    if rates is not None:
        loads += [Load(rate=rate) for rate in _list(rates, "--rates", _rate, "0.5,1,2")]
        if find_spec("pandas") is None:  # else known only once the first server is up
            raise InputError(
                f"--rates {rates}: `vllm bench serve` needs pandas, which is not installed; "
                "pip install pandas"
            )
    if not loads:
        raise InputError("--batch none: leaves nothing to measure; give --rates as well")
    for load in loads:
        if load.prompts is not None and load.prompts > prompts:
            raise InputError(
                f"--batch {batch}: batch {load.batch} wants {load.prompts} prompts and there are "
                f"{prompts}; take fewer, or more with --limit and --prompts"
            )
    return tuple(dict.fromkeys(loads))


def _list(text: str, option: str, one: Callable[[str], T], example: str) -> list[T]:
    try:
        return [one(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} {text}: {error}; for example {option} {example}") from None


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise ValueError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _batch(text: str) -> Load:
    batch, colon, prompts = text.partition(":")
    return Load(_count(batch), prompts=_count(prompts) if colon else None)


def _rate(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", text) or float(text) == 0:
        raise ValueError(f"{text!r} is not a number above 0")
    return float(text)


def _ngram(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"([1-9]\d*)-([1-9]\d*)-([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"{text!r} is not MIN-MAX-K")
    shortest, longest, k = map(int, match.groups())
    if shortest > longest:
        raise ValueError(f"{text!r} has MIN above MAX")
    return shortest, longest, k


def _suffix(text: str) -> tuple[float, float]:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)", text)
    if match is None:
        raise ValueError(f"{text!r} is not FACTOR-PROBABILITY")
    factor, probability = map(float, match.groups())
    if probability > 1:
        raise ValueError(f"{text!r} has a PROBABILITY above 1")
    return factor, probability


def _positions(model: str) -> int | None:
    """Positions that a model in a folder knows; None where its config does not tell."""
    try:
        config = json.loads((Path(model) / "config.json").read_text())
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
