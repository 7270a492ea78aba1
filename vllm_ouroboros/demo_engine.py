"""One engine of the demo, in a process of its own: only one engine may be alive at a time.

`main` is the child's entry point. It reports to the parent through a connection: pairs of a kind
("phase", "done", "result" or "error") and a value.
"""

from __future__ import annotations

import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from vllm_ouroboros.engine_process import end_with_parent, one_line

MAX_MODEL_LEN = 1024  # tokens; less where the model knows fewer positions
NODE_BUDGET = 26


@dataclass(frozen=True)
class EngineJob:
    """What one engine generates; without ``ouroboros`` the engine is vanilla."""

    model: str
    ouroboros: dict[str, Any] | None
    prompts: tuple[str, ...]
    max_tokens: int
    dtype: str
    rounds: int


@dataclass(frozen=True)
class Generation:
    """One prompt's greedy continuation.

    Attributes:
        token_ids: one list per pass over the prompts; they should all be equal.
        pieces: text that each token of the first pass adds.
        origins: where each of them came from: 0 target, 1 draft, 2 suffix; all 0 when vanilla.
        seconds: median over the timed passes, prompt processing included.
    """

    token_ids: list[list[int]]
    pieces: list[str]
    origins: list[int]
    seconds: float


@dataclass(frozen=True)
class EngineResult:
    """All generations, and the engine's counters summed over the timed passes (empty: vanilla)."""

    generations: list[Generation]
    counters: dict[str, int]


def token_pieces(
    decode: Callable[[list[int]], str], context: Sequence[int], token_ids: Sequence[int]
) -> list[str]:
    """The text that each token adds after ``context``.

    A token that ends inside a character adds nothing; the one that completes it adds it whole.
    """
    head = list(context)
    shown = len(decode(head))
    pieces = []
    for i in range(len(token_ids)):
        text = decode(head + list(token_ids[: i + 1]))
        whole = not text.endswith("\ufffd") or i == len(token_ids) - 1
        pieces.append(text[shown:] if whole else "")
        shown = len(text) if whole else shown
    return pieces


def match_origins(origins: dict[str, list[int]], request_id: str, length: int) -> list[int]:
    """The origins of one request, one per output token; the target's where none is known.

    vLLM may add a suffix to the id that `LLM.generate` shows.
    """
    found: list[int] = []
    for key, value in origins.items():
        if key == request_id or key.startswith(request_id + "-"):
            found = value
            break
    return (list(found) + [0] * length)[:length]


def main(events_fd: int) -> None:
    """Run the pickled `EngineJob` of stdin; leads its session, and the parent keeps stdin open."""
    events = Connection(events_fd, readable=False)
    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        events.send(("result", _generate(job, events)))
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        events.send(("error", one_line(error)))


def usable_length(model: str, wanted: int) -> int:
    """Tokens of a request: as wanted, or less where the model knows fewer positions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def _generate(job: EngineJob, events: Connection) -> EngineResult:
    events.send(("phase", "load"))
    from vllm import LLM, SamplingParams

    import vllm_ouroboros

    max_model_len = usable_length(job.model, MAX_MODEL_LEN)
    extra: dict[str, Any] = {}
    if job.ouroboros is not None:
        extra = {
            "speculative_config": {
                "model": "vllm_ouroboros.OuroborosProposer",
                "num_speculative_tokens": NODE_BUDGET,
            },
            "additional_config": {"ouroboros": job.ouroboros},
        }
    llm = LLM(
        model=job.model,
        dtype=job.dtype,
        max_model_len=max_model_len,
        disable_log_stats=True,
        **extra,
    )
    tokenizer = llm.get_tokenizer()
    for prompt in job.prompts:
        length = len(tokenizer.encode(prompt))
        if length >= max_model_len:
            raise ValueError(
                f"a prompt has {length} tokens, the demo takes at most {max_model_len - 1}: "
                f"{prompt[:40]!r}"
            )
    params = SamplingParams(temperature=0.0, max_tokens=job.max_tokens)

    def one_pass() -> tuple[list[Any], list[float]]:
        # Nothing may be left of the pass before: neither cached prompts nor, in the phrase pool,
        # the very text that is generated again.
        llm.reset_prefix_cache()
        if job.ouroboros is not None:
            vllm_ouroboros.reset_pool(llm)
        outputs, seconds = [], []
        for prompt in job.prompts:
            start = time.perf_counter()
            outputs.append(llm.generate([prompt], params, use_tqdm=False)[0])
            seconds.append(time.perf_counter() - start)
            events.send(("done", 1))
        return outputs, seconds

    # The first pass warms up (compilation, caches) and shows where the tokens come from.
    events.send(("phase", "warm"))
    if job.ouroboros is not None:
        vllm_ouroboros.trace(llm, enabled=True)
    first, _ = one_pass()
    origins: dict[str, list[int]] = {}
    before: dict[str, int] = {}
    if job.ouroboros is not None:
        # The origins of a request are there once another step has run after its last one.
        llm.generate([job.prompts[0]], SamplingParams(max_tokens=1), use_tqdm=False)
        origins = vllm_ouroboros.take_origins(llm)
        vllm_ouroboros.trace(llm, enabled=False)
        before = vllm_ouroboros.stats(llm)

    events.send(("phase", "time"))
    passes = [one_pass() for _ in range(job.rounds)]
    after = vllm_ouroboros.stats(llm) if job.ouroboros is not None else {}

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    generations = []
    for i, output in enumerate(first):
        token_ids = list(output.outputs[0].token_ids)
        generations.append(
            Generation(
                token_ids=[token_ids] + [list(p[0][i].outputs[0].token_ids) for p in passes],
                pieces=token_pieces(decode, output.prompt_token_ids, token_ids),
                origins=match_origins(origins, output.request_id, len(token_ids)),
                seconds=median(p[1][i] for p in passes),
            )
        )
    counters = {name: after[name] - before.get(name, 0) for name in after}
    return EngineResult(generations, counters)
