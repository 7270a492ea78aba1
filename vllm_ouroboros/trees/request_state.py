"""The state of drafting, for all requests, in arrays indexed by slot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Requests(NamedTuple):
    """State of S requests; B is the node budget, β and W the window's levels and columns."""

    scope: np.ndarray  # int64 [S], phrases are shared within a scope
    known: np.ndarray  # int32 [S], committed tokens n
    cached: np.ndarray  # int32 [S], tokens whose draft KV is valid
    capacity: np.ndarray  # int32 [S], positions that have a KV slot
    fed: np.ndarray  # int32 [S], tokens of the text that the pool was fed
    limit: np.ndarray  # int32 [S], nodes that this step may draft
    window: np.ndarray  # int32 [S, β, W]
    levels: np.ndarray  # int32 [S], filled levels of the window, 0 before the first round
    chain: np.ndarray  # int32 [S, B]
    asked: np.ndarray  # int32 [S, B], row of its round that predicted each chain token
    confidence: np.ndarray  # float32 [S, B], the draft model's probability of each chain token
    others: np.ndarray  # int32 [S, B, A], its next best tokens at each place, or -1
    odds: np.ndarray  # float32 [S, B, A], its probabilities of them
    chain_len: np.ndarray  # int32 [S]
    done: np.ndarray  # bool [S], the chain is long enough or ends the text
    narrow: np.ndarray  # bool [S], the tree must be a chain
    branches: np.ndarray  # int32 [S, D, M], at each place of the chain the next in line, or -1
    follow: np.ndarray  # int32 [S, D, M], the token after each of them, or -1
    tokens: np.ndarray  # int32 [S, B], the tree: see DraftTree
    parents: np.ndarray  # int32 [S, B]
    sources: np.ndarray  # int32 [S, B]
    size: np.ndarray  # int32 [S]


BRANCHES = (3, 3, 2, 1)
"""Branches beside the chain that a request which samples may have, by their place in the chain."""
