"""Expanding a draft head's tree, level by level, at its likeliest nodes beside the chain.

A head costs little more with a few rows than with one. So a round that asks for the chain's next
token also asks what follows the alternatives beside the chain, and what follows those, where the
nodes are most likely to be verified (the expansion of EAGLE-2's dynamic trees, arXiv 2406.16858).
Such a node must not see the chain beyond its alternative's place, and its own path has no KV: for
attention the path is a request of its own, with the same blocks and less context.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ouroboros.trees.request_state import RequestState
from vllm_ouroboros.trees.round_rows import Round

MAX_EXPANDED = 4
"""Nodes of a request that a round expands."""
MAX_PATHS = 12
"""Alternatives of a request, in a step, that are expanded at all."""


class Expansion(NamedTuple):
    """Nodes that a round expands, M of them; a node's path leads from an alternative to it."""

    requests: np.ndarray  # int64 [M], among those of the round
    slots: np.ndarray  # int64 [M]
    places: np.ndarray  # int64 [M], of the alternatives in the chain
    ranks: np.ndarray  # int64 [M], of the alternatives
    lengths: np.ndarray  # int64 [M], tokens of the paths, the alternatives included
    order: np.ndarray  # int64 [M], of a request's nodes, the likeliest first

    @property
    def rows(self) -> int:
        """That a forward has for them."""
        return int(self.lengths.sum())

    @classmethod
    def choose(
        cls, state: RequestState, slots: np.ndarray, most: int, threshold: float, stops: np.ndarray
    ) -> Expansion:
        """The nodes that are likeliest by the head's own probabilities.

        Args:
            state: chains, alternatives and what follows them.
            slots: int64 [R].
            most: of a request.
            threshold: probability that a node must have.
            stops: ids that end a text.
        """
        chain = state.chain_len[slots]
        deepest = int(chain.max(initial=0))
        alternatives = state.alternatives[slots, :deepest]
        following = state.following[slots, :deepest]
        reached = np.ones((len(slots), deepest))
        reached[:, 1:] = state.confidence[slots, :deepest].cumprod(1)[:, :-1]
        scores = reached[:, :, None] * state.alternative_probs[slots, :deepest]
        scores *= np.where(following >= 0, state.following_probs[slots, :deepest], 1.0).prod(3)
        levels = (following >= 0).sum(3)
        # the chain before an alternative must be in the KV cache
        known = np.minimum(chain, state.cached[slots] - state.committed[slots] + 1)
        able = np.arange(deepest) < known[:, None]
        able = able[:, :, None] & (alternatives >= 0) & (levels < following.shape[3])
        able &= ~np.isin(alternatives, stops) & ~np.isin(following, stops).any(3)
        numbers = state.expanded[slots, :deepest]
        begun = np.where(np.arange(deepest)[:, None] < chain[:, None, None], numbers, -1)
        full = begun.max((1, 2), initial=-1) + 1 + most > MAX_PATHS
        scores[~able | (full[:, None, None] & (levels == 0))] = 0.0
        flat = scores.reshape(len(slots), -1)
        best = np.argsort(-flat, axis=1, kind="stable")[:, :most]
        requests, order = np.nonzero(np.take_along_axis(flat, best, 1) > threshold)
        at = best[requests, order]
        places, ranks = np.divmod(at, alternatives.shape[2])
        lengths = 1 + levels.reshape(len(slots), -1)[requests, at]
        return cls(requests, slots[requests], places, ranks, lengths, order)

    def first(self, most: int) -> Expansion:
        """So many nodes of each request."""
        kept = self.order < most
        return Expansion(*(array[kept] for array in self))

    def number(self, state: RequestState) -> np.ndarray:
        """Numbers int64 [M] of the paths' alternatives; those that had none get one."""
        for node in zip(self.slots, self.places, self.ranks, strict=True):
            if state.expanded[node] < 0:
                slot = node[0]
                state.expanded[node] = 1 + state.expanded[slot, : state.chain_len[slot]].max()
        return state.expanded[self.slots, self.places, self.ranks].astype(np.int64)

    def add_to(self, round_: Round, total: int, state: RequestState) -> Round:
        """A round of ``total`` rows with those of the paths behind them, a request each."""
        requests, rows = len(round_.context_lens), self.rows
        context_lens = (state.committed[self.slots] + self.places).astype(np.int32)
        owner = np.repeat(np.arange(len(self.slots)), self.lengths)
        level = np.arange(rows) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        node = self.slots[owner], self.places[owner], self.ranks[owner]
        before = np.maximum(level - 1, 0)
        following = state.following[
            self.slots[owner], self.places[owner], self.ranks[owner], before
        ]
        tokens = np.where(level == 0, state.alternatives[node], following)
        starts = (total + np.cumsum(self.lengths)).astype(np.int32)
        positions = (context_lens[owner] + level).astype(np.int64)
        return round_._replace(
            tokens=np.concatenate([round_.tokens[:total], tokens.astype(np.int32)]),
            parents=np.concatenate([round_.parents[:total], (level - 1).astype(np.int32)]),
            positions=np.concatenate([round_.positions[:total], positions]),
            writes=np.concatenate([round_.writes[:total], np.full(rows, -1, np.int64)]),
            query_start_loc=np.concatenate([round_.query_start_loc[: requests + 1], starts]),
            context_lens=np.concatenate([round_.context_lens, context_lens]),
        )

    def record(self, state: RequestState, tokens: np.ndarray, probs: np.ndarray) -> None:
        """The head's tokens int [M] after the nodes, and their probabilities float [M]."""
        node = self.slots, self.places, self.ranks, self.lengths - 1
        state.following[node] = tokens
        state.following_probs[node] = probs
