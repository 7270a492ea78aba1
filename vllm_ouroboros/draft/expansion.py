"""Expanding a draft head's tree: the token after the likeliest of its alternatives.

A head costs little more with a few rows than with one. So a round that asks for the chain's next
token also asks what follows the alternatives beside the chain that are most likely to be verified
(the expansion of EAGLE-2's dynamic trees, arXiv 2406.16858). Such a row must not see the chain
beyond its place: for attention it is a request of its own, with the same blocks and less context.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ouroboros.trees.request_state import RequestState
from vllm_ouroboros.trees.round_rows import Round

MAX_EXPANDED = 4
"""Alternatives of a request that a round expands."""


class Expansion(NamedTuple):
    """Alternatives that a round expands, M of them."""

    requests: np.ndarray  # int64 [M], among those of the round
    slots: np.ndarray  # int64 [M]
    places: np.ndarray  # int64 [M], in the chain
    ranks: np.ndarray  # int64 [M]

    @classmethod
    def choose(
        cls, state: RequestState, slots: np.ndarray, most: int, threshold: float, stops: np.ndarray
    ) -> Expansion:
        """The alternatives that are likeliest by the head's own probabilities.

        Args:
            state: chains and alternatives.
            slots: int64 [R].
            most: of a request.
            threshold: probability that an alternative must have.
            stops: ids that end a text.
        """
        lengths = state.chain_len[slots]
        deepest = int(lengths.max(initial=0))
        alternatives = state.alternatives[slots, :deepest]
        reached = np.ones((len(slots), deepest))
        reached[:, 1:] = state.confidence[slots, :deepest].cumprod(1)[:, :-1]
        scores = reached[:, :, None] * state.alternative_probs[slots, :deepest]
        # the chain before an alternative must be in the KV cache
        known = np.minimum(lengths, state.cached[slots] - state.committed[slots] + 1)
        able = np.arange(deepest) < known[:, None]
        able = able[:, :, None] & (alternatives >= 0) & ~np.isin(alternatives, stops)
        able &= state.alternative_next[slots, :deepest] < 0
        scores[~able] = 0.0
        flat = scores.reshape(len(slots), -1)
        best = np.argsort(-flat, axis=1, kind="stable")[:, :most]
        requests, at = np.nonzero(np.take_along_axis(flat, best, 1) > threshold)
        places, ranks = np.divmod(best[requests, at], alternatives.shape[2])
        return cls(requests, slots[requests], places, ranks)

    def add_to(self, round_: Round, total: int, state: RequestState) -> Round:
        """A round of ``total`` rows with a row for each alternative behind them, a request each."""
        count, requests = len(self.slots), len(round_.context_lens)
        context_lens = (state.committed[self.slots] + self.places).astype(np.int32)
        tokens = state.alternatives[self.slots, self.places, self.ranks]
        starts = total + np.arange(1, count + 1, dtype=np.int32)
        return round_._replace(
            tokens=np.concatenate([round_.tokens[:total], tokens]),
            parents=np.concatenate([round_.parents[:total], np.full(count, -1, np.int32)]),
            positions=np.concatenate([round_.positions[:total], context_lens.astype(np.int64)]),
            writes=np.concatenate([round_.writes[:total], np.full(count, -1, np.int64)]),
            query_start_loc=np.concatenate([round_.query_start_loc[: requests + 1], starts]),
            context_lens=np.concatenate([round_.context_lens, context_lens]),
        )

    def record(self, state: RequestState, tokens: np.ndarray, probs: np.ndarray) -> None:
        """The head's tokens int [M] after the alternatives, and their probabilities float [M]."""
        state.alternative_next[self.slots, self.places, self.ranks] = tokens
        state.alternative_next_probs[self.slots, self.places, self.ranks] = probs
