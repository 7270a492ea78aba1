"""An engine without models: the plugin's own drafting on a recorded trace, on a clock that counts
what forwards would cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from simulate_trace import Text, Trace
from vllm import SamplingParams
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from vllm_ouroboros.draft.forward_rows import ForwardRows
from vllm_ouroboros.integration.proposer import OuroborosProposer
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.policy.controller import Policy
from vllm_ouroboros.policy.forward_costs import Costs
from vllm_ouroboros.trees.draft_tree import ROOT, DraftTree, child_of
from vllm_ouroboros.verify.acceptance import Verified

MAX_LEN = 4096


class Watch:
    """Seconds that pass only when something is paid for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class ReplayedDraft:
    """Says what the trace's draft model said; behind a token that the target did not write, what it
    said at that place.
    """

    kv_cache_gid, max_len, reads_features, short_ids = 0, MAX_LEN, False, None

    def __init__(self, vocab: int, costs: Costs, watch: Watch) -> None:
        assert costs.draft is not None
        self.vocab, self.costs, self.watch = vocab, costs, watch
        self.live: list[Text] = []  # by row of the batch

    def forward(self, clock, runner, rows: ForwardRows, mask) -> list[tuple[Text, int]]:
        """Text and place of each row asked for, in the place of hidden states."""
        del clock, runner, mask
        self.watch.seconds += self.costs.round(len(rows.tokens))
        read: list[tuple[Text, int]] = []
        starts = rows.query_start_loc.tolist()
        for request, first, last in zip(rows.requests.tolist(), starts, starts[1:], strict=False):
            text, positions = self.live[request], rows.positions[first:last].tolist()
            read += [(text, min(p, len(text.first) - 1)) for p in positions]
        return [read[row] for row in rows.asked.tolist()]

    def cannot_wait(self, slot: int) -> bool:
        """No request must read its text before it is drafted for."""
        return False

    def has_read(self, slot: int, tokens: int) -> None:
        """Nothing waits to be read."""

    def logits(self, hidden: list[tuple[Text, int]], *, short: bool = False) -> torch.Tensor:
        """Logits [M, vocab] that give the recorded probabilities."""
        assert not short
        first = np.array([text.first[place] for text, place in hidden])
        odds = np.array([text.odds[place] for text, place in hidden])
        rest = np.maximum(1 - odds.sum(1, keepdims=True), 1e-4) / self.vocab
        probabilities = np.repeat(rest, self.vocab, 1)
        np.put_along_axis(probabilities, first, np.maximum(odds, 1e-4), 1)
        return torch.from_numpy(np.log(probabilities))


@dataclass
class Request:
    """One that lives in the simulated engine."""

    name: str
    text: Text
    state: CachedRequestState
    known: int  # tokens of the text that are out
    tree: DraftTree | None = None


@dataclass
class Totals:
    """What a run came to."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0  # of requests
    nodes: int = 0
    draft_forwards: int = 0
    answers: list[tuple[int, float]] = field(default_factory=list)
    """At batch 1: tokens of each answer after the first, and seconds they took."""


class SimulatedEngine:
    """Serves the requests of a trace, ``batch`` at a time, as vLLM's scheduler would.

    Args:
        trace: requests.
        costs: what forwards cost.
        batch: most requests at a time.
        options: of the plugin; None runs without it.
        nodes: num_speculative_tokens.
    """

    def __init__(
        self,
        trace: Trace,
        costs: Costs,
        batch: int,
        options: dict[str, Any] | None,
        nodes: int = 26,
    ) -> None:
        self.trace, self.costs, self.batch = trace, costs, batch
        self.watch, self.totals = Watch(), Totals()
        self.live: list[Request] = []
        self.proposer = None
        if options is None:
            return
        draft = None
        if options.get("draft_model") is not None:
            self.draft = draft = ReplayedDraft(trace.vocab, costs, self.watch)
        config: Any = SimpleNamespace(
            additional_config={"ouroboros": options},
            num_speculative_tokens=nodes,
            model_config=SimpleNamespace(
                max_model_len=MAX_LEN,
                get_vocab_size=lambda: 2**31 - 1,
                seed=0,
                try_get_generation_config=lambda: {"eos_token_id": trace.eos},
                hf_text_config=SimpleNamespace(to_dict=dict),
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            scheduler_config=SimpleNamespace(max_num_seqs=batch, max_num_batched_tokens=8192),
        )
        clock: Any = StepClock(now=self.watch)
        stand_in: Any = draft
        self.proposer = OuroborosProposer(config, draft=stand_in, clock=clock)
        self.runner: Any = SimpleNamespace(device=torch.device("cpu"), forwards_overlap=False)
        nothing: Any = SimpleNamespace(processors=SimpleNamespace(all=[]))
        self.proposer.bind(self.runner, nothing)
        if self.proposer.rounds is not None:
            self.proposer.rounds.cache.allocate(batch)
        if self.proposer.config.adaptive:
            self.proposer.set_policy(Policy(costs))

    def run(self) -> Totals:
        """Serve all requests."""
        waiting = [*reversed(self.trace.texts)]
        while waiting or self.live:
            while waiting and len(self.live) < self.batch:
                self._admit(waiting.pop(), len(self.trace.texts) - len(waiting))
            began = self.live[0].known > 0
            before = self.totals.tokens, self.watch.seconds
            self._step()
            if self.batch == 1:
                self._count_answer(began, *before)
        self.totals.seconds = self.watch.seconds
        if self.proposer is not None:
            self.totals.draft_forwards = self.proposer.counters.draft_forwards
        return self.totals

    def _count_answer(self, began: bool, tokens: int, seconds: float) -> None:
        """Count a step that began with so many tokens and seconds; one that reads a prompt not."""
        if not began:
            self.totals.answers.append((0, 0.0))
            return
        count, spent = self.totals.answers[-1]
        count, spent = count + self.totals.tokens - tokens, spent + self.watch.seconds - seconds
        self.totals.answers[-1] = count, spent

    def _admit(self, text: Text, number: int) -> None:
        params = SamplingParams(
            temperature=0, max_tokens=len(text.tokens) - text.prompt, ignore_eos=True
        )
        prompt = text.tokens[: text.prompt].tolist()
        state = CachedRequestState(
            req_id=str(number), prompt_token_ids=prompt, mm_features=[], sampling_params=params,
            generator=None, block_ids=([],), num_computed_tokens=0, output_token_ids=[],
        )  # fmt: skip
        self.live.append(Request(str(number), text, state, 0))
        if self.proposer is not None:
            self.proposer.requests.admit(str(number), state, 0, None)

    def _step(self) -> None:
        """One target forward for all requests, prompts included, and their next drafts."""
        rows = 0
        emitted: list[list[int]] = []
        verified: dict[str, Verified] = {}
        for request in self.live:
            rows += 1 if request.known else request.text.prompt
            size = len(request.tree.tokens) if request.tree is not None else 0
            rows, self.totals.nodes = rows + size, self.totals.nodes + size
            emitted.append(self._verify(request, verified))
            request.known += len(emitted[-1])
        self.totals.tokens += sum(map(len, emitted))
        self.totals.steps += len(emitted)
        forward = self.costs.target.at(rows)
        self.watch.seconds += forward + self.costs.overhead
        if self.proposer is not None:
            self.proposer.forward_seconds = forward
            self._propose(self.proposer, emitted, verified)
        for request in [*self.live]:
            if request.known == len(request.text.tokens):
                self.live.remove(request)
                if self.proposer is not None:
                    self.proposer.requests.forget(request.name)

    def _verify(self, request: Request, verified: dict[str, Verified]) -> list[int]:
        """Walk the tree along the text; the tokens that come out."""
        text, tree = request.text, request.tree
        if request.known == 0:
            request.known = text.prompt
            return [int(text.tokens[text.prompt])]
        at, node = request.known, ROOT
        tokens = [int(text.tokens[at])]
        if tree is None:
            return tokens
        path: list[int] = []
        while at + len(tokens) < len(text.tokens):
            node = child_of(tree.tokens, tree.parents, len(tree.tokens), node, tokens[-1])
            if node < 0:
                break
            path.append(node)
            tokens.append(int(text.tokens[at + len(tokens)]))
        predicted = self._predicted(text, tree, at)
        predicted[[0, *(np.array(path, np.int64) + 1)]] = tokens
        verified[request.name] = Verified(tree, np.array(path, np.int32), predicted)
        return tokens

    @staticmethod
    def _predicted(text: Text, tree: DraftTree, at: int) -> np.ndarray:
        """What the target would say behind each node: the draft model's word, for want of it."""
        depths = np.zeros(len(tree.tokens) + 1, np.int64)
        for node, parent in enumerate(tree.parents.tolist()):
            depths[node + 1] = depths[parent + 1] + 1
        places = np.minimum(at - 1 + depths, len(text.tokens) - 1)
        return text.first[places, 0].astype(np.int64)

    def _propose(self, proposer: OuroborosProposer, emitted, verified) -> None:
        size = len(self.live)
        lengths = np.array([request.known for request in self.live], np.int32)
        token_ids = np.zeros((size, MAX_LEN), np.int32)
        for row, request in enumerate(self.live):
            token_ids[row, : request.known] = request.text.tokens[: request.known]
            request.state.output_token_ids += emitted[row]
        prompts = np.array([request.text.prompt for request in self.live])
        table = SimpleNamespace(np=np.arange(size, dtype=np.int32)[:, None])
        blocks = SimpleNamespace(
            block_size=MAX_LEN, num_blocks_per_row=np.ones(size, np.int32), block_table=table
        )
        self.runner.input_batch = SimpleNamespace(
            req_ids=[request.name for request in self.live],
            num_prompt_tokens=prompts,
            num_computed_tokens_cpu=lengths - [len(tokens) for tokens in emitted],
            block_table=[blocks],
            sampling_metadata=None,
        )
        self.runner.verified = verified
        self.runner.scheduled_tokens = {request.name: 1 for request in self.live}
        if proposer.draft is not None:
            self.draft.live = [request.text for request in self.live]
        proposer.propose(emitted, lengths, token_ids)
        for request in self.live:
            request.tree = proposer.requests[request.name].tree
            if request.tree is not None and not len(request.tree.tokens):
                request.tree = None
