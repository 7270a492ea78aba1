"""The state of drafting, for all requests, in arrays indexed by slot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BRANCHES = (3, 3, 2, 1)
"""Branches beside the chain that a request which samples may have, by their place in the chain.
Tuned on HumanEval prompts at temperature 1 by scripts/bench/bench_sampling.py."""
NUM_ALTERNATIVES = 3
"""A, top-k alternatives of the draft model that are kept at each place of the chain."""
NUM_FOLLOWING = 3
"""F, tokens that a draft head may draft after an alternative."""


class RequestState(NamedTuple):
    """State of S requests; B is the node budget, β and W the window's levels and columns, P the
    tokens of the longest prediction so far.
    """

    scope: np.ndarray  # int64 [S], phrases are shared within a scope
    learns: np.ndarray  # bool [S], its text becomes phrases
    predicted: np.ndarray  # int32 [S, P], text that its sender expects
    predicted_len: np.ndarray  # int32 [S], tokens of that; 0: none
    predicted_at: np.ndarray  # int32 [S], place of the one that should come next
    predicted_run: np.ndarray  # int32 [S], tokens that came as predicted, up to there
    predicted_seen: np.ndarray  # int32 [S], tokens of the text that were compared with it
    owner: np.ndarray  # int32 [S], number of the request, as `PoolArrays.owners` has it
    committed: np.ndarray  # int32 [S], tokens n of the text
    cached: np.ndarray  # int32 [S], tokens whose draft KV is valid
    kv_capacity: np.ndarray  # int32 [S], positions that have a draft KV slot
    in_pool: np.ndarray  # int32 [S], tokens of the text that were inserted into the pool
    node_limit: np.ndarray  # int32 [S], nodes that this step may draft
    window: np.ndarray  # int32 [S, β, W]
    window_levels: np.ndarray  # int32 [S], filled levels of the window, 0 before the first round
    chain: np.ndarray  # int32 [S, B]
    predicted_row: np.ndarray  # int32 [S, B], row of its round that predicted each chain token
    confidence: np.ndarray  # float32 [S, B], the draft model's probability of each chain token
    alternatives: np.ndarray  # int32 [S, B, A], its top-k alternatives at each place, or -1
    alternative_probs: np.ndarray  # float32 [S, B, A], its probabilities of them
    following: np.ndarray  # int32 [S, B, A, F], the tokens after each of them, then -1
    following_probs: np.ndarray  # float32 [S, B, A, F], its probabilities of those
    expanded: np.ndarray  # int32 [S, B, A], number of an alternative that has been expanded, or -1
    chain_len: np.ndarray  # int32 [S]
    done: np.ndarray  # bool [S], the chain is long enough or ends the text
    chain_only: np.ndarray  # bool [S], the tree must be a chain
    branches: np.ndarray  # int32 [S, D, M], at each place of the chain the next in line, or -1
    branch_next: np.ndarray  # int32 [S, D, M], the token after each of them, or -1
    tokens: np.ndarray  # int32 [S, B], the tree: see DraftTree
    parents: np.ndarray  # int32 [S, B]
    sources: np.ndarray  # int32 [S, B]
    size: np.ndarray  # int32 [S]

    @classmethod
    def empty(cls, slots: int, budget: int, phrase_len: int, window_size: int) -> RequestState:
        """State of S slots, all free."""
        branches = (slots, len(BRANCHES), max(BRANCHES))
        return cls(
            scope=np.zeros(slots, np.int64),
            learns=np.ones(slots, np.bool_),
            predicted=np.zeros((slots, 1), np.int32),
            predicted_len=np.zeros(slots, np.int32),
            predicted_at=np.zeros(slots, np.int32),
            predicted_run=np.zeros(slots, np.int32),
            predicted_seen=np.zeros(slots, np.int32),
            owner=np.zeros(slots, np.int32),
            committed=np.zeros(slots, np.int32),
            cached=np.zeros(slots, np.int32),
            kv_capacity=np.zeros(slots, np.int32),
            in_pool=np.zeros(slots, np.int32),
            node_limit=np.zeros(slots, np.int32),
            window=np.zeros((slots, phrase_len, window_size), np.int32),
            window_levels=np.zeros(slots, np.int32),
            chain=np.zeros((slots, budget), np.int32),
            predicted_row=np.zeros((slots, budget), np.int32),
            confidence=np.zeros((slots, budget), np.float32),
            alternatives=np.full((slots, budget, NUM_ALTERNATIVES), -1, np.int32),
            alternative_probs=np.zeros((slots, budget, NUM_ALTERNATIVES), np.float32),
            following=np.full((slots, budget, NUM_ALTERNATIVES, NUM_FOLLOWING), -1, np.int32),
            following_probs=np.zeros((slots, budget, NUM_ALTERNATIVES, NUM_FOLLOWING), np.float32),
            expanded=np.full((slots, budget, NUM_ALTERNATIVES), -1, np.int32),
            chain_len=np.zeros(slots, np.int32),
            done=np.zeros(slots, np.bool_),
            chain_only=np.zeros(slots, np.bool_),
            branches=np.full(branches, -1, np.int32),
            branch_next=np.full(branches, -1, np.int32),
            tokens=np.zeros((slots, budget), np.int32),
            parents=np.zeros((slots, budget), np.int32),
            sources=np.zeros((slots, budget), np.int32),
            size=np.zeros(slots, np.int32),
        )
