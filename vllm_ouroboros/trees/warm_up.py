"""Compiling the loops of `trees` and `phrases` before a request waits for them."""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.draft_tree import depths, step_mask, walk
from vllm_ouroboros.trees.drafting import Drafting
from vllm_ouroboros.trees.node_kinds import NUM_KINDS


def warm_up() -> None:
    """Compile every loop, or load it from numba's cache."""
    drafting = Drafting(
        PhrasePool(64, 2, 2), max_requests=1, budget=4, draft_tokens=2, num_suffixes=1,
        window_size=2, max_len=64, stops=(0,),
    )  # fmt: skip
    text = np.ones((1, 16), np.int32)
    slots = np.zeros(1, np.int64)
    slot = drafting.add()
    drafting.commit(text, slots, slots, slots + 4, PhraseSource.PROMPT)
    drafting.start(slot, 4, 4, 64)
    out, total, _ = drafting.plan(slots, slots, text)
    step_mask(out.parents, out.query_start_loc)
    depths(out.parents, out.query_start_loc, np.zeros(total, np.int64))
    drafting.absorb(slots, out, np.ones(total, np.int64))
    drafting.plan_branches(slots)
    drafting.grow(slots, slots, text, np.ones((1, NUM_KINDS)), 0.5)
    drafting.build(slots, slots, text)
    drafting.check_trees(slots)
    tree = drafting.tree(slot)
    size = len(tree.tokens)
    predicted = np.ones(size + 1, np.int64)
    walk(tree.tokens, tree.parents, size, predicted, np.empty(size, np.int32))
    drafting.learn([slot], [1], [tree], [predicted])
