"""What a step of drafting does for each request of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_ouroboros.draft.kv_cache import CatchUp
from vllm_ouroboros.integration.live_requests import LiveRequests, Request
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.trees.drafting import Drafting

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class StepRequests(NamedTuple):
    """The requests of a batch by what is to be done for them."""

    prompts: list[CatchUp]  # in the middle of their prompt
    drafted: list[Request]
    rows: list[int]  # of those, in the batch
    lengths: list[int]  # committed tokens of those
    limits: list[int]  # nodes that may be drafted for those
    texts: np.ndarray  # int64 [3, N], slot, row and tokens of all that emitted something
    new: np.ndarray  # int64 [3, M], slot, row and tokens of prompts that were not read yet

    @classmethod
    def of(
        cls,
        runner: GPUModelRunner,
        requests: LiveRequests,
        in_pool: np.ndarray,
        emitted: list[list[int]],
        lengths: np.ndarray,
    ) -> StepRequests:
        """Sort a batch.

        Args:
            runner: holds it.
            requests: by their ids.
            in_pool: int32 by slot, see `RequestState`.
            emitted: tokens of each request of the batch.
            lengths: int32, committed tokens of each.
        """
        batch = runner.input_batch
        prompts: list[CatchUp] = []
        drafted: list[tuple[Request, int, int, int]] = []
        texts: list[tuple[int, int, int]] = []
        new: list[tuple[int, int, int]] = []
        for row, tokens in enumerate(emitted):
            req_id = batch.req_ids[row]
            request = requests[req_id]
            slot, length = request.slot, int(lengths[row])
            if not tokens:
                computed = int(batch.num_computed_tokens_cpu[row])
                if request.speculates:
                    prompts.append(CatchUp(slot, row, computed + runner.scheduled_tokens[req_id]))
                continue
            if in_pool[slot] == 0:
                new.append((slot, row, length - len(tokens)))
            texts.append((slot, row, length))
            limit = requests.room(request, length)
            if request.speculates and limit > 0 and tokens[-1] not in request.sampling.stops:
                drafted.append((request, row, length, limit))
        return cls(
            prompts,
            [one[0] for one in drafted],
            [one[1] for one in drafted],
            [one[2] for one in drafted],
            [one[3] for one in drafted],
            _columns(texts),
            _columns(new),
        )

    def commit(self, drafting: Drafting, token_ids: np.ndarray) -> None:
        """Let the pool learn what was written since the last step."""
        for (slots, rows, ends), source in (
            (self.new, PhraseSource.PROMPT),
            (self.texts, PhraseSource.HISTORY),
        ):
            if len(slots):
                drafting.commit(token_ids, slots, rows, ends, source)


def _columns(rows: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, 3).T
