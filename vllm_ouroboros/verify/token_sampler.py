"""vLLM's own sampler, asked for the token after any row of a tree.

Each request draws its noise from a generator of its own, one draw for each token and nothing else:
with a user's seed it is the stream that vanilla vLLM consumes. The next token of a request is then
a function of target, prompt, parameters and noise (Gumbel-max: arXiv 2408.07978 calls it coupling
by shared noise), whoever drafted, and the draft model drafts with a copy of the same stream.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from vllm.utils.torch_utils import PIN_MEMORY
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitsProcessor,
    LogitsProcessors,
    build_logitsprocs,
)
from vllm.v1.sample.metadata import SamplingMetadata

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

_EPS = 1e-5
_HISTORY = (
    "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "allowed_token_ids",
    "bad_words",
)  # fmt: skip
"""Of `SamplingParams`: what makes a greedy choice depend on more than logits, unless falsy."""
_PROCESSED = ("min_p", "logit_bias", "min_tokens")
"""Of `SamplingParams`: what vLLM's built-in logits processors look at."""


@dataclass
class RequestSampling:
    """How the tokens of one request are chosen.

    Attributes:
        state: vLLM's view of the request: parameters, prompt and output tokens.
        stops: ids after which the text ends.
        generator: source of noise, or None for a greedy request.
        argmax_only: whether a choice is the argmax of its row's logits, and nothing else is asked
            for.
        has_processors: whether logits processors may act on its rows.
    """

    state: CachedRequestState
    stops: frozenset[int] = frozenset()
    generator: torch.Generator | None = None
    argmax_only: bool = False
    has_processors: bool = False

    @classmethod
    def of(
        cls,
        state: CachedRequestState,
        eos: frozenset[int],
        custom: bool,
        device: torch.device,
        seeds: torch.Generator | None = None,
    ) -> RequestSampling:
        """Read a request's parameters; ``custom`` when the engine has custom processors.

        Takes the seeded generator that vLLM made out of ``state``, so that nobody else draws from
        it or rewinds it. A sampled request without a seed gets one from ``seeds``.
        """
        params, generator = state.sampling_params, state.generator
        assert params is not None
        state.generator = None
        if generator is None and params.temperature >= _EPS:
            seed = int(torch.randint(2**62, (), generator=seeds))
            generator = torch.Generator(device).manual_seed(seed)
        stops = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops |= eos
        return cls(
            state,
            stops,
            generator if params.temperature >= _EPS else None,
            argmax_only=not custom and is_argmax_only(params),
            has_processors=custom or any(getattr(params, name) for name in _PROCESSED),
        )

    def with_noise_copy(self) -> RequestSampling:
        """The same request for drafting: a copy of its noise, which the draft may use up."""
        if self.generator is None:
            return self
        return replace(self, generator=self.generator.clone_state())


def eos_token_ids(vllm_config: VllmConfig) -> frozenset[int]:
    """Ids that end a text, from the generation config and the model config."""
    ids: set[int] = set()
    for source in (
        vllm_config.model_config.try_get_generation_config(),
        vllm_config.model_config.hf_text_config.to_dict(),
    ):
        value = source.get("eos_token_id")
        ids.update([value] if isinstance(value, int) else value or ())
    return frozenset(ids)


def is_argmax_only(params: SamplingParams) -> bool:
    """Whether the target's choice at a row is the argmax of its logits, without logprobs.

    A grammar's mask is in the logits already when sampling begins.
    """
    return (
        params.temperature < _EPS
        and params.repetition_penalty == 1
        and params.logprobs is None
        and not any(getattr(params, name) for name in _HISTORY)
    )


def can_speculate(params: SamplingParams | None) -> bool:
    """Whether the rows of a tree can be sampled for a request.

    vLLM keeps the state of a thinking budget for the committed text only.
    """
    return params is not None and params.thinking_token_budget is None


def build_processors(vllm_config: VllmConfig, device: torch.device) -> LogitsProcessors:
    """All logits processors of an engine, as vLLM builds them without speculation.

    With it vLLM leaves out min_p and logit_bias, and refuses or drops custom processors.
    """
    config = copy.copy(vllm_config)
    config.speculative_config = None
    custom = tuple(vllm_config.model_config.logits_processors or ())
    return build_logitsprocs(config, device, PIN_MEMORY, False, custom)


def stateless(processor: LogitsProcessor) -> bool:
    """Whether a logits processor may be asked about any row of a tree.

    It is asked as if each row were a request that comes back from preemption: parameters, prompt
    and output, the row's path included. vLLM's own processors and `AdapterLogitsProcessor`s answer
    from these alone; another class says that it does by ``ouroboros_stateless = True``.
    """
    known = (*BUILTIN_LOGITS_PROCESSORS, AdapterLogitsProcessor)
    return isinstance(processor, known) or getattr(processor, "ouroboros_stateless", False) is True


class TokenSampler:
    """Samples the token after a request's text, or after a path below it.

    Args:
        sampler: vLLM's sampler.
        processors: a second set of the engine's logits processors, used for paths alone.
    """

    def __init__(self, sampler: Sampler, processors: LogitsProcessors) -> None:
        self.sampler, self.processors = sampler, processors
        self._rows = 0  # that the processors know of

    def after_text(
        self, logits: torch.Tensor, live: SamplingMetadata, generators: dict[int, torch.Generator]
    ) -> SamplerOutput:
        """One token for each of R requests, as vLLM samples it.

        Args:
            logits: [R, vocab]; may be changed in place.
            live: vLLM's metadata of the batch.
            generators: noise of the requests that have some, by their place in the batch.
        """
        holder = live.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = False  # one row a request, laid out as without speculation
        return self.sampler(logits, replace(live, generators=generators, spec_token_ids=[]))

    def after_paths(
        self,
        logits: torch.Tensor,
        live: SamplingMetadata,
        rows: list[int],
        requests: list[RequestSampling],
        paths: list[list[int]],
        logprobs: bool = True,
    ) -> SamplerOutput:
        """One token for each of M rows of trees.

        Args:
            logits: [M, vocab]; may be changed in place.
            live: vLLM's metadata of the batch.
            rows: [M], each request's place in the batch.
            requests: [M].
            paths: [M], tokens between the request's output and the wanted token.
            logprobs: whether to return those that the batch asks for.
        """
        index = torch.tensor(rows, device=logits.device)
        histories: list[list[int]] = []
        words = {i: live.bad_words_token_ids.get(r) for i, r in enumerate(rows)}
        if live.bad_words_token_ids or not live.no_penalties:
            histories = [
                [*request.state.output_token_ids, *path]
                for request, path in zip(requests, paths, strict=True)
            ]

        def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[index]

        metadata = replace(
            live,
            temperature=pick(live.temperature),
            top_p=pick(live.top_p),
            top_k=pick(live.top_k),
            generators={i: q.generator for i, q in enumerate(requests) if q.generator is not None},
            max_num_logprobs=live.max_num_logprobs if logprobs else None,
            prompt_token_ids=pick(live.prompt_token_ids),
            frequency_penalties=pick(live.frequency_penalties),
            presence_penalties=pick(live.presence_penalties),
            repetition_penalties=pick(live.repetition_penalties),
            output_token_ids=histories,
            allowed_token_ids_mask=pick(live.allowed_token_ids_mask),
            bad_words_token_ids={i: found for i, found in words.items() if found},
            logitsprocs=self._processors(requests, paths),
            logprob_token_ids=None,
            spec_token_ids=[],
            thinking_budget_state_holder=None,
        )
        return self.sampler(logits, metadata)

    def _processors(
        self, requests: list[RequestSampling], paths: list[list[int]]
    ) -> LogitsProcessors:
        """The logits processors, told about these rows; an empty set if none acts on them."""
        if not any(request.has_processors for request in requests):
            return LogitsProcessors()
        size = len(requests)
        added = [
            (
                i,
                request.state.sampling_params,
                request.state.prompt_token_ids,
                [*request.state.output_token_ids, *path],
            )
            for i, (request, path) in enumerate(zip(requests, paths, strict=True))
        ]
        for processor in self.processors.all:
            processor.update_state(BatchUpdate(size, [*range(self._rows)][::-1], [], []))
            processor.update_state(BatchUpdate(size, [], added, []))
        self._rows = size
        return self.processors
