"""The trees of a batch as a few arrays, to be sent to other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_ouroboros.trees.draft_tree import DraftTree

Packed = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pack_trees(trees: Sequence[DraftTree | None]) -> Packed:
    """Sizes int32 [R] (-1: no tree), and tokens, parents and sources int32 of all, one by one."""
    sizes = [-1 if tree is None else len(tree.tokens) for tree in trees]
    some = [tree for tree in trees if tree is not None]
    empty = np.empty(0, np.int32)
    return (
        np.array(sizes, np.int32),
        np.concatenate([empty, *(tree.tokens for tree in some)]),
        np.concatenate([empty, *(tree.parents for tree in some)]),
        np.concatenate([empty, *(tree.sources for tree in some)]),
    )


def unpack_trees(
    sizes: np.ndarray, tokens: np.ndarray, parents: np.ndarray, sources: np.ndarray
) -> list[DraftTree | None]:
    """What `pack_trees` packed, but for what a policy knows of nodes."""
    ends = np.cumsum(np.maximum(sizes, 0)).tolist()
    return [
        None
        if size < 0
        else DraftTree(
            tokens[end - size : end], parents[end - size : end], sources[end - size : end]
        )
        for size, end in zip(sizes.tolist(), ends, strict=True)
    ]
