"""CUDA graphs of the draft model's masked forwards.

A draft forward is small: without a graph most of its time goes into launching kernels. A graph is
captured for each of some numbers of rows; a forward takes the next larger one, and what is missing
is padding that writes no KV and belongs to no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_ouroboros.verify.cuda.tree_step import StaticSteps

SIZES = (32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
"""Rows of the graphs."""
MAX_GRAPH_ROWS = SIZES[-1]

Forward = Callable[..., torch.Tensor]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]


def capture_cuda(
    vllm_config: VllmConfig,
    stream: torch.cuda.Stream | None,
    forward: Callable[[], torch.Tensor],
) -> tuple[Replay, torch.Tensor]:
    """A forward as a CUDA graph: how to run it again, and where its results lie.

    Its memory is of the pool of vLLM's own graphs, which sleep mode may move off the device.

    Args:
        vllm_config: of the draft model.
        stream: to capture on; None: one of torch's.
        forward: what the graph does.
    """
    forward()  # compiles kernels, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        capture_pool(current_platform.get_global_graph_pool(), vllm_config) as pool,
        torch.cuda.graph(graph, pool=pool, stream=stream),
    ):
        result = forward()
    return graph.replay, result


class DraftGraphs:
    """Captures and replays; a replay takes one copy to the device.

    Args:
        device: where forwards run.
        max_requests: most requests of a forward.
        max_query_len: most rows of one.
        max_context_len: most tokens of one in the KV cache.
        block_table: int32 [*, max_blocks] of the engine's batch.
        capture: makes a graph, as `capture_cuda` does for an engine.
        forward: (step, tokens int32 [T], positions int64 [T], KV slots int64 [T], rows asked for
            int64 [M], further arrays int64 [T]) to a result [M, *].
        padding: what each further array holds where a forward has no row.
    """

    def __init__(
        self,
        device: torch.device,
        max_requests: int,
        max_query_len: int,
        max_context_len: int,
        block_table: torch.Tensor,
        capture: Capture,
        forward: Forward,
        padding: Sequence[int] = (),
    ) -> None:
        rows = SIZES[-1]
        max_requests = min(max_requests, rows)
        self._padding = (0, 0, 0, -1, 0, *padding)
        self._inputs: list[np.ndarray] = [
            np.zeros(max_requests, np.int64),  # rows of the block table
            np.zeros(rows, np.int32),
            *(np.full(rows, value, np.int64) for value in self._padding[2:]),
        ]
        self._static = StaticSteps(
            device, max_requests, rows, max_query_len, max_context_len, self._inputs
        )
        self._block_table, self._forward, self._capture = block_table, forward, capture
        self.graphs: dict[int, tuple[Replay, torch.Tensor]] = {}

    @torch.no_grad()
    def capture(self) -> None:
        """Capture all sizes, the largest first: smaller ones share its memory."""
        for size in reversed(SIZES):
            self.graphs[size] = self._capture(partial(self._run, size))

    def _run(self, size: int) -> torch.Tensor:
        """A forward of so many rows; its step is new, for a graph must hold all that it derives."""
        requests, *inputs = self._static.more
        requests = requests[:size]  # each has a row
        step = self._static.step(len(requests), size, self._block_table[requests])
        return self._forward(step, *(one[:size] for one in inputs))

    def run_again(self, num_rows: int) -> None:
        """Replay the smallest graph with room for so many rows, whatever its buffers hold."""
        self.graphs[_size(num_rows)][0]()

    def fits(self, num_requests: int, mask: np.ndarray) -> bool:
        """Whether there is a graph for so many requests with a mask int32 [T, words]."""
        (rows, words), room = mask.shape, self._static.mask.shape
        return rows <= room[0] and words <= room[1] and num_requests <= len(self._inputs[0])

    def replay(
        self,
        query_start_loc: np.ndarray,
        context_lens: np.ndarray,
        mask: np.ndarray,
        *inputs: np.ndarray,
    ) -> torch.Tensor:
        """The result [M, *] of a forward that `fits`; valid until the next replay.

        Args:
            query_start_loc: int32 [R + 1], first row of each request.
            context_lens: int32 [R], tokens of each in the KV cache.
            mask: int32 [T, words].
            inputs: int64 [R], rows of the block table, then what the forward reads.
        """
        for held, given, value in zip(self._inputs, inputs, self._padding, strict=True):
            held[: len(given)] = given
            held[len(given) :] = value
        self._static.fill(query_start_loc, context_lens, mask, self._inputs)
        replay, result = self.graphs[_size(len(mask))]
        replay()
        return result[: len(inputs[4])]


def _size(num_rows: int) -> int:
    return next(size for size in SIZES if size >= num_rows)
