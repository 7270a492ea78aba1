"""Graphs of draft forwards, with a forward and a capture that stand in for a device's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_cases import random_trees
from cuda_steps import step_of

from vllm_ouroboros.draft.cuda_graphs import SIZES, DraftGraphs
from vllm_ouroboros.trees.draft_tree import step_mask
from vllm_ouroboros.verify.cuda.tree_step import StaticSteps


@pytest.mark.parametrize("most", [3, 100])
def test_graphs_of_draft_forwards(device, most: int) -> None:
    """The smallest graph that has room, with the step in its buffers and padding behind it."""
    seen = []

    def forward(step, tokens, positions, slots, features):
        seen.append((len(tokens), slots.tolist(), step.query_start_loc.tolist()))
        result = tokens[:, None] + 1000.0 * positions[:, None]
        return result, 2 * features, step.depths().clone()

    def capture(function):
        results = function()

        def replay() -> None:
            for result, found in zip(results, function(), strict=True):
                result.copy_(found)

        return replay, results

    static = StaticSteps(torch.device(device), most, SIZES[-1], 70, 64)
    graphs = DraftGraphs(static, 2, capture, forward, [torch.zeros(SIZES[-1], 3, device=device)])
    graphs.capture()
    assert sorted(size for size, *_ in seen) == sorted(SIZES)
    for sizes in ([20, 14], [3], [30, 30, 30]):
        parents, starts = random_trees(sizes, 0)
        total = int(starts[-1])
        step = step_of(
            device, starts, np.array(sizes, np.int32),
            torch.ones(len(sizes), 2, dtype=torch.int32, device=device), step_mask(parents, starts),
        )  # fmt: skip
        assert graphs.fits(step)
        places = torch.arange(total, device=device)
        features = torch.rand(total, 3, device=device)
        got, doubled, depth = graphs.replay(step, places.int(), places + 1, places + 5, features)
        assert doubled.equal(2 * features) and depth.equal(step.depths())
        assert got[:, 0].tolist() == [i + 1000.0 * (i + 1) for i in range(total)]
        size, slots, query_start_loc = seen[-1]
        assert size == min(s for s in SIZES if s >= total)
        assert slots == [*range(5, 5 + total)] + [-1] * (size - total)
        requests = min(most, size)  # a graph of few rows has few requests
        assert query_start_loc == [*starts.tolist()] + [total] * (requests - len(sizes))
        assert graphs.block_table[: len(sizes)].eq(1).all()
    parents, starts = random_trees([71], 0)
    wide = step_of(
        device, starts, np.array([1], np.int32), torch.ones(1, 2), np.zeros((71, 4), np.int32)
    )
    assert not graphs.fits(wide)
