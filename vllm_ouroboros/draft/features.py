"""The features that a draft head reads: the target's of the text, its own of what it drafts."""

from __future__ import annotations

import numpy as np
import torch

from vllm_ouroboros.draft.expansion import MAX_PATHS
from vllm_ouroboros.trees.request_state import NUM_FOLLOWING
from vllm_ouroboros.verify.host_arrays import to_device

MAX_BYTES = 2**26
"""Of the features of all requests' texts that a head has not read yet."""


class HeadFeatures:
    """Features of the last places of each request's text, and of its chain and paths.

    All lie in one buffer, so that a forward reads its features by one index and keeps those it
    predicts by another. Features that are missing (in front of the text, in a cached prefix, given
    up for their memory) read as zeros: they cost acceptance, nothing else.

    Args:
        requests: most requests.
        longest: tokens of a text, at most.
        chain: tokens of a chain, at most.
        hidden: size of a feature.
        dtype: of its elements.
        device: where features are made and read.
    """

    def __init__(
        self,
        requests: int,
        longest: int,
        chain: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.longest = longest
        self.most = min(longest, max(16, MAX_BYTES // (requests * hidden * dtype.itemsize)))
        # place p of a slot's text lies in row p % most of the slot's
        self.zeros = requests * self.most
        """Row of the buffer that stays zero."""
        self._chains, self._chain_rows = self.zeros + 1, chain + 1
        self._paths = self._chains + requests * self._chain_rows
        self.nowhere = self._paths + requests * MAX_PATHS * (NUM_FOLLOWING - 1)
        """Row of the buffer for what nobody will read."""
        self._kept = torch.zeros(self.nowhere + 1, hidden, dtype=dtype, device=device)
        self._first, self._end = np.zeros((2, requests), np.int64)  # places that have features
        self._step = self._kept[:0]  # of the last step, if a chunk was longer than ``most``
        self._step_offset = np.zeros(requests, np.int64)  # row of a slot's place 0 in these

    # -- rows of the buffer ------------------------------------------------------------------------

    def before(self, slots: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Rows int64 [T] of the place of the text before each of ``places`` int64 [T], by slot."""
        wanted = places - 1
        known = (self._first[slots] <= wanted) & (wanted < self._end[slots])
        known &= wanted >= self._end[slots] - self.most
        return np.where(known, slots * self.most + wanted % self.most, self.zeros)

    def of_chain(self, slots: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Rows int64 [T] of places of chains; of those that no chain can have: `nowhere`."""
        inside = (places >= 0) & (places < self._chain_rows)
        return np.where(inside, self._chains + slots * self._chain_rows + places, self.nowhere)

    def of_paths(self, slots: np.ndarray, paths: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """The same of levels of paths, by slot and number."""
        most = NUM_FOLLOWING - 1
        rows = self._paths + (slots * MAX_PATHS + paths) * most + levels
        return np.where((levels >= 0) & (levels < most), rows, self.nowhere)

    # -- features ----------------------------------------------------------------------------------

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Features [T, hidden] of rows int64 [T]."""
        return self._kept[rows]

    def beyond(self, slots: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For `before`: which of the rows int64 [T] the last step alone has, and where."""
        wanted = places - 1
        early = (self._first[slots] <= wanted) & (wanted < self._end[slots] - self.most)
        at = np.flatnonzero(early & (len(self._step) > 0))
        return at, (self._step_offset[slots] + wanted)[at]

    def read_text(
        self, rows: torch.Tensor, more: tuple[np.ndarray, np.ndarray] | None
    ) -> torch.Tensor:
        """The same of rows that `before` gave, and of those of `beyond`."""
        found = self._kept[rows]
        if more is not None and len(more[0]):
            found[more[0].tolist()] = self._step[more[1].tolist()]
        return found

    def keep(self, rows: torch.Tensor, features: torch.Tensor) -> None:
        """Write features [T, hidden] to rows int64 [T]; `nowhere` may stand among them often."""
        self._kept[rows] = features

    # -- texts -------------------------------------------------------------------------------------

    def forget(self, slot: int) -> None:
        """The slot belongs to another request from now on."""
        self._first[slot] = self._end[slot] = 0

    def place(
        self, slots: np.ndarray, firsts: np.ndarray, counts: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Where to keep the features that a step made of texts, for `store`.

        Args:
            slots: int64 [R].
            firsts: int64 [R], each one's first place; those behind it that are known already are
                no longer the text's.
            counts: int64 [R], consecutive places of each.
            rows: int64 [sum of counts], those of the texts among the rows of the step.
        """
        ends = firsts + counts
        joined = (self._first[slots] <= firsts) & (firsts <= self._end[slots])
        # who is never read for keeps the last ones; a chunk of a prompt is read at once
        oldest = np.minimum(firsts, ends - self.most)
        since = np.where(joined, np.maximum(self._first[slots], oldest), firsts)
        self._first[slots], self._end[slots] = since, ends
        starts = np.cumsum(counts) - counts
        self._step_offset[slots] = starts - firsts
        places = np.arange(len(rows)) + np.repeat(firsts - starts, counts)
        kept = np.flatnonzero(places >= np.repeat(ends, counts) - self.most)
        where = (np.repeat(slots, counts) * self.most + places % self.most)[kept]
        return rows[kept], where, rows if len(kept) < len(rows) else None

    def store(
        self, hidden: torch.Tensor, source: np.ndarray, target: np.ndarray, step: np.ndarray | None
    ) -> None:
        """Keep features of a step.

        Args:
            hidden: [*, hidden], what the step made.
            source: int64 [N], rows of it.
            target: int64 [N], rows of the buffer.
            step: int64, rows of it to keep until the next step.
        """
        given = (source, target) if step is None else (source, target, step)
        read, write, *whole = to_device(self._kept.device, *given)
        self._kept[write] = hidden[read]
        self._step = hidden[whole[0]] if whole else self._kept[:0]

    def waiting(self, slot: int) -> int:
        """Places that have features."""
        return int(self._end[slot] - self._first[slot])

    def runs_out(self, slot: int) -> bool:
        """Whether features will be given up soon unless they are read."""
        return self.most < self.longest and self.waiting(slot) > self.most // 2

    def trim(self, slot: int, read: int) -> None:
        """Drop what a request that has read so many tokens no longer needs."""
        self._first[slot] = min(max(self._first[slot], read - 1), self._end[slot])
