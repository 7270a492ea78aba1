"""The greatest of each row of bfloat16 logits on the CPU, without widening them to float32."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

_BLOCK = 1024
"""Elements of which the greatest is kept; the one block that holds the row's is searched again."""

_MAGNITUDE = np.int16(0x7FFF)
_INFINITY = np.int16(0x7F80)


@njit(cache=True, inline="always")
def _rank(bits):
    """Integer of bfloat16 bits that orders as the numbers do; NaN is the greatest, as in NumPy."""
    magnitude = bits & _MAGNITUDE
    rank = magnitude if bits >= 0 else np.int16(-magnitude)  # both zeros are 0
    return _MAGNITUDE if magnitude > _INFINITY else rank


@njit(cache=True, parallel=True)
def _argmax(bits, out):
    """Write the first greatest of each row of bits int16 [T, V] to ``out`` int64 [T]."""
    width = bits.shape[1]
    for row in prange(bits.shape[0]):
        best, start = np.int16(-0x8000), 0
        for first in range(0, width, _BLOCK):
            greatest = np.int16(-0x8000)
            for i in range(first, min(first + _BLOCK, width)):
                greatest = max(greatest, _rank(bits[row, i]))
            if greatest > best:
                best, start = greatest, first
        while _rank(bits[row, start]) != best:
            start += 1
        out[row] = start


def argmax(logits: torch.Tensor) -> np.ndarray:
    """Index int64 [T] of the greatest of each row of bfloat16 [T, V]; the first of equals."""
    out = np.empty(len(logits), np.int64)
    _argmax(logits.contiguous().view(torch.int16).numpy(), out)
    return out
