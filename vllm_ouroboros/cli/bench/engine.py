"""One engine of the benchmark, in a process of its own, where `main` serves it.

It is started with an `EngineSpec` and asked with a `RunSpec`, `Turns` or a `Place` at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from vllm_ouroboros.cli.engine_process import serve
from vllm_ouroboros.cli.inputs import usable_length
from vllm_ouroboros.cli.tasks import encode_chat

Chat = tuple[tuple[str, str], ...]
"""A conversation: (role, text), the last one the user's."""
Prompt = str | Chat
"""A text to continue, or a conversation to answer by the model's chat template."""
WARM_UP_TOKENS = 24
METRICS = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_nodes",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
    "vllm:iteration_tokens_total": "engine_steps",
}
"""vLLM's metrics and our names of them; of a histogram the number of observations counts."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is started with; lengths and sizes in tokens."""

    model: str
    dtype: str
    speculative: dict[str, Any] | None
    ouroboros: dict[str, Any] | None
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enforce_eager: bool
    prefix_caching: bool = False
    tensor_parallel_size: int = 1


@dataclass(frozen=True)
class RunSpec:
    """One run: all prompts, ``batch`` at a time; as one ends the next one starts.

    ``before`` are prompts that fill an emptied phrase pool, untimed.
    """

    prompts: tuple[Prompt, ...]
    batch: int
    max_tokens: int
    before: tuple[Prompt, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Turns:
    """Conversations to answer, untimed: their later turns follow the answers' texts."""

    prompts: tuple[Prompt, ...]
    max_tokens: int


@dataclass(frozen=True)
class Place:
    """Where a prompt's answer leaves vanilla's: what both have, then the two tokens that follow."""

    prompt: Prompt
    shared: tuple[int, ...]
    found: int
    vanilla: int


@dataclass(frozen=True)
class RunResult:
    """What a run gave.

    Attributes:
        groups: tokens and seconds of what can be told apart: each request at batch 1, else the run.
        group_counters: ``counters`` of each group, where they were taken.
        outputs: token ids (or text, where that is all there is) of each prompt.
        first: seconds to the first token of each request, None without one.
        each: seconds for each token after the first of each request, None without two.
        counters: differences over the run; see `METRICS` and ``vllm_ouroboros.stats``.
        costs: of our engine after the run; see `vllm_ouroboros.policy.forward_costs.Costs.as_dict`.
    """

    groups: list[tuple[int, float]]
    outputs: list[Any]
    first: list[float | None]
    each: list[float | None]
    counters: dict[str, int] = field(default_factory=dict)
    group_counters: list[dict[str, int]] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)


def warm_up_prompts(count: int) -> list[str]:
    """Texts that have nothing to do with any prompt: they compile kernels and teach nothing."""
    return [f"# part {i}\nvalue_{i} = {i}\n" for i in range(count)]


def main(events_fd: int) -> None:
    """Entry point of an engine's process."""
    serve(events_fd, Engine)


class Engine:
    """A ``vllm.LLM`` and how the benchmark asks it."""

    def __init__(self, spec: EngineSpec) -> None:
        from vllm import LLM

        length = usable_length(spec.model, spec.max_model_len)
        self.ours, self.prefix_caching = spec.ouroboros is not None, spec.prefix_caching
        self.llm = LLM(
            model=spec.model,
            dtype=spec.dtype,
            max_model_len=length,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=max(spec.max_num_batched_tokens, length),
            enforce_eager=spec.enforce_eager,
            enable_prefix_caching=spec.prefix_caching,
            tensor_parallel_size=spec.tensor_parallel_size,
            disable_log_stats=False,
            speculative_config=spec.speculative,
            additional_config={"ouroboros": spec.ouroboros} if self.ours else {},
        )
        config = self.llm.llm_engine.vllm_config.model_config
        self.max_model_len, self.seats = length, spec.max_num_seqs
        self.warm: set[int] = set()
        self.facts = {"dtype": str(config.dtype).removeprefix("torch."), "max_model_len": length}

    def answer(self, wanted: RunSpec | Turns | Place, done: Callable[[int], object]) -> Any:
        """What `run`, `texts` or `gap` finds."""
        if isinstance(wanted, Place):
            return self.gap(wanted)
        return self.texts(wanted) if isinstance(wanted, Turns) else self.run(wanted, done)

    def texts(self, turns: Turns) -> list[str]:
        """The answers to some conversations."""
        self._check(turns.prompts)
        found = self._serve(turns.prompts, self.seats, turns.max_tokens)
        return [output.outputs[0].text for output in found]

    def run(self, run: RunSpec, done: Callable[[int], object]) -> RunResult:
        """Warm up if this batch size is new, put the pool into its state, then measure."""
        self._check(run.prompts + run.before)
        if run.batch not in self.warm:
            self._serve(warm_up_prompts(run.batch), run.batch, WARM_UP_TOKENS)
            self.warm.add(run.batch)
        if self.ours:
            import vllm_ouroboros

            vllm_ouroboros.reset_pool(self.llm)
        if run.before:
            self._serve(run.before, len(run.before), run.max_tokens, run.ignore_eos)
        if self.prefix_caching:  # what filled the pool may be the very prompts that are measured
            self.llm.reset_prefix_cache()
        snapshots = [self._counters()]
        groups, outputs = [], []
        for part in [run.prompts] if run.batch > 1 else [(prompt,) for prompt in run.prompts]:
            start = time.perf_counter()
            found = self._serve(part, run.batch, run.max_tokens, run.ignore_eos, done)
            seconds = time.perf_counter() - start
            groups.append((sum(len(o.outputs[0].token_ids) for o in found), seconds))
            outputs += found
            snapshots.append(self._counters())
        return RunResult(
            groups=groups,
            outputs=[list(o.outputs[0].token_ids) for o in outputs],
            first=[o.metrics and o.metrics.first_token_latency for o in outputs],
            each=[time_per_token(output) for output in outputs],
            counters=_difference(snapshots[0], snapshots[-1]),
            group_counters=[_difference(*pair) for pair in pairwise(snapshots)],
            costs=self.llm.collective_rpc("ouroboros_costs")[0] if self.ours else {},
        )

    def gap(self, place: Place) -> float | None:
        """By how much the logit of vanilla's token is above the other; None below the first 20."""
        from vllm import SamplingParams

        ids = [*self._encode(place.prompt), *place.shared]
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20)
        [output] = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        [said] = output.outputs[0].logprobs
        if place.found not in said or place.vanilla not in said:
            return None
        return float(said[place.vanilla].logprob - said[place.found].logprob)

    def _serve(
        self,
        prompts: Sequence[Prompt],
        batch: int,
        max_tokens: int,
        ignore_eos: bool = False,
        done: Callable[[int], object] = lambda ended: None,
    ) -> list[Any]:
        """Outputs of the prompts, ``batch`` of them under way at a time."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, waiting = self.llm.llm_engine, [*enumerate(prompts)][::-1]
        found: dict[int, Any] = {}
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        while len(found) < len(prompts):
            while waiting and len(prompts) - len(waiting) - len(found) < batch:
                number, prompt = waiting.pop()
                given = (
                    prompt
                    if isinstance(prompt, str)
                    else {"prompt_token_ids": self._encode(prompt)}
                )
                engine.add_request(f"{number}", given, params)
            ended = [output for output in engine.step() if output.finished]
            found |= {int(output.request_id): output for output in ended}
            if ended:
                done(len(ended))
        return [found[number] for number in range(len(prompts))]

    def _encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt."""
        tokenizer = self.llm.get_tokenizer()
        if isinstance(prompt, str):
            return list(tokenizer.encode(prompt))
        return encode_chat(tokenizer, prompt)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            length = len(self._encode(prompt))
            if length >= self.max_model_len:
                text = prompt if isinstance(prompt, str) else prompt[-1][1]
                raise ValueError(
                    f"a prompt has {length} tokens, max_model_len is {self.max_model_len}: raise "
                    f"--max-model-len if the model knows more, or leave it out: {text[:40]!r}"
                )

    def _counters(self) -> dict[str, int]:
        found = read_metrics(self.llm.get_metrics())
        if self.ours:
            import vllm_ouroboros

            found |= vllm_ouroboros.stats(self.llm)
        return found


def read_metrics(metrics: Sequence[Any]) -> dict[str, int]:
    """`METRICS` under our names, summed over engines."""
    found: dict[str, int] = {}
    for metric in metrics:
        name = METRICS.get(metric.name)
        if name is not None:
            value = metric.count if hasattr(metric, "count") else metric.value
            found[name] = found.get(name, 0) + int(value)
    return found


def time_per_token(output: Any) -> float | None:
    """Seconds for each token of a request after the first; None if it has no other."""
    tokens = len(output.outputs[0].token_ids)
    if output.metrics is None or tokens < 2:
        return None
    return float((output.metrics.last_token_ts - output.metrics.first_token_ts) / (tokens - 1))


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before.get(name, 0) for name in after}
