"""Trees, texts and cost curves for tests of the policy and what it stands on."""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.policy.forward_costs import SIZES, CostCurve
from vllm_ouroboros.trees.draft_tree import DraftTree, NodeSource
from vllm_ouroboros.trees.node_kinds import NUM_GRADES, WITHOUT_DRAFT, Evidence, kind_of

SURE = kind_of(NUM_GRADES - 4, Evidence.NONE)
ALONE_COUNTED = kind_of(WITHOUT_DRAFT, Evidence.COUNTED + 6)


def tree_of(tokens: list[int], parents: list[int], kinds: list[int]) -> DraftTree:
    sources = np.full(len(tokens), NodeSource.DRAFT, np.int32)
    return DraftTree(*(np.array(c, np.int32) for c in (tokens, parents)), sources, np.array(kinds))


def text(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def curve(fixed: float, row: float) -> CostCurve:
    return CostCurve(SIZES, [fixed + row * n for n in SIZES])
