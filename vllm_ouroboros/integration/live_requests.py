"""The requests that live in the engine: their slots, trees and scopes of phrases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessor

from vllm_ouroboros.config import OuroborosConfig
from vllm_ouroboros.integration.request_options import predicted_tokens, received
from vllm_ouroboros.phrases.idle_save import IdleSave
from vllm_ouroboros.phrases.scopes import Scopes
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.drafting import Drafting
from vllm_ouroboros.verify.token_sampler import RequestSampling, can_speculate, stateless

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

NO_SLOT = -1


@dataclass
class Request:
    """What the proposer knows of a live request."""

    slot: int  # NO_SLOT while preempted
    scope: int  # whom it shares phrases with
    learns: bool  # whether its text becomes phrases
    speculates: bool
    chain_only: bool  # a grammar follows its draft token by token: no branches
    sampling: RequestSampling
    max_tokens: int
    prompt_len: int  # tokens
    prediction: np.ndarray | None = None  # int32, what its sender expects it to say
    tree: DraftTree | None = None
    grown_tree: DraftTree | None = None  # what the policy cut it from
    phrase_tree: DraftTree | None = None  # what it would be without the draft model
    probabilities: np.ndarray | None = None  # float64, of the nodes of the tree it was cut from
    origins: list[int] = field(default_factory=list)

    def expects(self, tree: DraftTree) -> float | None:
        """How many nodes of a verified tree the policy expected to be accepted; None: it made
        another one.
        """
        if self.probabilities is None or tree.kinds is None:
            return None
        return float(self.probabilities[: len(tree.tokens)].sum())

    def drop_drafts(self) -> None:
        """Forget what was drafted for its present step."""
        self.tree = self.grown_tree = self.phrase_tree = self.probabilities = None


class LiveRequests:
    """Requests by vLLM's id, from their admission to their end.

    Args:
        config: the plugin's settings.
        drafting: holds the slots.
        eos: ids that end a text.
        max_model_len: longest text, in tokens.
        seed: of the engine. Requests without a seed get theirs from it in the order in which they
            come, so that all ranks of an engine draw the same noise.
    """

    def __init__(
        self,
        config: OuroborosConfig,
        drafting: Drafting,
        eos: frozenset[int],
        max_model_len: int,
        seed: int,
    ) -> None:
        self.per_request = config.pool_scope == "request"
        self.drafting = drafting
        self.scopes = Scopes(drafting.pool)
        self.eos = eos
        self.max_model_len = max_model_len
        self.seeds = torch.Generator().manual_seed(seed)
        self.device = torch.device("cpu")
        self.custom_processors = self.opaque_processors = False
        self.draft_prefix: Callable[[str, int], int] = lambda req_id, computed: computed
        self.on_release: Callable[[int], None] = lambda slot: None
        self.idle_save: IdleSave | None = None
        self.tracing = False
        self.finished_origins: dict[str, list[int]] = {}
        self._requests: dict[str, Request] = {}

    def bind(
        self,
        device: torch.device,
        processors: list[LogitsProcessor],
        draft_prefix: Callable[[str, int], int],
    ) -> list[str]:
        """Learn about the engine before the first request.

        Args:
            device: of the target.
            processors: its logits processors.
            draft_prefix: how many of the cached tokens that a request (vLLM's id) starts with have
                draft KV.

        Returns:
            Names of processors that may depend on more than parameters, prompt and output; if there
            are any, nothing is drafted.
        """
        self.device, self.draft_prefix = device, draft_prefix
        built_in = tuple(BUILTIN_LOGITS_PROCESSORS)
        self.custom_processors = any(not isinstance(p, built_in) for p in processors)
        opaque = sorted({type(p).__qualname__ for p in processors if not stateless(p)})
        self.opaque_processors = bool(opaque)
        return opaque

    def __getitem__(self, req_id: str) -> Request:
        return self._requests[req_id]

    def drop_drafts(self, batch: Iterable[str], keep_kv: bool) -> None:
        """Forget chains of all requests, and the trees of ``batch`` (ids): these were being made.

        The scheduler has the trees of others already; all ranks verify those. See
        `Drafting.drop_drafts`.
        """
        for req_id in batch:
            self._requests[req_id].drop_drafts()
        slots = [one.slot for one in self._requests.values() if one.slot != NO_SLOT]
        self.drafting.drop_drafts(np.array(slots, np.int64), keep_kv)

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._requests

    def admit(
        self, req_id: str, state: CachedRequestState, num_computed: int, tenant: str | None
    ) -> None:
        """A request is new, with ``num_computed`` tokens cached.

        Args:
            req_id: vLLM's id; one that lives already goes on with another prompt (a session that
                streams its input).
            state: vLLM's view of the request.
            num_computed: tokens whose KV is in its blocks.
            tenant: its ``cache_salt``; phrases stay among requests with the same one.
        """
        if self.idle_save is not None:
            self.idle_save.busy()
        before = self._requests.get(req_id)
        if before is not None:
            state.generator = before.sampling.generator
            self._end(req_id)
        params = state.sampling_params
        assert params is not None
        options = received(params)
        scope = self._scope(tenant, state, options.scope)
        speculates = not self.opaque_processors and can_speculate(params)
        self._requests[req_id] = Request(
            slot=self.drafting.add(scope, options.learn),
            scope=scope,
            learns=options.learn,
            speculates=speculates and options.speculate,
            chain_only=params.structured_outputs is not None,
            sampling=RequestSampling.of(
                state, self.eos, self.custom_processors, self.device, self.seeds
            ),
            max_tokens=params.max_tokens or self.max_model_len,
            prompt_len=state.num_prompt_tokens,
            prediction=predicted_tokens(options),
        )
        self.resume(req_id, num_computed)

    def _scope(self, tenant: str | None, state: CachedRequestState, name: str | None) -> int:
        """Number of those whom a request shares phrases with."""
        if self.per_request:
            return self.scopes.new()
        lora = state.lora_request
        adapter = lora and (lora.lora_name, lora.lora_int_id)
        whose = (tenant, adapter, name)
        return self.scopes.of(whose) if whose != (None, None, None) else 0

    def resume(self, req_id: str, num_computed: int) -> None:
        """A request comes back from preemption with ``num_computed`` tokens cached."""
        request = self._requests[req_id]
        if request.slot == NO_SLOT:
            request.slot = self.drafting.add(request.scope, request.learns)
        if request.prediction is not None:
            self.drafting.predict(request.slot, request.prediction, request.prompt_len)
        # its slot may be another one
        request.drop_drafts()
        cached = self.draft_prefix(req_id, num_computed) if num_computed else 0
        self.drafting.reset(request.slot, cached)

    def suspend(self, req_id: str) -> None:
        """A request is preempted: its KV is gone, it may come back."""
        request = self._requests.get(req_id)
        if request is not None:
            self._release(request)

    def forget(self, req_id: str) -> None:
        """A request is finished or aborted."""
        if req_id in self._requests:
            self._end(req_id)
            if self.idle_save is not None and not self._requests:
                self.idle_save.idle()

    def room(self, request: Request, length: int) -> int:
        """Nodes that may be drafted for a request whose text has so many tokens."""
        return min(self.max_model_len, request.prompt_len + request.max_tokens) - length - 1

    def tree_of(self, req_id: str, scheduled: list[int]) -> DraftTree | None:
        """The tree behind the flat tokens that the scheduler gives back.

        The scheduler may have cut the list, or put in one of its own: that one is read as a
        chain up to the first id that is no token.
        """
        request = self._requests.get(req_id)
        tree = request.tree if request is not None else None
        if tree is not None and tree.tokens[: len(scheduled)].tolist() == scheduled:
            return tree.prefix(len(scheduled))
        valid = next((i for i, token in enumerate(scheduled) if token < 0), len(scheduled))
        return DraftTree.chain(scheduled[:valid]) if valid else None

    def _end(self, req_id: str) -> None:
        request = self._requests.pop(req_id)
        self._release(request)
        if self.tracing:
            self.finished_origins[req_id] = request.origins

    def _release(self, request: Request) -> None:
        if request.slot != NO_SLOT:
            self.on_release(request.slot)
            self.drafting.release(request.slot)
            request.slot = NO_SLOT
