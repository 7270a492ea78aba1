"""Tree attention on the CPU, compiled: pages of vLLM's KV cache as they are, in float32.

One task for each request and KV head. A page at a time is attended by all rows of the tree that
share the head, with a running softmax (Milakov and Gimelshein, arXiv 1805.02867); the step's own
rows are one more page, of which the mask says who sees what. So memory does not grow with the
context, no page is copied and nothing is gathered.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import njit, prange
from numba.np.ufunc import parallel

from vllm_ouroboros.verify.cpu.matmul_tile import LANES, add_product
from vllm_ouroboros.verify.cpu.page_layouts import begin, end, page_scores, page_values

_UNSEEN = np.float32(-1e30)
_LOG2_E = np.float32(math.log2(math.e))
_LOWEST = np.float32(-126.0)  # exponent of the smallest normal float32
# the series of 2^x; for |x| <= 1/2 what it leaves out is below the precision of float32
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (
    np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 8)
)


@njit(cache=True)
def _whole(query, tile):
    """Bits [n, D] of bits [Q, group, D]; rows of zeros make them whole tiles of so many rows."""
    width, group, dim = query.shape
    bits = np.zeros((-(-width * group // tile) * tile, dim), query.dtype)
    bits[: width * group] = np.ascontiguousarray(query).reshape(width * group, dim)
    return bits


@njit(cache=True, fastmath=True)
def _scaled(bits, scale):
    """Queries float32 [n, D], scaled, of bits [n, D]."""
    shift = np.uint32(32 - 8 * bits.itemsize)
    wide = np.empty(bits.shape, np.uint32)
    for i in range(bits.shape[0]):
        for d in range(bits.shape[1]):
            wide[i, d] = np.uint32(bits[i, d]) << shift
    queries = wide.view(np.float32)
    queries *= scale
    return queries


@njit(cache=True)
def _transpose(rows):
    """Bits [Q, D] as [D, whole lanes], flat, and the length of a row."""
    width, dim = rows.shape
    stride = -(-width // LANES) * LANES
    columns = np.zeros((dim, stride), rows.dtype)
    for t in range(width):
        for d in range(dim):
            columns[d, t] = rows[t, d]
    return columns.reshape(-1), stride


@njit(cache=True)
def _cap(scores, seen, soft_cap):
    """Scores become ``soft_cap * tanh(score / soft_cap)`` where that is above 0."""
    if soft_cap > 0:
        for i in range(scores.shape[0]):
            for t in range(seen):
                scores[i, t] = soft_cap * np.tanh(scores[i, t] / soft_cap)


@njit(cache=True, fastmath=True)
def _weigh(scores, seen, power, power_bits, top, total, result):
    """Turn a page's scores into weights; what was summed up before comes to the same scale."""
    for i in range(len(top)):
        row, highest = scores[i], top[i]
        for t in range(seen):
            highest = max(highest, row[t])
        if highest > top[i]:
            scale = np.exp(top[i] - highest)
            top[i] = highest
            total[i] *= scale
            for d in range(result.shape[1]):
                result[i, d] *= scale
        for t in range(seen):
            x = max((row[t] - highest) * _LOG2_E, _LOWEST)
            whole = np.floor(x + np.float32(0.5))
            power_bits[t] = (np.int32(whole) + np.int32(127)) << np.int32(23)
            f = x - whole
            y = ((((((_C7 * f + _C6) * f + _C5) * f + _C4) * f + _C3) * f + _C2) * f + _C1) * f
            row[t] = y + np.float32(1)
        added = np.float32(0)
        for t in range(seen):
            row[t] *= power[t]
            added += row[t]
        total[i] += added


@njit(cache=True, fastmath=True)
def _attend(
    layout, query, pages, block, head, num_kv, blocks, context, new_keys, new_values, start,
    mask, scale, window, soft_cap,
):  # fmt: skip
    """One request and KV head: [n, D] for rows [Q, group, D], heads of a row side by side."""
    width, group, dim = query.shape
    n, half = width * group, dim * block
    bits = _whole(query, layout.tile)
    queries = _scaled(bits, scale)
    most = -(-max(block, width) // 32) * 32
    scores = np.empty((len(queries), most), np.float32)
    power_bits = np.empty(most, np.int32)
    power = power_bits.view(np.float32)
    top, total = np.full(n, _UNSEEN, np.float32), np.zeros(n, np.float32)
    result = np.zeros((len(queries), dim), np.float32)

    position = np.full(width, context - 1, np.int64)
    for i in range(width):
        for j in range(width):
            position[i] += (mask[i, j >> 5] >> (j & 31)) & 1
    first = 0  # slot that any row sees
    if window > 0:
        first = max(0, position.min() + 1 - window)
    halves = begin(layout, len(queries), most)
    for at in range(first // block * block, context, block):
        seen = min(block, context - at)
        page = (np.int64(blocks[at // block]) * num_kv + head) * 2 * half
        page_scores(layout, bits, queries, n, scale, pages, page, block, seen, scores)
        _cap(scores, seen, soft_cap)
        if window > 0:
            for i in range(n):
                hidden = position[i // group] + 1 - window - at
                scores[i, : max(0, min(seen, hidden))] = _UNSEEN
        _weigh(scores, seen, power, power_bits, top, total, result)
        page_values(layout, scores, halves, n, seen, pages, page + half, block, result)
    end(layout)

    keys, stride = _transpose(new_keys)
    scores[:, :stride] = 0
    add_product(queries, dim, keys, 0, stride, width, scores)
    _cap(scores, width, soft_cap)
    for i in range(n):
        row = i // group
        for j in range(width):
            far = window > 0 and position[j] <= position[row] - window
            if far or (mask[row, j >> 5] >> (j & 31)) & 1 == 0:
                scores[i, j] = _UNSEEN
    _weigh(scores, width, power, power_bits, top, total, result)
    add_product(scores, width, new_values, start, num_kv * dim, dim, result)
    for i in range(n):
        result[i] /= total[i]
    return result[:n]


@njit(cache=True, parallel=True)
def tree_attention(
    layout, query, pages, table, contexts, starts, new_keys, new_values, mask, scale, window,
    soft_cap, out,
):  # fmt: skip
    """Attention of tree rows over the paged context and, by mask, over each other.

    As `kernels.reference.tree_attention`, with the pages of vLLM's CPU kernels. Elements come
    as bits: uint16 of bfloat16 or uint32 of float32.

    Args:
        layout: `Vec` or `Amx`: of the pages.
        query: bits [T, Hq, D]; D is a multiple of 16, of 32 with AMX.
        pages: bits [num_blocks, Hkv, 2, D * block_size]: keys, then values; the block size is
            a multiple of 16, of 32 with AMX.
        table: int32 [R, max_blocks].
        contexts: int64 [R], tokens of each request in the cache that were committed.
        starts: int64 [R + 1], first row of each request.
        new_keys: bits [T, Hkv, D], of the rows themselves.
        new_values: the same.
        mask: int32 [T, words]; bit j of row i is set when it sees row j of its request.
        scale: float32, factor of the scores.
        window: a row sees positions above its own less this; 0 or less: all.
        soft_cap: float32, scores become ``soft_cap * tanh(score / soft_cap)``; 0: they stay.
        out: float32 [T, Hq, D], written.
    """
    _, num_kv, dim = new_keys.shape
    group = query.shape[1] // num_kv
    block = pages.shape[3] // dim
    flat_pages, flat_values = pages.reshape(-1), new_values.reshape(-1)
    for task in prange(contexts.shape[0] * num_kv):
        r, head = task // num_kv, task % num_kv
        rows = slice(starts[r], starts[r + 1])
        heads = slice(head * group, (head + 1) * group)
        result = _attend(
            layout, query[rows, heads], flat_pages, block, head, num_kv, table[r], contexts[r],
            new_keys[rows, head], flat_values, (starts[r] * num_kv + head) * dim, mask[rows],
            scale, window, soft_cap,
        )  # fmt: skip
        out[rows, heads] = result.reshape(rows.stop - rows.start, group, dim)


def share_threads(count: int) -> bool:
    """Run the kernel on the ``count`` threads of OpenMP that torch and vLLM run on.

    Left alone, numba takes as many threads as this process may use cores, which once vLLM has bound
    its threads is one, and tells OpenMP to use no more for anything. Must be called before anything
    runs in parallel.

    Returns:
        Whether that was done; without numba's OpenMP layer one thread does all the work.
    """
    numba.config.NUMBA_NUM_THREADS = parallel.NUM_THREADS = count
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    numba.get_num_threads()  # starts them
    shared = numba.threading_layer() == "omp"
    if not shared:
        numba.set_num_threads(1)
    return shared
