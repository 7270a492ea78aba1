"""CUDA graphs of the draft model's masked forwards.

A draft forward is small: without a graph most of its time goes into launching kernels. A graph is
captured for each of some numbers of rows; a forward takes the next larger one, and what is missing
is padding that writes no KV and belongs to no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from vllm.compilation.cudagraph_pool import capture_pool
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_ouroboros.verify.cuda.tree_step import CUDATreeStep, StaticSteps

SIZES = (32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
"""Rows of the graphs."""
MAX_GRAPH_ROWS = SIZES[-1]

Outputs = tuple[torch.Tensor, ...]
Forward = Callable[..., Outputs]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Outputs]], tuple[Replay, Outputs]]


def capture_cuda(vllm_config: VllmConfig, forward: Callable[[], Outputs]) -> tuple[Replay, Outputs]:
    """A forward as a CUDA graph: how to run it again, and where its results lie.

    Its memory is of the pool of vLLM's own graphs, which sleep mode may move off the device.
    """
    forward()  # compiles kernels, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with (
        capture_pool(current_platform.get_global_graph_pool(), vllm_config) as pool,
        torch.cuda.graph(graph, pool=pool),
    ):
        result = forward()
    return graph.replay, result


class DraftGraphs:
    """Captures and replays.

    Args:
        static: masks and lengths that the graphs read, for at most `MAX_GRAPH_ROWS` rows.
        max_blocks: columns of a block table.
        capture: makes a graph, as `capture_cuda` does for an engine.
        forward: (step, tokens int32 [T], positions int64 [T], slots int64 [T], and what else the
            model reads) to what it computes, all by row.
        more: buffers of `MAX_GRAPH_ROWS` rows for what else it reads.
    """

    def __init__(
        self,
        static: StaticSteps,
        max_blocks: int,
        capture: Capture,
        forward: Forward,
        more: Sequence[torch.Tensor] = (),
    ) -> None:
        self.static, self._forward, self._capture = static, forward, capture
        device, rows = static.mask.device, len(static.mask)
        self.slots = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.inputs = (
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            self.slots,
            *more,
        )
        self.block_table = torch.zeros(
            len(static.context_lens), max_blocks, dtype=torch.int32, device=device
        )
        self.graphs: dict[int, tuple[Replay, Outputs]] = {}

    @torch.no_grad()
    def capture(self) -> None:
        """Capture all sizes, the largest first: smaller ones share its memory."""
        for size in reversed(SIZES):
            self.graphs[size] = self._capture(partial(self._run, size))

    def _run(self, size: int) -> Outputs:
        """A forward of so many rows; its step is new, for a graph must hold all that it derives."""
        requests = min(len(self.static.context_lens), size)  # each has a row
        step = self.static.step(requests, size, self.block_table)
        return self._forward(step, *(one[:size] for one in self.inputs))

    def run_again(self, num_rows: int) -> None:
        """Replay the smallest graph with room for so many rows, whatever its buffers hold."""
        self.graphs[next(size for size in SIZES if size >= num_rows)][0]()

    def fits(self, tree: CUDATreeStep) -> bool:
        """Whether there is a graph for a step."""
        return (
            tree.num_rows <= SIZES[-1]
            and tree.mask.shape[1] <= self.static.mask.shape[1]
            and len(tree.context_lens) <= len(self.static.context_lens)
        )

    def replay(self, tree: CUDATreeStep, *inputs: torch.Tensor) -> Outputs:
        """What a step that `fits` computes of its inputs; valid until the next replay."""
        num_rows, num_requests = tree.num_rows, len(tree.context_lens)
        size = next(size for size in SIZES if size >= num_rows)
        replay, results = self.graphs[size]
        for buffer, given in zip(self.inputs, inputs, strict=True):
            buffer[:num_rows].copy_(given)
        self.slots[num_rows:size].fill_(-1)
        self.block_table[:num_requests, : tree.block_table.shape[1]].copy_(tree.block_table)
        self.static.copy(tree)
        replay()
        return tuple(result[:num_rows] for result in results)
