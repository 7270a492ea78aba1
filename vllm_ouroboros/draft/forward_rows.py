"""The rows of one draft forward."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ForwardRows(NamedTuple):
    """T rows of R requests.

    A request may stand here more than once: each path that expands its tree is one, see
    `Expansion`.
    """

    slots: np.ndarray  # int64 [R], the requests' slots in the state of drafting
    requests: np.ndarray  # int64 [R], their rows in the runner's batch
    tokens: np.ndarray  # int32 [T]
    positions: np.ndarray  # int64 [T]
    writes: np.ndarray  # int64 [T], position whose KV slot a row fills, or -1
    query_start_loc: np.ndarray  # int32 [R + 1]
    context_lens: np.ndarray  # int32 [R], tokens in the KV cache before the forward
    asked: np.ndarray  # int64 [M], rows whose hidden states are wanted
    paths: np.ndarray | None = None  # int64 [R], number of the path, -1 for text and chain
