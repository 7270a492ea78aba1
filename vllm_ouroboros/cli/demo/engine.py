"""One engine of the demo, in a process of its own, where `main` serves it.

It is started with an `EngineJob` and asked for passes over the prompts, then for the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_ouroboros.cli.engine_process import serve
from vllm_ouroboros.cli.inputs import usable_length
from vllm_ouroboros.cli.tasks import encode_chat

MAX_MODEL_LEN = 1024  # tokens; less where the model knows fewer positions
NODE_BUDGET = 26
TAIL = 60  # characters of a growing text that are shown


@dataclass(frozen=True)
class EngineJob:
    """What one engine generates; without ``ouroboros`` the engine is vanilla.

    With ``chat`` a prompt is what a user says, else a text to continue. ``predictions`` are texts
    that the answers are expected to repeat, one a prompt, or none.
    """

    model: str
    ouroboros: dict[str, Any] | None
    prompts: tuple[str, ...]
    max_tokens: int
    dtype: str
    chat: bool = False
    predictions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """One prompt's greedy continuation.

    Attributes:
        token_ids: one list per pass over the prompts; they should all be equal.
        pieces: text that each token of the first pass adds.
        origins: where each of them came from: 0 target, 1 draft, 2 suffix, 3 prediction; all 0
            when vanilla.
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
    """Entry point of an engine's process."""
    serve(events_fd, Engine)


class Engine:
    """A ``vllm.LLM``, and what it has generated."""

    def __init__(self, job: EngineJob) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        length = usable_length(job.model, MAX_MODEL_LEN)
        extra: dict[str, Any] = {}
        if job.ouroboros is not None:
            extra = {
                "speculative_config": {
                    "model": "vllm_ouroboros.OuroborosProposer",
                    "num_speculative_tokens": NODE_BUDGET,
                },
                "additional_config": {"ouroboros": job.ouroboros},
            }
        self.job, self.ours = job, job.ouroboros is not None
        self.llm = LLM(
            model=job.model, dtype=job.dtype, max_model_len=length, disable_log_stats=True, **extra
        )
        self.first: list[Any] = []  # outputs of the pass that warms up
        self.streamed = 0  # requests whose text was shown as it grew
        self.origins: dict[str, list[int]] = {}
        self.before: dict[str, int] = {}  # counters
        self.passes: list[tuple[list[Any], list[float]]] = []
        self.facts = {"device": current_platform.device_type}
        self.prompts = [self._encode(prompt) for prompt in job.prompts]
        self.predictions = job.predictions or [None] * len(self.prompts)
        for text, ids in zip(job.prompts, self.prompts, strict=True):
            if len(ids) >= length:
                raise ValueError(
                    f"a prompt has {len(ids)} tokens, the demo takes at most {length - 1}: "
                    f"{text[:40]!r}"
                )

    def _encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the model's chat template around it if this is a chat."""
        tokenizer = self.llm.get_tokenizer()
        if not self.job.chat:
            return list(tokenizer.encode(prompt))
        return encode_chat(tokenizer, [("user", prompt)])

    def answer(self, wanted: str, done: Callable[[int | str], object]) -> EngineResult | None:
        """Run a pass, "warm" or "time", or say the "result".

        ``done`` hears 1 for each request that has ended and, while the engine warms up, the end of
        the text so far.
        """
        if wanted == "result":
            return self.result()
        if wanted == "warm":
            self.warm_up(done)
        else:
            self.passes.append(self._pass(self._generate, done))
        return None

    def warm_up(self, done: Callable[[int | str], object]) -> None:
        """A pass that fills caches, compiles, and shows where the tokens come from."""
        import vllm_ouroboros

        if self.ours:
            vllm_ouroboros.trace(self.llm, enabled=True)
        self.first, _ = self._pass(lambda *of: self._stream(of[0], of[1], of[2], done), done)
        if self.ours:
            # The origins of a request are there once another step has run after its last one.
            self._generate(self.prompts[0], max_tokens=1)
            self.origins = vllm_ouroboros.take_origins(self.llm)
            vllm_ouroboros.trace(self.llm, enabled=False)
            self.before = vllm_ouroboros.stats(self.llm)

    def result(self) -> EngineResult:
        """Generations and counters of the passes so far."""
        import vllm_ouroboros

        after = vllm_ouroboros.stats(self.llm) if self.ours else {}
        tokenizer = self.llm.get_tokenizer()

        def decode(token_ids: list[int]) -> str:
            return str(tokenizer.decode(token_ids, skip_special_tokens=True))

        generations = []
        for i, output in enumerate(self.first):
            token_ids = list(output.outputs[0].token_ids)
            generations.append(
                Generation(
                    token_ids=[token_ids]
                    + [list(p[0][i].outputs[0].token_ids) for p in self.passes],
                    pieces=token_pieces(decode, output.prompt_token_ids, token_ids),
                    origins=match_origins(self.origins, output.request_id, len(token_ids)),
                    seconds=median(p[1][i] for p in self.passes),
                )
            )
        return EngineResult(generations, {k: after[k] - self.before.get(k, 0) for k in after})

    def _pass(
        self,
        generate: Callable[[list[int], int, str | None], Any],
        done: Callable[[int], object],
    ) -> tuple[list[Any], list[float]]:
        """Outputs and seconds of each prompt.

        Nothing may be left of the pass before: neither cached prompts nor, in the phrase pool, the
        very text that is generated again.
        """
        import vllm_ouroboros

        self.llm.reset_prefix_cache()
        if self.ours:
            vllm_ouroboros.reset_pool(self.llm)
        outputs, seconds = [], []
        for prompt, prediction in zip(self.prompts, self.predictions, strict=True):
            start = time.perf_counter()
            outputs.append(generate(prompt, self.job.max_tokens, prediction))
            seconds.append(time.perf_counter() - start)
            done(1)
        return outputs, seconds

    def _params(self, max_tokens: int, prediction: str | None, **more: Any) -> Any:
        from vllm import SamplingParams

        extra = {"ouroboros": {"prediction": prediction}} if prediction is not None else None
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, extra_args=extra, **more)

    def _generate(self, prompt: list[int], max_tokens: int, prediction: str | None = None) -> Any:
        params = self._params(max_tokens, prediction)
        return self.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]

    def _stream(
        self,
        prompt: list[int],
        max_tokens: int,
        prediction: str | None,
        heard: Callable[[str], object],
    ) -> Any:
        """The same, while ``heard`` is told the end of the text as it grows."""
        from vllm.sampling_params import RequestOutputKind

        params = self._params(max_tokens, prediction, output_kind=RequestOutputKind.CUMULATIVE)
        engine = self.llm.llm_engine
        self.streamed += 1
        engine.add_request(f"streamed {self.streamed}", {"prompt_token_ids": prompt}, params)
        while True:
            for output in engine.step():
                heard(output.outputs[0].text[-TAIL:])
                if output.finished:
                    return output
