"""CUDA graphs of the draft model's masked forwards.

A draft forward is small: without a graph most of its time goes into launching kernels. A graph is
captured for each of some numbers of rows; a forward takes the next larger one, and what is missing
is padding that writes no KV and belongs to no request.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from vllm.platforms import current_platform

from vllm_ouroboros.draft.graph_rows import SIZES
from vllm_ouroboros.verify.cuda.tree_step import CUDATreeStep, StaticSteps

Forward = Callable[[CUDATreeStep, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Replay = Callable[[], None]


def capture_cuda(forward: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
    """A forward as a CUDA graph: how to run it again, and where its result lies."""
    forward()  # compiles kernels, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=current_platform.get_global_graph_pool()):
        result = forward()
    return graph.replay, result


class DraftGraphs:
    """Captures and replays.

    Args:
        static: masks and lengths that the graphs read, for at most `MAX_GRAPH_ROWS` rows.
        max_blocks: columns of a block table.
        forward: (step, tokens int32 [T], positions int64 [T], slots int64 [T]) to hidden states
            [T, hidden].
        capture: makes a graph; another one for tests without a device.
    """

    def __init__(
        self,
        static: StaticSteps,
        max_blocks: int,
        forward: Forward,
        capture: Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]] = capture_cuda,
    ) -> None:
        self.static, self._forward, self._capture = static, forward, capture
        device, rows = static.mask.device, len(static.mask)
        self.tokens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.slots = torch.full((rows,), -1, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(
            len(static.context_lens), max_blocks, dtype=torch.int32, device=device
        )
        self.graphs: dict[int, tuple[Replay, torch.Tensor]] = {}

    def capture(self) -> None:
        """Capture all sizes, the largest first: smaller ones share its memory."""
        for size in reversed(SIZES):
            step = self.static.step(len(self.static.context_lens), size, self.block_table)
            args = (step, self.tokens[:size], self.positions[:size], self.slots[:size])
            self.graphs[size] = self._capture(partial(self._forward, *args))

    def fits(self, tree: CUDATreeStep) -> bool:
        """Whether there is a graph for a step."""
        return (
            tree.num_rows <= SIZES[-1]
            and tree.mask.shape[1] <= self.static.mask.shape[1]
            and len(tree.context_lens) <= len(self.static.context_lens)
        )

    def replay(
        self,
        tree: CUDATreeStep,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [T, hidden] of a step that `fits`; valid until the next replay."""
        num_rows, num_requests = tree.num_rows, len(tree.context_lens)
        size = next(size for size in SIZES if size >= num_rows)
        replay, result = self.graphs[size]
        self.tokens[:num_rows].copy_(tokens)
        self.positions[:num_rows].copy_(positions)
        self.slots[:num_rows].copy_(slots)
        self.slots[num_rows:size].fill_(-1)
        self.block_table[:num_requests, : tree.block_table.shape[1]].copy_(tree.block_table)
        self.static.copy(tree)
        replay()
        return result[:num_rows]
