"""Trees as arrays and back."""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.packing import pack_trees, unpack_trees


def tree(*tokens: int) -> DraftTree:
    size = len(tokens)
    ids, parents = np.array(tokens, np.int32), np.arange(-1, size - 1, dtype=np.int32)
    return DraftTree(ids, parents, np.full(size, 2, np.int32))


def test_trees_come_back() -> None:
    trees = [tree(5, 6, 7), None, tree(), tree(8)]
    found = unpack_trees(*pack_trees(trees))
    for one, other in zip(trees, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            for mine, theirs in zip(one[:3], other[:3], strict=True):
                assert mine.tolist() == theirs.tolist()
                assert theirs.dtype == np.int32


def test_a_batch_without_trees() -> None:
    assert unpack_trees(*pack_trees([None, None])) == [None, None]
    assert unpack_trees(*pack_trees([])) == []
