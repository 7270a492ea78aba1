"""Device code of tree attention; `tree_attention` launches it and says how the work is cut."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime import JITFunction

from .launch import STEP_KEYS
from .tree_depths import request_of

STEP_TILE = tl.constexpr(STEP_KEYS)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _online_softmax(
    scores,  # float32 [M, N], before scaling
    seen,  # int1 [M, N]
    values,  # [N, D]
    top,  # float32 [M], greatest score so far (base 2)
    total,  # float32 [M], sum of weights relative to it
    acc,  # float32 [M, D], weighted values
    scale,
    soft_cap,
    SOFT_CAP: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Take one tile of keys into the running softmax."""
    scores *= scale
    if SOFT_CAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), right for infinite exp, too
        scores = soft_cap * (1 - 2 / (tl.exp(2 * scores / soft_cap) + 1))
    scores = tl.where(seen, scores * LOG2E, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that saw nothing yet
    weights = tl.exp2(scores - base[:, None])
    old = tl.exp2(top - base)
    total = total * old + tl.sum(weights, axis=1)
    acc = tl.dot(
        weights.to(COMPUTE), values.to(COMPUTE), acc * old[:, None], input_precision="ieee"
    )
    return new_top, total, acc


@triton.jit(do_not_specialize=["num_requests", "window", "stride_table", "stride_mask"])
def _attend(
    q,  # [T, Hq, D]
    k_new,  # [T, Hkv, D]
    v_new,  # [T, Hkv, D]
    key_cache,  # [num_blocks, PAGE, Hkv, D]
    value_cache,  # [num_blocks, PAGE, Hkv, D]
    block_table,  # int32 [R, max_blocks]
    context_lens,  # int32 [R]
    query_start_loc,  # int32 [R + 1]
    tree_mask,  # int32 [T, words]
    depths,  # int32 [T], or None if not WINDOW
    k_scale,  # float32 [1] or None
    v_scale,  # float32 [1] or None
    out,  # [T, Hq, D], written if not SPLIT
    parts,  # float32 [T, Hq, splits, D], written if SPLIT
    lses,  # float32 [T, Hq, splits], base 2, written if SPLIT
    scale,
    soft_cap,
    window,
    num_requests,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_kc_page,
    stride_kc_slot,
    stride_kc_head,
    stride_vc_page,
    stride_vc_slot,
    stride_vc_head,
    stride_table,
    stride_mask,
    stride_out_row,
    stride_out_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    CACHE_FP8: tl.constexpr,
    STEP_FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One tile of queries, one KV head, one share of the keys."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)

    request = request_of(query_start_loc, num_requests, tile, BLOCK_Q, 1)
    start = tl.load(query_start_loc + request)
    num_step = tl.load(query_start_loc + request + 1) - start
    first_query = (tile - start // BLOCK_Q - request) * BLOCK_Q
    if first_query >= num_step:
        return
    context = tl.load(context_lens + request)

    # rows of the tile: (query, head of the group)
    index = tl.arange(0, BLOCK_M)
    query = first_query + index // GROUP
    valid = (index < BLOCK_Q * GROUP) & (query < num_step)
    row = (start + query).to(tl.int64)
    head = kv_head * GROUP + index % GROUP
    dim = tl.arange(0, DIM_PAD)
    in_dim = dim < DIM

    # Keys, in tiles: those of the context that the window can reach, then those of the step.
    depth = tl.where(valid, 0, 0)
    first_tile = context * 0
    if WINDOW:
        depth = tl.load(depths + row, mask=valid, other=0)
        least = tl.min(tl.where(valid, depth, 1 << 30), axis=0)
        reach = tl.minimum(tl.maximum(context + least - window + 1, 0), context)
        first_tile = reach // BLOCK_N
    context_tiles = tl.cdiv(context, BLOCK_N) - first_tile
    tiles = context_tiles + tl.cdiv(num_step, STEP_TILE)
    share = tl.cdiv(tiles, splits)
    first = split * share
    last = tl.minimum(first + share, tiles)
    row_part = (row * tl.num_programs(1) * GROUP + head) * splits + split
    if first >= last:  # more splits than tiles
        if SPLIT:
            tl.store(lses + row_part, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=valid)
        return

    where_q = row[:, None] * stride_q_row + head[:, None] * stride_q_head + dim[None, :]
    queries = tl.load(q + where_q, mask=valid[:, None] & in_dim[None, :], other=0.0).to(COMPUTE)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)

    key_scale = scale
    if CACHE_FP8 and k_scale is not None:
        key_scale = scale * tl.load(k_scale)
    pages = block_table + request.to(tl.int64) * stride_table
    offset = tl.arange(0, BLOCK_N)
    for t in range(first, tl.minimum(last, context_tiles)):
        base = (first_tile + t) * BLOCK_N
        position = base + offset
        present = position < context
        if ONE_PAGE:
            page = tl.load(pages + base // PAGE).to(tl.int64)
            slot = base % PAGE + offset
            where_k = page * stride_kc_page + slot * stride_kc_slot
            where_v = page * stride_vc_page + slot * stride_vc_slot
        else:
            page = tl.load(pages + position // PAGE, mask=present, other=0).to(tl.int64)
            slot = position % PAGE
            where_k = page * stride_kc_page + slot * stride_kc_slot
            where_v = page * stride_vc_page + slot * stride_vc_slot
        where_k = where_k + kv_head * stride_kc_head
        where_v = where_v + kv_head * stride_vc_head
        loaded = present[:, None] & in_dim[None, :]
        keys = tl.load(key_cache + where_k[:, None] + dim[None, :], mask=loaded, other=0.0)
        scores = tl.dot(queries, tl.trans(keys.to(COMPUTE)), input_precision="ieee")
        seen = present[None, :]
        if WINDOW:
            seen = seen & (position[None, :] > (context + depth - window)[:, None])
        values = tl.load(value_cache + where_v[:, None] + dim[None, :], mask=loaded, other=0.0)
        top, total, acc = _online_softmax(
            scores, seen, values, top, total, acc, key_scale, soft_cap, SOFT_CAP, COMPUTE
        )
    if CACHE_FP8 and v_scale is not None and not STEP_FP8:
        acc *= tl.load(v_scale)

    step_scale = scale
    if STEP_FP8:
        step_scale = key_scale
    bit = tl.arange(0, STEP_TILE)
    for t in range(tl.maximum(first - context_tiles, 0), last - context_tiles):
        word = tl.load(tree_mask + row * stride_mask + t, mask=valid, other=0)
        if tl.max((word != 0).to(tl.int32), axis=0) > 0:
            column = t * STEP_TILE + bit
            present = column < num_step
            key_row = (start + column).to(tl.int64)
            loaded = present[:, None] & in_dim[None, :]
            where_k = key_row * stride_k_row + kv_head * stride_k_head
            where_v = key_row * stride_v_row + kv_head * stride_v_head
            keys = tl.load(k_new + where_k[:, None] + dim[None, :], mask=loaded, other=0.0)
            scores = tl.dot(queries, tl.trans(keys.to(COMPUTE)), input_precision="ieee")
            seen = present[None, :] & (((word[:, None] >> bit[None, :]) & 1) != 0)
            if WINDOW:
                key_depth = tl.load(depths + key_row, mask=present, other=0)
                seen = seen & (key_depth[None, :] > (depth - window)[:, None])
            values = tl.load(v_new + where_v[:, None] + dim[None, :], mask=loaded, other=0.0)
            top, total, acc = _online_softmax(
                scores, seen, values, top, total, acc, step_scale, soft_cap, SOFT_CAP, COMPUTE
            )
    if STEP_FP8 and v_scale is not None:
        acc *= tl.load(v_scale)

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    acc = acc / total[:, None]
    stored = valid[:, None] & in_dim[None, :]
    if SPLIT:
        lse = tl.where(nothing, float("-inf"), top + tl.log2(total))
        tl.store(lses + row_part, lse, mask=valid)
        tl.store(parts + row_part[:, None] * DIM + dim[None, :], acc, mask=stored)
    else:
        where_out = row[:, None] * stride_out_row + head[:, None] * stride_out_head + dim[None, :]
        tl.store(out + where_out, acc.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_requests", "splits"])
def _merge(
    parts,  # float32 [T, Hq, splits, D]
    lses,  # float32 [T, Hq, splits], base 2; -inf: that part saw nothing and is not written
    query_start_loc,  # int32 [R + 1]
    out,  # [T, Hq, D], written
    num_requests,
    splits,
    stride_out_row,
    stride_out_head,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """One row and head: its parts, weighted by their share of the softmax."""
    row = tl.program_id(0)
    if row >= tl.load(query_start_loc + num_requests):
        return
    row = row.to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS_PAD)
    dim = tl.arange(0, DIM_PAD)
    first = (row * tl.num_programs(1) + head) * splits
    lse = tl.load(lses + first + split, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, axis=0)
    where = (first + split)[:, None] * DIM + dim[None, :]
    loaded = (weight > 0)[:, None] & (dim < DIM)[None, :]
    part = tl.load(parts + where, mask=loaded, other=0.0)
    merged = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    where_out = row * stride_out_row + head * stride_out_head + dim
    tl.store(out + where_out, merged.to(out.dtype.element_ty), mask=dim < DIM)


INTERPRETED = not isinstance(_attend, JITFunction)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""
