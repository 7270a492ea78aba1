"""The draft model's KV cache: which of the shared blocks it has filled, and catching up on text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_ouroboros.draft.forward_rows import ForwardRows
from vllm_ouroboros.draft.model import DraftModel
from vllm_ouroboros.trees.drafting import Drafting

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class CatchUp(NamedTuple):
    """A request whose text should get draft KV."""

    slot: int
    row: int  # of the runner's batch
    end: int  # tokens that the draft model should know


class DraftCache:
    """Draft KV lies in the blocks that vLLM manages for the target, but is written on its own.

    A request for which nothing is drafted costs the draft model nothing: it does not read its text.
    When such a block serves another request as a cached prefix, the draft model has to know.

    Args:
        draft: the loaded draft model.
        drafting: knows for each slot how many tokens have draft KV.
        max_rows: rows that one forward may have.
        forward: runs the draft model on (runner, rows, mask), see `DraftModel.forward`.
    """

    def __init__(
        self,
        draft: DraftModel,
        drafting: Drafting,
        max_rows: int,
        forward: Callable[..., torch.Tensor],
    ) -> None:
        self.draft, self.drafting, self.max_rows = draft, drafting, max_rows
        self._forward = forward
        self._complete = np.zeros(0, np.bool_)  # by block: all of its positions have draft KV

    def allocate(self, blocks: int) -> None:
        """There are so many blocks, and none of them has draft KV."""
        self._complete = np.zeros(blocks, np.bool_)

    def forget(self) -> None:
        """No block has sound draft KV."""
        self._complete.fill(False)

    def capacity(self, runner: GPUModelRunner, row: int) -> int:
        """Positions of a request that have a draft KV slot."""
        table = runner.input_batch.block_table[self.draft.kv_cache_gid]
        return min(int(table.num_blocks_per_row[row]) * table.block_size, self.draft.max_len)

    def prefix(self, runner: GPUModelRunner, row: int, computed: int) -> int:
        """How many of the first ``computed`` tokens of a row, cached by vLLM, have draft KV."""
        ids, size = self._blocks(runner, row)
        missing = np.flatnonzero(~self._complete[ids[: -(-computed // size)]])
        return int(missing[0]) * size if len(missing) else computed

    def invalidate(self, runner: GPUModelRunner) -> None:
        """The target wrote its rows of this step: draft KV in their blocks is of other text."""
        batch = runner.input_batch
        for row, req_id in enumerate(batch.req_ids):
            ids, size = self._blocks(runner, row)
            start = int(batch.num_computed_tokens_cpu[row])
            end = start + runner.scheduled_tokens[req_id]
            self._complete[ids[start // size : -(-end // size)]] = False

    def mark_complete(self, runner: GPUModelRunner, read: list[CatchUp]) -> None:
        """Note which blocks of some requests are filled with draft KV of their text."""
        for slot, row, end in read:
            ids, size = self._blocks(runner, row)
            self._complete[ids[: min(int(self.drafting.state.cached[slot]), end) // size]] = True

    def _blocks(self, runner: GPUModelRunner, row: int) -> tuple[np.ndarray, int]:
        """Ids of a row's blocks, and how many tokens each holds."""
        table = runner.input_batch.block_table[self.draft.kv_cache_gid]
        ids = table.block_table.np[row, : table.num_blocks_per_row[row]]
        return ids, int(table.block_size)

    def catch_up(
        self, runner: GPUModelRunner, behind: list[CatchUp], token_ids: np.ndarray, lag: int
    ) -> None:
        """Fill draft KV that is more than ``lag`` tokens behind, in plain causal forwards."""
        cached = self.drafting.state.cached
        chunks: list[list[tuple[int, int, int, int]]] = [[]]  # slot, row, start, end
        room = self.max_rows
        for slot, row, end in behind:
            start, end = int(cached[slot]), min(end, self.capacity(runner, row))
            if end - start <= lag:
                continue
            while start < end:
                take = min(end - start, room)
                chunks[-1].append((slot, row, start, start + take))
                start, room = start + take, room - take
                if room == 0:
                    chunks.append([])
                    room = self.max_rows
        for chunk in filter(None, chunks):
            positions = np.concatenate([np.arange(s, e) for _, _, s, e in chunk])
            lengths = [end - start for _, _, start, end in chunk]
            rows = ForwardRows(
                np.array([slot for slot, _, _, _ in chunk], np.int64),
                np.array([row for _, row, _, _ in chunk], np.int64),
                np.concatenate([token_ids[row, s:e] for _, row, s, e in chunk]),
                positions,
                positions,
                np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                np.array([s for _, _, s, _ in chunk], np.int32),
                np.empty(0, np.int64),
            )
            self._forward(runner, rows, None)
            for slot, _, _, end in chunk:
                cached[slot] = end
