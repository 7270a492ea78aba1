"""Tree attention on the CPU, compiled: pages of vLLM's KV cache as they are, in float32.

One task for each request and KV head. A page at a time is widened to float32 and attended by all
rows of the tree that share the head, with a running softmax (Milakov and Gimelshein,
arXiv 1805.02867); the step's own rows are one more page, of which the mask says who sees what. So
memory does not grow with the context, nothing is padded and nothing is gathered.

The loops are written for the compiler's vectorizer: several rows of a page at a time, their sum in
one expression, the innermost index contiguous.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import njit, prange
from numba.np.ufunc import parallel

_UNSEEN = np.float32(-1e30)
_LOG2_E = np.float32(math.log2(math.e))
_LOWEST = np.float32(-126.0)  # exponent of the smallest normal float32
# the series of 2^x; for |x| <= 1/2 what it leaves out is below the precision of float32
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (
    np.float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 8)
)


@njit(cache=True, fastmath=True)
def _widen(page, block, seen, shift, keys_bits, values_bits):
    """Copy the first ``seen`` slots of a page [2, D * block], as bits of float32, to two tiles."""
    dim = keys_bits.shape[0]
    for d in range(dim):
        row, source = keys_bits[d], page[0, d * block : d * block + seen]
        for t in range(seen):
            row[t] = np.uint32(source[t]) << shift
    for t in range(seen):
        row, source = values_bits[t], page[1, t * dim : (t + 1) * dim]
        for d in range(dim):
            row[d] = np.uint32(source[d]) << shift


@njit(cache=True, fastmath=True)
def _score(query, keys, seen, soft_cap, scores):
    """Scores [n, seen] of queries [n, D] and keys [D, seen]."""
    scores[:, :seen] = 0
    for d in range(0, query.shape[1], 8):
        k = keys[d : d + 8]
        for i in range(query.shape[0]):
            row, q = scores[i], query[i, d : d + 8]
            q0, q1, q2, q3, q4, q5, q6, q7 = q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7]
            for t in range(seen):
                row[t] += (
                    q0 * k[0, t] + q1 * k[1, t] + q2 * k[2, t] + q3 * k[3, t]
                    + q4 * k[4, t] + q5 * k[5, t] + q6 * k[6, t] + q7 * k[7, t]
                )  # fmt: skip
    if soft_cap > 0:
        for i in range(query.shape[0]):
            for t in range(seen):
                scores[i, t] = soft_cap * np.tanh(scores[i, t] / soft_cap)


@njit(cache=True, fastmath=True)
def _weigh(scores, seen, power, power_bits, top, total, result):
    """Turn a page's scores into weights; what was summed up before comes to the same scale."""
    for i in range(scores.shape[0]):
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
def _add(weights, values, seen, result):
    """Add to ``result`` [n, D] the values [seen, D] by their weights [n, seen]."""
    for t in range(seen, -(-seen // 16) * 16):
        weights[:, t] = 0
        values[t] = 0
    for t in range(0, seen, 16):
        v = values[t : t + 16]
        for i in range(result.shape[0]):
            row, w, x = result[i], weights[i, t : t + 8], weights[i, t + 8 : t + 16]
            w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
            x0, x1, x2, x3, x4, x5, x6, x7 = x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]
            for d in range(row.shape[0]):
                row[d] += (
                    w0 * v[0, d] + w1 * v[1, d] + w2 * v[2, d] + w3 * v[3, d]
                    + w4 * v[4, d] + w5 * v[5, d] + w6 * v[6, d] + w7 * v[7, d]
                    + x0 * v[8, d] + x1 * v[9, d] + x2 * v[10, d] + x3 * v[11, d]
                    + x4 * v[12, d] + x5 * v[13, d] + x6 * v[14, d] + x7 * v[15, d]
                )  # fmt: skip


@njit(cache=True, fastmath=True)
def _attend(
    query, pages, shift, blocks, context, new_keys, new_values, mask, scale, window, soft_cap
):
    """One request and KV head: [n, D] for rows [Q, group, D], the heads of a row side by side."""
    width, group, dim = query.shape
    n, block = width * group, pages.shape[2] // dim
    most = -(-max(block, width) // 16) * 16
    queries_bits = np.empty((n, dim), np.uint32)
    queries = queries_bits.view(np.float32)
    for i in range(width):
        for g in range(group):
            for d in range(dim):
                queries_bits[i * group + g, d] = np.uint32(query[i, g, d]) << shift
    queries *= scale
    scores = np.empty((n, most), np.float32)
    keys_bits, values_bits = np.empty((dim, most), np.uint32), np.empty((most, dim), np.uint32)
    keys, values = keys_bits.view(np.float32), values_bits.view(np.float32)
    power_bits = np.empty(most, np.int32)
    power = power_bits.view(np.float32)
    top, total = np.full(n, _UNSEEN, np.float32), np.zeros(n, np.float32)
    result = np.zeros((n, dim), np.float32)

    position = np.full(width, context - 1, np.int64)
    for i in range(width):
        for j in range(width):
            position[i] += (mask[i, j >> 5] >> (j & 31)) & 1
    first = 0  # slot that any row sees
    if window > 0:
        first = max(0, position.min() + 1 - window)
    for begin in range(first // block * block, context, block):
        seen = min(block, context - begin)
        _widen(pages[blocks[begin // block]], block, seen, shift, keys_bits, values_bits)
        _score(queries, keys, seen, soft_cap, scores)
        if window > 0:
            for i in range(n):
                hidden = position[i // group] + 1 - window - begin
                scores[i, : max(0, min(seen, hidden))] = _UNSEEN
        _weigh(scores, seen, power, power_bits, top, total, result)
        _add(scores, values, seen, result)

    for t in range(width):
        for d in range(dim):
            keys_bits[d, t] = np.uint32(new_keys[t, d]) << shift
            values_bits[t, d] = np.uint32(new_values[t, d]) << shift
    _score(queries, keys, width, soft_cap, scores)
    for i in range(n):
        row = i // group
        for j in range(width):
            far = window > 0 and position[j] <= position[row] - window
            if far or (mask[row, j >> 5] >> (j & 31)) & 1 == 0:
                scores[i, j] = _UNSEEN
    _weigh(scores, width, power, power_bits, top, total, result)
    _add(scores, values, width, result)
    for i in range(n):
        result[i] /= total[i]
    return result


@njit(cache=True, parallel=True)
def tree_attention(
    query, pages, shift, table, contexts, starts, new_keys, new_values, mask, scale, window,
    soft_cap, out,
):  # fmt: skip
    """Attention of tree rows over the paged context and, by mask, over each other.

    As `kernels.reference.tree_attention`, with the pages of vLLM's CPU kernels ("vec" layout).
    Elements come as bits: uint16 of bfloat16 or uint32 of float32.

    Args:
        query: bits [T, Hq, D]; D is a multiple of 8.
        pages: bits [num_blocks, Hkv, 2, D * block_size]: keys as [D, block_size], then values as
            [block_size, D].
        shift: uint32, how far bits are moved up to be those of float32: 16 or 0.
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
    num_kv = new_keys.shape[1]
    group = query.shape[1] // num_kv
    for task in prange(contexts.shape[0] * num_kv):
        r, head = task // num_kv, task % num_kv
        rows = slice(starts[r], starts[r + 1])
        heads = slice(head * group, (head + 1) * group)
        result = _attend(
            query[rows, heads], pages[:, head], shift, table[r], contexts[r],
            new_keys[rows, head], new_values[rows, head], mask[rows], scale, window, soft_cap,
        )  # fmt: skip
        out[rows, heads] = result.reshape(rows.stop - rows.start, group, query.shape[2])


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
