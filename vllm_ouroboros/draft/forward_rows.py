"""The rows of one draft forward."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ouroboros.phrases.compiling import compiled


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


class ForwardInputs(NamedTuple):
    """What every rank needs to run a draft forward of T rows, R requests.

    Attributes:
        query_start_loc: int32 [R + 1].
        context_lens: int32 [R].
        mask: int32 [T, words] of `step_mask`, or None for plain causal rows.
        arrays: int64 [R] rows of the block table, int32 [T] tokens, int64 [T] positions, int64 [T]
            KV slots, int64 [M] rows asked for, and what else a kind of draft model reads.
        more: of a head's text, see `HeadFeatures.read_text`.
    """

    query_start_loc: np.ndarray
    context_lens: np.ndarray
    mask: np.ndarray | None
    arrays: tuple[np.ndarray, ...]
    more: tuple[np.ndarray, np.ndarray] | None = None


@compiled
def slot_mapping(positions, query_start_loc, requests, block_table, block_size, slots):
    """KV slots int64 [T] of positions int64 [T] (-1 stays -1).

    Args:
        positions: int64 [T], position whose slot a row fills, or -1.
        query_start_loc: int32 [R + 1], first row of each request.
        requests: int64 [R], row of each request in ``block_table``.
        block_table: int32 [*, max_blocks].
        block_size: tokens a block.
        slots: int64 [T], written.
    """
    for r in range(requests.shape[0]):
        for row in range(query_start_loc[r], query_start_loc[r + 1]):
            p = positions[row]
            if p < 0:
                slots[row] = -1
            else:
                block = block_table[requests[r], p // block_size]
                slots[row] = np.int64(block) * block_size + p % block_size
