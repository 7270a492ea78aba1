"""Draft trees: what one target forward verifies for one request.

Nodes are flattened parent first (``parents[i] < i``), so that every prefix of the lists is a tree
again: the scheduler may cut a draft anywhere. The root is the last committed token; it is not a
node. Functions that speak of *rows* count the root as row 0 and node i as row i + 1, the order in
which a forward sees them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from vllm_ouroboros.phrases.compiling import compiled

ROOT = -1


class NodeSource(IntEnum):
    """Who proposed a node."""

    TARGET = 0  # not a node: the token that the target adds after the accepted path
    DRAFT = 1
    SUFFIX = 2
    PREDICTION = 3  # whoever sent the request


class DraftTree(NamedTuple):
    """One request's draft of n nodes."""

    tokens: np.ndarray  # int32 [n]
    parents: np.ndarray  # int32 [n], index of the parent node or ROOT
    sources: np.ndarray  # int32 [n], NodeSource
    kinds: np.ndarray | None = None  # int32 [n], see `node_kinds`; None: unknown

    @classmethod
    def chain(cls, tokens) -> DraftTree:
        """A tree without branches."""
        tokens = np.asarray(tokens, np.int32)
        parents = np.arange(-1, len(tokens) - 1, dtype=np.int32)
        return cls(tokens, parents, np.full(len(tokens), NodeSource.DRAFT, np.int32))

    @property
    def is_chain(self) -> bool:
        """Whether every node continues the one before it."""
        return bool((self.parents == np.arange(-1, len(self.parents) - 1)).all())

    def prefix(self, size: int) -> DraftTree:
        """The tree of the first ``size`` nodes."""
        kinds = None if self.kinds is None else self.kinds[:size]
        return DraftTree(self.tokens[:size], self.parents[:size], self.sources[:size], kinds)


@compiled
def child_of(tokens, parents, size, node, token):
    """The first child of a node (or ROOT) that carries ``token``, or -1."""
    for candidate in range(node + 1, size):
        if parents[candidate] == node and tokens[candidate] == token:
            return candidate
    return -1


@compiled
def grow(tokens, parents, sources, size, budget, parent, phrase, start, length, source):
    """Add a path below ``parent``, sharing the nodes that are already there.

    Stops at ``budget`` nodes. Returns the new size and the last node of the path.
    """
    node = parent
    for i in range(length):
        token = phrase[start + i]
        child = child_of(tokens, parents, size, node, token)
        if child < 0:
            if size >= budget:
                return size, node
            tokens[size] = token
            parents[size] = node
            sources[size] = source
            child = size
            size += 1
        node = child
    return size, node


@compiled
def are_trees(tokens, parents, sizes, vocab_size):
    """Whether the first ``sizes`` int32 [R] of tokens and parents int32 [R, B] are trees of a
    model's tokens.
    """
    for r in range(sizes.shape[0]):
        for i in range(sizes[r]):
            if not 0 <= tokens[r, i] < vocab_size or not -1 <= parents[r, i] < i:
                return False
    return True


@compiled
def walk(tokens, parents, size, predicted, path):
    """Follow the target through a tree; the rule of acceptance.

    ``predicted[row]`` is the token that the target puts after that row. From the root on, a child
    is accepted if and only if it equals the token predicted at its parent. Writes the accepted
    nodes to ``path`` and returns how many there are; the token predicted at the last of them (or
    at the root) is the bonus token.
    """
    node = ROOT
    length = 0
    for candidate in range(size):
        if parents[candidate] == node and tokens[candidate] == predicted[node + 1]:
            path[length] = candidate
            length += 1
            node = candidate
    return length


@compiled
def ancestor_mask(row_parents, query_start_loc, mask):
    """Fill the attention mask of a step from the parent of each row.

    Args:
        row_parents: int32 [T], parent of each row, counted from the first row of its request;
            -1 for a row that only sees the context and itself.
        query_start_loc: int32 [R + 1], first row of each request.
        mask: int32 [T, words], zeroed; bit j of row i is set when row i sees row j of the same
            request, itself included (little-endian words).
    """
    words = mask.shape[1]
    for r in range(query_start_loc.shape[0] - 1):
        first = query_start_loc[r]
        for i in range(query_start_loc[r + 1] - first):
            row = first + i
            parent = row_parents[row]
            if parent >= 0:
                for w in range(words):
                    mask[row, w] = mask[first + parent, w]
            mask[row, i >> 5] |= np.int32(np.uint32(1) << np.uint32(i & 31))


def step_mask(row_parents, query_start_loc) -> np.ndarray:
    """The packed mask int32 [T, words] of a step, wide enough for its largest request.

    Arguments as for `ancestor_mask`; ``row_parents`` may be longer than T.
    """
    widest = int(np.diff(query_start_loc).max())
    mask = np.zeros((int(query_start_loc[-1]), -(-widest // 32)), np.int32)
    ancestor_mask(row_parents, query_start_loc, mask)
    return mask


@compiled
def depths(row_parents, query_start_loc, depth):
    """Depth int64 [T] of each row below the first row of its request; see `ancestor_mask`."""
    for r in range(query_start_loc.shape[0] - 1):
        first = query_start_loc[r]
        for row in range(first, query_start_loc[r + 1]):
            parent = row_parents[row]
            depth[row] = 0 if parent < 0 else depth[first + parent] + 1
