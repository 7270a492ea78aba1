"""The draft model's probability of the tokens of a chain, and its alternatives at each place."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from vllm_ouroboros.trees.request_state import NUM_ALTERNATIVES, RequestState


def top_alternatives(
    logits: torch.Tensor, ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable token of each row of logits [M, vocab], and its top-k alternatives.

    ``ids`` int64 [vocab] are the tokens of the columns, if these are not all.

    Returns:
        The tokens int64 [M, NUM_ALTERNATIVES + 1], the most probable first, and their
        probabilities float32 of the same shape.
    """
    probs, tokens = logits.float().softmax(-1).topk(min(NUM_ALTERNATIVES + 1, logits.shape[1]))
    found = tokens.numpy(force=True)
    return found if ids is None else ids[found], probs.numpy(force=True)


def record_alternatives(
    state: RequestState,
    slots: np.ndarray,
    before: np.ndarray,
    rows: np.ndarray,
    logits: torch.Tensor,
    sampled: Collection[int],
    ids: np.ndarray | None = None,
) -> None:
    """Record the probability of the tokens that a round added to chains, and their alternatives.

    Args:
        state: written.
        slots: int64 [R].
        before: int32 [R], length of each chain before the round.
        rows: int64 [M], rows of the round, ascending.
        logits: [M, vocab] of those rows.
        sampled: slots whose tokens were chosen with noise; they have branches instead.
        ids: see `top_alternatives`; None where any were.
    """
    gained = state.chain_len[slots] - before
    owner = np.repeat(slots, gained)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(gained) - gained, gained)
    at = np.repeat(before, gained) + within
    index = torch.from_numpy(np.searchsorted(rows, state.predicted_row[owner, at]))
    at_places = logits[index.to(logits.device)]
    tokens, probs = top_alternatives(at_places, ids)
    # what is chosen without noise is what stands first
    state.confidence[owner, at] = probs[:, 0]
    found = tokens.shape[1] - 1
    state.alternatives[owner, at, :found] = tokens[:, 1:]
    state.alternative_probs[owner, at, :found] = probs[:, 1:]
    state.following[owner, at] = -1
    state.expanded[owner, at] = -1
    if sampled:
        noisy = np.isin(owner, list(sampled))
        owner, at = owner[noisy], at[noisy]
        at_places = at_places[torch.from_numpy(noisy)]
        chosen = torch.from_numpy(state.chain[owner, at].astype(np.int64))
        probs = at_places.float().softmax(-1)
        chosen_probs = probs.gather(1, chosen.to(probs.device)[:, None])[:, 0]
        state.confidence[owner, at] = chosen_probs.numpy(force=True)
        state.alternatives[owner, at] = -1
