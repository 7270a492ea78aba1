"""Parts of the runner that need no engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ouroboros.runner import OuroborosRunner, TreeBatch
from vllm_ouroboros.tree import DraftTree


def branching(size: int) -> DraftTree:
    """A root with ``size`` children."""
    return DraftTree(
        np.arange(size, dtype=np.int32), np.full(size, -1, np.int32), np.ones(size, np.int32)
    )


def test_layout_of_a_batch() -> None:
    """A prompt chunk, a tree, a chain with placeholders behind it, another tree."""
    trees = [None, branching(3), DraftTree.chain([4]), branching(2)]
    scheduled = [7, 4, 4, 3]
    batch = TreeBatch(trees, np.array([0, 3, 3, 2]), np.cumsum(scheduled))
    assert batch.rows.tolist() == [0, 1, 5, 9]  # among the sampled rows
    assert batch.starts.tolist() == [6, 7, 11, 15]  # in the forward
    assert batch.branching == [1, 3]
    rows, parents, starts = batch.layout
    assert rows.tolist() == [7, 8, 9, 10, 15, 16, 17]
    assert parents.tolist() == [-1, 0, 0, 0, -1, 0, 0]
    assert starts.tolist() == [0, 4, 7]
    assert starts.dtype == parents.dtype == np.int32


@pytest.mark.parametrize("has_trees", [True, False])
def test_a_step_without_drafts_has_verified_nothing(monkeypatch, has_trees) -> None:
    """What the last step found must not be counted and learned a second time."""
    monkeypatch.setattr(CPUModelRunner, "_sample", lambda self, logits, metadata: "sampled")
    runner = OuroborosRunner.__new__(OuroborosRunner)
    runner.verified = {"a": "old"}
    runner.trees = TreeBatch([None], np.array([0]), np.array([1])) if has_trees else None
    runner.input_batch = SimpleNamespace(sampling_metadata=None)
    assert runner._sample(None, None) == "sampled"
    assert runner.verified == {}
