"""The trees of one forward on a CUDA device: what the Triton kernel reads, and KV to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_ouroboros.kernels.kv_compact import KVLayers, kv_compact
from vllm_ouroboros.kernels.tree_attention import count_depths
from vllm_ouroboros.verify.cuda.static_arrays import StaticArrays
from vllm_ouroboros.verify.host_arrays import to_device
from vllm_ouroboros.verify.tree_step import MaskTensors


@dataclass
class CUDATreeStep:
    """The rows of one forward that attend by masks: its first T, of its first R requests.

    Attributes:
        query_start_loc: int32 [R + 1], first row of each request.
        context_lens: int32 [R], tokens of each request in the KV cache before the step.
        block_table: int32 [R, max_blocks].
        mask: int32 [T, words], see `kernels.reference.tree_attention`.
        max_query_len: most rows of a request, or a bound.
        max_context_len: most committed tokens of a request, or a bound.
        layers: where the KV of the step's layers lies, one table for each geometry.
    """

    query_start_loc: torch.Tensor
    context_lens: torch.Tensor
    block_table: torch.Tensor
    mask: torch.Tensor
    max_query_len: int
    max_context_len: int
    layers: list[KVLayers] = field(default_factory=list)
    _depths: torch.Tensor | None = None

    @classmethod
    def of(
        cls, query_start_loc: np.ndarray, context_lens: np.ndarray, on_device: MaskTensors
    ) -> CUDATreeStep:
        """A step of what is on the device, without a block table yet; the arrays tell bounds."""
        starts, contexts, mask = on_device
        return cls(
            starts, contexts, torch.empty(0), mask, int(np.diff(query_start_loc).max()),
            int(context_lens.max()),
        )  # fmt: skip

    @property
    def num_rows(self) -> int:
        """T, padding of a graph's shape included."""
        return self.mask.shape[0]

    def depths(self) -> torch.Tensor:
        """Depth int32 [T] of each row, counted once a forward."""
        if self._depths is None:
            self._depths = count_depths(self.mask, self.query_start_loc)
        return self._depths

    def write(self, moves: torch.Tensor) -> None:
        """Copy accepted rows to their canonical KV slots, in every layer.

        Args:
            moves: int64 [M, 3] of (request of this step, tree row, position in the text).
        """
        requests, rows, positions = moves.unbind(1)
        starts, contexts = self.query_start_loc.cpu().long(), self.context_lens.cpu().long()
        depth = positions - contexts[requests] - 1
        path = np.full((len(contexts), int(depth.max()) + 1), -1, np.int32)
        path[requests, depth] = rows - starts[requests]
        self.compact(to_device(self.mask.device, path)[0])

    def compact(self, path: torch.Tensor) -> None:
        """The same for paths that are on the device: int32 [R, max_depth], padded with -1; fewer
        than R leave out the last requests.
        """
        requests = len(path)
        for layers in self.layers:
            kv_compact(layers, path, self.context_lens[:requests], self.block_table[:requests])


class StaticSteps:
    """What a captured graph reads: filled anew before each replay, by one copy.

    Args:
        device: where it lies.
        max_requests: most requests of a forward.
        max_rows: most rows of a forward.
        max_query_len: most rows of a request.
        max_context_len: most committed tokens of a request.
        more: what else the graph reads, and what that holds at first.

    Attributes:
        more: the same on the device.
    """

    def __init__(
        self,
        device: torch.device,
        max_requests: int,
        max_rows: int,
        max_query_len: int,
        max_context_len: int,
        more: Sequence[np.ndarray] = (),
    ) -> None:
        self.max_query_len, self.max_context_len = max_query_len, max_context_len
        first = np.zeros(max_requests + 1, np.int32), np.zeros(max_requests, np.int32)
        mask = np.zeros((max_rows, -(-max_query_len // 32)), np.int32)
        self._arrays = StaticArrays(device, [*first, *more, mask])
        self.query_start_loc, self.context_lens, *self.more, self.mask = self._arrays.tensors

    def step(self, num_requests: int, num_rows: int, block_table: torch.Tensor) -> CUDATreeStep:
        """The step of a graph for R requests and T rows; ``block_table`` must be persistent."""
        return CUDATreeStep(
            self.query_start_loc[: num_requests + 1], self.context_lens[:num_requests],
            block_table, self.mask[:num_rows], min(self.max_query_len, num_rows),
            self.max_context_len,
        )  # fmt: skip

    def fill(
        self,
        query_start_loc: np.ndarray,
        context_lens: np.ndarray,
        mask: np.ndarray,
        more: Sequence[np.ndarray] = (),
    ) -> None:
        """Write a batch of fewer requests and rows than a graph has: the others get no rows.

        Args:
            query_start_loc: int32 [R + 1].
            context_lens: int32 [R].
            mask: int32 [T, words], of as many words as it needs.
            more: what else the graph reads, whole.
        """
        starts = np.full(len(self.query_start_loc), query_start_loc[-1], np.int32)
        starts[: len(query_start_loc)] = query_start_loc
        contexts = np.zeros(len(self.context_lens), np.int32)
        contexts[: len(context_lens)] = context_lens
        wide = np.zeros((len(mask), self.mask.shape[1]), np.int32)
        wide[:, : mask.shape[1]] = mask
        self._arrays.fill(starts, contexts, *more, wide)
