"""The arrays of a phrase pool, and where a phrase may come from."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np


class PhraseSource(IntEnum):
    """Where a phrase came from; index into `PoolArrays.inserted`."""

    PROMPT = 0
    WINDOW = 1
    VERIFICATION = 2
    HISTORY = 3


class PoolFault(RuntimeError):
    """A pool holds what it cannot hold."""


class PoolArrays(NamedTuple):
    """State of a pool with S slots, G phrases a slot, β tokens a phrase."""

    keys: np.ndarray  # int64 [S], scope << 32 | key of a context, or -1
    stamps: np.ndarray  # int64 [S], time of last use
    counts: np.ndarray  # int32 [S], phrases in the slot
    lengths: np.ndarray  # int32 [S, G], tokens of each phrase
    sources: np.ndarray  # int8 [S, G], PhraseSource
    times: np.ndarray  # uint8 [S, G], that it was seen behind its key, of late
    tokens: np.ndarray  # int32 [S, G, β]
    owners: np.ndarray  # int32 [S, G], number of the request that wrote each last, or 0
    clock: np.ndarray  # int64 [1]
    inserted: np.ndarray  # int64 [4], insertions by PhraseSource
    faults: np.ndarray  # int64 [1], slots that were found to hold what they cannot
    lookups: np.ndarray  # int64 [1]
    hits: np.ndarray  # int64 [4], lookups that found phrases, by PhraseSource of the first
