"""Graphs of draft forwards, with a forward and a capture that stand in for a device's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import random_trees

from vllm_ouroboros.draft.cuda_graphs import SIZES, DraftGraphs
from vllm_ouroboros.kernels.tree_attention import count_depths
from vllm_ouroboros.trees.draft_tree import step_mask


def capture(function):
    """A "graph" that calls a function again."""
    result = function()
    return lambda: result.copy_(function()), result


@pytest.mark.parametrize("most", [3, 100])
def test_graphs_of_draft_forwards(device, most: int) -> None:
    """The smallest graph that has room, with the step in its buffers and padding behind it."""
    seen = []

    def forward(step, tokens, positions, slots, asked, further):
        seen.append((
            len(tokens), slots.tolist(), step.query_start_loc.tolist(), step.block_table.tolist(),
            asked.tolist(), further.tolist(),
        ))  # fmt: skip
        columns = [tokens, positions, slots, further, step.depths()]
        return torch.stack([column.double() for column in columns], 1)[asked]

    table = torch.arange(200, dtype=torch.int32, device=device).view(100, 2)
    graphs = DraftGraphs(torch.device(device), most, 70, 64, table, capture, forward, (9,))
    graphs.capture()
    assert sorted(size for size, *_ in seen) == sorted(SIZES)
    rng = np.random.default_rng(0)
    for sizes in ([20, 14], [30, 30, 30], [3]):
        parents, starts = random_trees(sizes, 0)
        total, mask = int(starts[-1]), step_mask(parents, starts)
        assert graphs.fits(len(sizes), mask)
        places, requests = np.arange(total), rng.permutation(100)[: len(sizes)]
        asked = rng.permutation(total)[:5]
        got = graphs.replay(
            starts, np.array(sizes, np.int32), mask, requests, places.astype(np.int32), places + 1,
            places + 5, asked, places + 7,
        )  # fmt: skip
        depths = count_depths(torch.from_numpy(mask), torch.from_numpy(starts)).tolist()
        assert got.tolist() == [[i, i + 1, i + 5, i + 7, depths[i]] for i in asked.tolist()]
        size, slots, query_start_loc, blocks, rows, further = seen[-1]
        assert size == min(s for s in SIZES if s >= total)
        assert slots == [*range(5, 5 + total)] + [-1] * (size - total)
        assert further == [*range(7, 7 + total)] + [9] * (size - total)
        assert rows == asked.tolist() + [0] * (size - len(asked)), "rows that the graph lacks"
        held = min(most, size)  # a graph of few rows has few requests
        assert query_start_loc == [*starts.tolist()] + [total] * (held - len(sizes))
        assert blocks == table[requests].tolist() + [[0, 1]] * (held - len(sizes))
    assert not graphs.fits(1, np.zeros((71, 4), np.int32)), "too wide"
    assert not graphs.fits(1, np.zeros((SIZES[-1] + 1, 1), np.int32)), "too many rows"
    assert not graphs.fits(most + 1, np.zeros((SIZES[-1], 1), np.int32)), "too many requests"
