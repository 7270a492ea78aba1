"""The target's features of each request's text, from the step that made them to the draft head."""

from __future__ import annotations

import torch

MAX_BYTES = 2**26
"""Of the features of all requests that a head has not read yet."""


class TextFeatures:
    """Features of consecutive places of each request's text, until the head has read them.

    Features that are missing (in front of the text, in a cached prefix, given up for their memory)
    read as zeros: they cost acceptance, nothing else.

    Args:
        requests: most requests.
        hidden: size of a feature.
        itemsize: bytes of an element.
    """

    def __init__(self, requests: int, hidden: int, itemsize: int) -> None:
        self.most = max(16, MAX_BYTES // (requests * hidden * itemsize))
        self.hidden = hidden
        self._kept: dict[int, tuple[int, torch.Tensor]] = {}  # by slot: first place, rows

    def forget(self, slot: int) -> None:
        """The slot belongs to another request from now on."""
        self._kept.pop(slot, None)

    def add(self, slot: int, first: int, rows: torch.Tensor) -> None:
        """Features [n, hidden] of places ``first`` on; places that are known already change."""
        start, kept = self._kept.get(slot, (first, rows[:0]))
        if not start <= first <= start + len(kept):
            start, kept = first, rows[:0]
        # a request that is never read for keeps its last ones; a chunk of a prompt is read at once
        excess = max(0, first - start - self.most)
        self._kept[slot] = start + excess, torch.cat((kept[excess : first - start], rows))

    def before(self, slot: int, first: int, end: int) -> torch.Tensor | None:
        """Features [end - first, hidden] of the places before ``first`` to ``end - 1``.

        None if all of them are missing.
        """
        if slot not in self._kept:
            return None
        start, kept = self._kept[slot]
        low, high = max(first - 1, start), min(end - 1, start + len(kept))
        if low >= high:
            return None
        found = kept.new_zeros(end - first, self.hidden)
        found[low - first + 1 : high - first + 1] = kept[low - start : high - start]
        return found

    def waiting(self, slot: int) -> int:
        """Places that have features."""
        return len(self._kept[slot][1]) if slot in self._kept else 0

    def trim(self, slot: int, read: int) -> None:
        """Drop what a request that has read so many tokens no longer needs."""
        if slot in self._kept:
            start, kept = self._kept[slot]
            gone = min(max(read - 1 - start, 0), len(kept))
            if gone:
                self._kept[slot] = start + gone, kept[gone:].clone()
