"""The union of two sets of pool rows: of an engine's pool, and of a file that others write, too.

The same phrase of the same key counts once, as often as either saw it, and stands where the engine
has it. Others are put between by their place in the file: two engines have no clock in common.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vllm_ouroboros.phrases.file_rows import DTYPES

Rows = Mapping[str, np.ndarray]


def union(
    ours: Rows, theirs: Rows, max_keys: int, max_phrases: int, *, news: bool
) -> dict[str, np.ndarray]:
    """Rows of both, in the order of `file_rows`.

    Args:
        ours: rows of this engine.
        theirs: rows that stood in the file.
        max_keys: keys to keep, those used last.
        max_phrases: phrases to keep of each key, those used last.
        news: whether the file may have rows that this engine never had; else all that it lacks,
            it has given up, which makes them older than all it has.
    """
    both = _concatenated(theirs, ours)
    late = np.concatenate([_lateness(len(rows["keys"])) for rows in (theirs, ours)])
    late[: len(theirs["keys"])] -= not news
    ids = _identities(both)
    order = np.argsort(ids, kind="stable")
    first = _starts(ids[order])
    if not len(order):
        return both
    times = np.maximum.reduceat(both["times"][order], first)
    kept = order[np.append(first[1:], len(order)) - 1]  # ours, where both have it
    rows = {name: column[kept] for name, column in both.items()} | {"times": times}
    by_age = np.argsort(late[kept], kind="stable")
    rows = {name: column[by_age] for name, column in rows.items()}
    chosen = _last_of_keys(rows["keys"], max_keys, max_phrases)
    return {name: column[chosen] for name, column in rows.items()}


def unknown(ours: Rows, theirs: Rows) -> dict[str, np.ndarray]:
    """The rows of ``theirs`` whose phrases ``ours`` lacks."""
    both = _concatenated(theirs, ours)
    ids, size = _identities(both), len(theirs["keys"])
    new = ~np.isin(ids[:size], ids[size:])
    return {name: column[new] for name, column in theirs.items()}


def _concatenated(one: Rows, other: Rows) -> dict[str, np.ndarray]:
    width = max(one["tokens"].shape[1], other["tokens"].shape[1])
    wide = {
        id(rows): np.pad(rows["tokens"], ((0, 0), (0, width - rows["tokens"].shape[1])))
        for rows in (one, other)
    }
    return {
        name: np.concatenate(
            [wide[id(rows)] if name == "tokens" else rows[name] for rows in (one, other)]
        )
        for name in DTYPES
    }


def _identities(rows: Rows) -> np.ndarray:
    """A hash uint64 [m] of key and phrase of each row."""
    found = np.zeros(len(rows["keys"]), np.uint64)
    for column in (rows["keys"].astype(np.uint32), rows["lengths"] + 1, *rows["tokens"].T):
        found = (found ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
    return found


def _lateness(rows: int) -> np.ndarray:
    return np.arange(1, rows + 1) / max(1, rows)


def _starts(ordered: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])


def _last_of_keys(keys: np.ndarray, max_keys: int, max_phrases: int) -> np.ndarray:
    """Indices, ascending, of the last rows of each key, and of the keys whose last row is last."""
    order = np.argsort(keys, kind="stable")
    first = _starts(keys[order])
    ends = np.append(first[1:], len(keys))
    run = np.repeat(np.arange(len(first)), ends - first)
    from_end = ends[run] - 1 - np.arange(len(keys))
    newest = order[ends - 1]  # the last row of each key
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(-newest)] = np.arange(len(first))
    return np.sort(order[(from_end < max_phrases) & (rank[run] < max_keys)])
