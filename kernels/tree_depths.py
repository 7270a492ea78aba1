"""Device code that finds a row's request, and the depth of its node from its mask."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _popcount(word):
    """Bits set in each element: uint32 [*] -> int32 [*]."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    return (word & 0x3F).to(tl.int32)


@triton.jit
def request_of(
    query_start_loc,  # int32 [R + 1]
    num_requests,
    place,
    PER_TILE: tl.constexpr,
    EXTRA: tl.constexpr,  # tiles that each request has in excess, 0 or 1
):
    """The last request whose first tile of ``PER_TILE`` rows is not behind ``place``."""
    low = place * 0
    high = num_requests + low
    while high - low > 1:
        middle = (low + high) // 2
        ahead = tl.load(query_start_loc + middle) // PER_TILE + middle * EXTRA > place
        low = tl.where(ahead, low, middle)
        high = tl.where(ahead, middle, high)
    return low


@triton.jit(do_not_specialize=["num_requests", "stride_mask"])
def _count_depths(
    tree_mask,  # int32 [T, words]
    query_start_loc,  # int32 [R + 1]
    depths,  # int32 [T], written
    num_requests,
    stride_mask,
    TILE: tl.constexpr,
):
    """One row: the bits of its mask less one."""
    row = tl.program_id(0)
    if row >= tl.load(query_start_loc + num_requests):
        return
    request = request_of(query_start_loc, num_requests, row, 1, 0)
    start = tl.load(query_start_loc + request)
    num_step = tl.load(query_start_loc + request + 1) - start
    own = tree_mask + row.to(tl.int64) * stride_mask
    offset = tl.arange(0, TILE)
    count = tl.zeros([TILE], tl.int32)
    for first in range(0, tl.cdiv(num_step, 32), TILE):
        left = num_step - (first + offset) * 32
        word = tl.load(own + first + offset, mask=left > 0, other=0)
        word = word & tl.where(left < 32, (1 << tl.minimum(tl.maximum(left, 0), 31)) - 1, -1)
        count += _popcount(word.to(tl.uint32, bitcast=True))
    tl.store(depths + row, tl.sum(count, axis=0) - 1)
