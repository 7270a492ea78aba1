"""What the logits of a round say: tokens of a chain, their probabilities, and alternatives."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from vllm_ouroboros.trees.request_state import NUM_ALTERNATIVES, RequestState
from vllm_ouroboros.verify.acceptance import greedy

ROWS_AT_ONCE = 512
"""Rows whose probabilities over the whole vocabulary lie in memory together."""


def top_alternatives(
    logits: torch.Tensor, ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable token of each row of logits [M, vocab], and its top-k alternatives.

    ``ids`` int64 [vocab] are the tokens of the columns, if these are not all.

    Returns:
        The tokens int64 [M, NUM_ALTERNATIVES + 1], the most probable first, and their
        probabilities float32 of the same shape.
    """
    most = min(NUM_ALTERNATIVES + 1, logits.shape[1])
    parts = [
        part.softmax(-1, dtype=torch.float32).topk(most) for part in logits.split(ROWS_AT_ONCE)
    ]
    probs, tokens = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    both = torch.stack([tokens.int(), probs.view(torch.int32)]).numpy(force=True)  # in one copy
    found = both[0].astype(np.int64)
    return found if ids is None else ids[found], both[1].view(np.float32)


class Choices:
    """What the draft model chooses in a round without noise.

    Args:
        logits: [M, vocab].
        wanted: of how many rows the most probable token is wanted.
        ids: see `top_alternatives`.
        at_once: whether to look for the alternatives of all rows now. A device answers once then;
            on the CPU it is less work to look where they are asked for.

    Raises:
        FloatingPointError: the logits of a row are no numbers.
    """

    def __init__(
        self, logits: torch.Tensor, wanted: int, ids: np.ndarray | None, *, at_once: bool
    ) -> None:
        self.logits, self._ids = logits, ids
        self._all = top_alternatives(logits, ids) if at_once else None
        self.tokens: np.ndarray
        """The most probable token int64 of each of the first ``wanted`` rows."""
        if self._all is not None:
            self.tokens = self._all[0][:wanted, 0]
            finite = bool(np.isfinite(self._all[1]).all())
        else:
            found = greedy(logits[:wanted])
            finite = bool(logits[torch.arange(wanted), torch.from_numpy(found)].isfinite().all())
            self.tokens = found if ids is None else ids[found]
        if not finite:
            raise FloatingPointError("the draft model's logits are not finite")

    def alternatives(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`top_alternatives` of rows int64 [N]."""
        if self._all is None:
            return top_alternatives(self.logits[torch.from_numpy(rows)], self._ids)
        return self._all[0][rows], self._all[1][rows]


def record_alternatives(
    state: RequestState,
    slots: np.ndarray,
    before: np.ndarray,
    rows: np.ndarray,
    choices: Choices,
    sampled: Collection[int],
) -> None:
    """Record the probability of the tokens that a round added to chains, and their alternatives.

    Args:
        state: written.
        slots: int64 [R].
        before: int32 [R], length of each chain before the round.
        rows: int64 [M], rows of the round, ascending.
        choices: of those rows; of the whole vocabulary where any is sampled.
        sampled: slots whose tokens were chosen with noise; they have branches instead.
    """
    gained = state.chain_len[slots] - before
    owner = np.repeat(slots, gained)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(gained) - gained, gained)
    at = np.repeat(before, gained) + within
    index = np.searchsorted(rows, state.predicted_row[owner, at])
    tokens, probs = choices.alternatives(index)
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
        at_places = choices.logits[torch.from_numpy(index[noisy]).to(choices.logits.device)]
        chosen = torch.from_numpy(state.chain[owner, at].astype(np.int64))
        of_chosen = at_places.float().softmax(-1).gather(1, chosen.to(at_places.device)[:, None])
        state.confidence[owner, at] = of_chosen[:, 0].numpy(force=True)
        state.alternatives[owner, at] = -1
