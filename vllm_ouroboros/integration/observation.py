"""What a verified step teaches: phrases, rates, counters, valid draft KV, features for a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_ouroboros.draft.head import DraftHead
from vllm_ouroboros.integration.deferred import Deferred
from vllm_ouroboros.integration.live_requests import LiveRequests, Request
from vllm_ouroboros.metrics.counters import Counters
from vllm_ouroboros.policy.controller import Policy
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.drafting import Drafting

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_ouroboros.verify.acceptance import Verified


class Observation:
    """Learns from steps.

    Args:
        drafting: gets phrases, and keeps the draft KV that is valid.
        requests: whose steps these are.
        counters: count them.
        deferred: takes what no draft waits for.
    """

    def __init__(
        self, drafting: Drafting, requests: LiveRequests, counters: Counters, deferred: Deferred
    ) -> None:
        self.drafting, self.requests = drafting, requests
        self.counters, self.deferred = counters, deferred

    def learn(
        self,
        runner: GPUModelRunner,
        emitted: list[list[int]],
        token_ids: np.ndarray,
        policy: Policy | None,
    ) -> None:
        """Learn from the step that was just verified.

        Args:
            runner: knows the batch, and what was verified of each request.
            emitted: tokens of each request; none in the middle of a prompt.
            token_ids: int32 [*, max_model_len], their texts.
            policy: learns rates of acceptance.
        """
        self.deferred.catch_up()  # of a step whose forward never came
        committed = self.drafting.state.committed
        slots: list[int] = []
        roots: list[int] = []
        trees: list[DraftTree] = []
        predicted: list[np.ndarray] = []
        for row, tokens in enumerate(emitted):
            if not tokens:
                continue
            req_id = runner.input_batch.req_ids[row]
            request = self.requests[req_id]
            found = runner.verified.get(req_id)
            self._count(request, tokens, found)
            if found is not None:
                slots.append(request.slot)
                roots.append(int(token_ids[row, committed[request.slot] - 1]))
                trees.append(found.tree)
                predicted.append(found.predicted)
            if policy is not None and request.grown_tree is not None:
                text, size = np.array(tokens, np.int32), len(found.tree.tokens) if found else 0
                self.deferred.call(
                    policy.learn, request.slot, request.grown_tree, size, request.phrase_tree,
                    text, policy.step_class(request.slot),
                )  # fmt: skip
            self.drafting.settle(request.slot, tokens)
            request.drop_drafts()
        self.drafting.learn(slots, roots, trees, predicted)

    def pass_by(self, runner: GPUModelRunner, emitted: list[list[int]]) -> None:
        """Count a step in a pause, and learn nothing; arguments as for `learn`. Trees in it are of
        requests that were in no batch when drafting failed.
        """
        for req_id, tokens in zip(runner.input_batch.req_ids, emitted, strict=False):
            if tokens:
                request = self.requests[req_id]
                self._count(request, tokens, runner.verified.get(req_id))
                request.drop_drafts()

    def _count(self, request: Request, tokens: list[int], found: Verified | None) -> None:
        """Count a step of a request, and what was verified in it."""
        counters = self.counters
        counters.steps += 1
        counters.emitted_tokens += len(tokens)
        sources = [0] * len(tokens)
        if found is not None:
            accepted = found.tree.sources[found.path].tolist()
            sources[: len(accepted)] = accepted
            expected = request.expects(found.tree)
            counters.count_tree(found.tree.sources.tolist(), accepted, expected)
        if self.requests.tracing:
            request.origins.extend(sources)


def keep_features(head: DraftHead, requests: LiveRequests, runner: GPUModelRunner) -> None:
    """Hand the features of a step's text to the draft head: prompts and accepted rows."""
    batch = runner.input_batch
    rows: list[np.ndarray] = []
    first = 0
    for req_id in batch.req_ids:
        scheduled = runner.scheduled_tokens[req_id]
        text = first + np.arange(scheduled - runner.drafted_tokens.get(req_id, 0))
        found = runner.verified.get(req_id)
        rows.append(text if found is None else np.append(text, text[-1] + 1 + found.path))
        first += scheduled
    slots = np.array([requests[req_id].slot for req_id in batch.req_ids])
    firsts = batch.num_computed_tokens_cpu[: len(slots)].astype(np.int64)
    counts = np.array([len(some) for some in rows])
    head.keep_text(slots, firsts, counts, runner.hidden_states, np.concatenate(rows))
