"""The target's features of each request's text, from the step that made them to the draft head."""

from __future__ import annotations

import numpy as np
import torch

MAX_BYTES = 2**26
"""Of the features of all requests that a head has not read yet."""


class TextFeatures:
    """Features of the last places of each request's text.

    Features that are missing (in front of the text, in a cached prefix, given up for their memory)
    read as zeros: they cost acceptance, nothing else.

    Args:
        requests: most requests.
        longest: tokens of a text, at most.
        hidden: size of a feature.
        dtype: of its elements.
        device: where features are made and read.
    """

    def __init__(
        self,
        requests: int,
        longest: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.longest = longest
        self.most = min(longest, max(16, MAX_BYTES // (requests * hidden * dtype.itemsize)))
        # place p of a slot lies in row p % most of the slot's; behind all is a row of zeros
        self._kept = torch.zeros(requests * self.most + 1, hidden, dtype=dtype, device=device)
        self._first, self._end = np.zeros((2, requests), np.int64)  # places that have features
        self._step = self._kept[:0]  # of the last step, if a chunk was longer than ``most``
        self._step_offset = np.zeros(requests, np.int64)  # row of a slot's place 0 in these

    def forget(self, slot: int) -> None:
        """The slot belongs to another request from now on."""
        self._first[slot] = self._end[slot] = 0

    def add(self, slots: np.ndarray, firsts: np.ndarray, counts: np.ndarray, rows) -> None:
        """Keep the features that a step made.

        Args:
            slots: int64 [R].
            firsts: int64 [R], each one's first place; those behind it that are known already are
                no longer the text's.
            counts: int64 [R], consecutive places of each.
            rows: [sum of counts, hidden].
        """
        ends = firsts + counts
        joined = (self._first[slots] <= firsts) & (firsts <= self._end[slots])
        # who is never read for keeps the last ones; a chunk of a prompt is read at once
        oldest = np.minimum(firsts, ends - self.most)
        since = np.where(joined, np.maximum(self._first[slots], oldest), firsts)
        self._first[slots], self._end[slots] = since, ends
        starts = np.cumsum(counts) - counts
        self._step, self._step_offset[slots] = self._kept[:0], starts - firsts
        places = np.arange(len(rows)) + np.repeat(firsts - starts, counts)
        kept = np.flatnonzero(places >= np.repeat(ends, counts) - self.most)
        where = (np.repeat(slots, counts) * self.most + places % self.most)[kept]
        if len(kept) < len(rows):
            self._step, rows = rows, rows[torch.from_numpy(kept).to(rows.device)]
        self._kept[torch.from_numpy(where).to(rows.device)] = rows

    def before(self, slots: np.ndarray, places: np.ndarray) -> torch.Tensor:
        """Features [T, hidden] of the place before each of ``places`` int64 [T], by slot."""
        wanted = places - 1
        known = (self._first[slots] <= wanted) & (wanted < self._end[slots])
        kept = known & (wanted >= self._end[slots] - self.most)
        rows = np.where(kept, slots * self.most + wanted % self.most, len(self._kept) - 1)
        found = self._kept[torch.from_numpy(rows).to(self._kept.device)]
        if early := np.flatnonzero(known & ~kept).tolist():
            found[early] = self._step[(self._step_offset[slots] + wanted)[early].tolist()]
        return found

    def waiting(self, slot: int) -> int:
        """Places that have features."""
        return int(self._end[slot] - self._first[slot])

    def runs_out(self, slot: int) -> bool:
        """Whether features will be given up soon unless they are read."""
        return self.most < self.longest and self.waiting(slot) > self.most // 2

    def trim(self, slot: int, read: int) -> None:
        """Drop what a request that has read so many tokens no longer needs."""
        self._first[slot] = min(max(self._first[slot], read - 1), self._end[slot])
