"""Tree attention over a paged KV cache, in Triton; the oracle is `reference.tree_attention`.

One program attends a tile of queries, all heads of one GQA group together, to one share of the
keys: the request's context in the cache, then this step's tokens by mask. Queries and the group
are the rows of one matrix, so that a K/V tile is read once for all of them. Where the keys are
shared out over several programs, a second kernel merges their softmaxes.

The grid follows from shapes alone, and nothing is read back to the host: a launch may be captured
in a CUDA graph and replayed with other lengths, block tables and masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction

STEP_TILE = tl.constexpr(32)  # step keys in a tile: one word of the mask
LOG2E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = 32
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


class LaunchConfig(NamedTuple):
    """How a launch is cut into programs."""

    block_m: int  # rows of a tile: queries times heads of a group; a power of two from 16 on
    block_n: int  # context keys of a tile; a power of two from 16 on
    num_splits: int  # programs that share the keys of a tile of queries
    num_warps: int = 4
    num_stages: int = 2


class Launch(NamedTuple):
    """What a call launched; tests assert on it."""

    config: LaunchConfig
    grid: tuple[int, int, int]
    one_page: bool  # a context tile never crosses a page: one look-up for all its keys
    window: bool
    soft_cap: bool
    cache_fp8: bool
    step_fp8: bool


def launch_config(
    *,
    num_rows: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    max_query_len: int,
    max_context_len: int,
    itemsize: int = 2,
    num_sms: int = 132,
) -> LaunchConfig:
    """A sane configuration, from static sizes alone.

    Args:
        num_rows: T, rows of the step.
        num_kv_heads: Hkv.
        group: query heads of a KV head.
        head_dim: D.
        block_size: tokens of a page.
        max_query_len: most rows that a request has.
        max_context_len: most committed tokens that a request has.
        itemsize: bytes of a query's element.
        num_sms: multiprocessors of the GPU.
    """
    most_m, block_n = 128, 64
    if head_dim > 128 or itemsize > 2:  # so that a tile stays in registers
        most_m, block_n = (32 if itemsize > 2 else 64), 32
    block_m = _power_of_two(min(max_query_len, num_rows) * group)
    block_m = max(min(block_m, most_m), 16, _power_of_two(group))
    if block_size % 32 == 0 and block_size % block_n:
        block_n = 32
    programs = -(-num_rows // (block_m // group)) * num_kv_heads
    tiles = -(-max_context_len // block_n) + -(-max_query_len // STEP_TILE.value)
    # two programs a multiprocessor, and no split of fewer than two tiles
    splits = min(2 * num_sms // max(programs, 1), tiles // 2, MAX_SPLITS)
    splits = 1 << max(splits.bit_length() - 1, 0)
    return LaunchConfig(block_m, block_n, splits, 8 if block_m > 64 or block_n < 64 else 4)


def scratch(
    num_rows: int, num_heads: int, head_dim: int, num_splits: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers for launches of up to these sizes: float32, `num_rows * num_heads * num_splits`
    outputs of ``head_dim`` elements and as many log-sum-exps."""
    count = num_rows * num_heads * num_splits
    parts = torch.empty(count * head_dim, dtype=torch.float32, device=device)
    return parts, torch.empty(count, dtype=torch.float32, device=device)


def tree_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tree_mask: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    *,
    soft_cap: float = 0.0,
    sliding_window: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    depths: torch.Tensor | None = None,
    max_query_len: int | None = None,
    max_context_len: int | None = None,
    config: LaunchConfig | None = None,
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Launch:
    """Attention of step tokens over the paged context and, by mask, over each other.

    Arguments as for `reference.tree_attention`, and:

    Args:
        key_cache: float32, float16, bfloat16 or float8_e4m3fn; elements of a head are contiguous.
        k_new: of a floating type as it is, or float8_e4m3fn, then scaled like the cache.
        k_scale: float32 of one element, factor of float8 keys; None is 1.
        v_scale: the same for values.
        depths: int32 [T] of `count_depths`, for a sliding window; None: counted here. It is the
            same in all layers of a step.
        max_query_len: most rows that a request has; None: T. A bound, it may be too large.
        max_context_len: most committed tokens; None: all that the block table has room for.
        config: how to cut the work; None: `launch_config`.
        buffers: of `scratch`, for launches with more than one split; None: allocated here.

    Rows behind the last request, and rows that see no key, are padding: the first are left
    alone, the second become 0.

    Returns:
        What was launched.

    Raises:
        ValueError: a shape, layout or type that the kernel does not take.
    """
    check_layout(
        q, k_new, v_new, key_cache, value_cache, block_table, context_lens, query_start_loc,
        tree_mask, out, k_scale, v_scale, depths,
    )  # fmt: skip
    num_rows, num_heads, dim = q.shape
    num_kv_heads, block_size = k_new.shape[1], key_cache.shape[1]
    group = num_heads // num_kv_heads
    num_requests = context_lens.shape[0]
    if config is None:
        config = launch_config(
            num_rows=num_rows, num_kv_heads=num_kv_heads, group=group, head_dim=dim,
            block_size=block_size, itemsize=q.itemsize, num_sms=num_multiprocessors(q.device),
            max_query_len=num_rows if max_query_len is None else max_query_len,
            max_context_len=(
                block_table.shape[1] * block_size if max_context_len is None else max_context_len
            ),
        )  # fmt: skip
    if config.block_m < group:
        raise ValueError(f"block_m {config.block_m} is less than a group of {group} heads")
    block_q = config.block_m // group
    splits = config.num_splits
    # Request r owns the query tiles from query_start_loc[r] // block_q + r on: enough for its
    # rows, whatever the lengths are (at most one in excess for each request).
    grid = (num_rows // block_q + num_requests, num_kv_heads, splits)
    cache_fp8, step_fp8 = key_cache.dtype == FP8, k_new.dtype == FP8
    one_page = block_size % config.block_n == 0
    window = sliding_window is not None
    launch = Launch(config, grid, one_page, window, bool(soft_cap), cache_fp8, step_fp8)
    if not num_rows or not num_requests:
        return launch
    parts, lses = out, out  # not read with one split
    if splits > 1:
        count = num_rows * num_heads * splits
        if buffers is None:
            buffers = scratch(num_rows, num_heads, dim, splits, q.device)
        parts, lses = buffers
        if parts.numel() < count * dim or lses.numel() < count:
            raise ValueError(f"buffers are too small for {num_rows} rows and {splits} splits")
    if window and depths is None:
        depths = count_depths(tree_mask, query_start_loc)
    dim_pad = max(_power_of_two(dim), 16)
    _attend[grid](
        q, k_new, v_new, key_cache, value_cache, block_table, context_lens, query_start_loc,
        tree_mask, depths, k_scale, v_scale, out, parts, lses,
        float(scale), float(soft_cap), sliding_window or 0, num_requests,
        *q.stride()[:2], *k_new.stride()[:2], *v_new.stride()[:2], *key_cache.stride()[:3],
        *value_cache.stride()[:3], block_table.stride(0), tree_mask.stride(0), *out.stride()[:2],
        GROUP=group, DIM=dim, DIM_PAD=dim_pad, PAGE=block_size, BLOCK_Q=block_q,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, SPLIT=splits > 1, ONE_PAGE=one_page,
        WINDOW=window, SOFT_CAP=bool(soft_cap), CACHE_FP8=cache_fp8, STEP_FP8=step_fp8,
        COMPUTE=_compute_type(q.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        _merge[(num_rows, num_heads)](
            parts, lses, query_start_loc, out, num_requests, splits, *out.stride()[:2],
            DIM=dim, DIM_PAD=dim_pad, SPLITS_PAD=_power_of_two(splits), num_warps=1,
        )  # fmt: skip
    return launch


def count_depths(tree_mask: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
    """Depth int32 [T] of each row: the bits of its mask less one; padding rows: undefined.

    Args:
        tree_mask: int32 [T, words].
        query_start_loc: int32 [R + 1].
    """
    depths = torch.empty(tree_mask.shape[0], dtype=torch.int32, device=tree_mask.device)
    if len(depths) and len(query_start_loc) > 1:
        _count_depths[(len(depths),)](
            tree_mask, query_start_loc, depths, query_start_loc.shape[0] - 1, tree_mask.stride(0),
            TILE=32, num_warps=1,
        )  # fmt: skip
    return depths


def check_layout(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    tree_mask: torch.Tensor,
    out: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    depths: torch.Tensor | None,
) -> None:
    """Refuse what the kernel would misread.

    Raises:
        ValueError: naming the argument.
    """
    rows, heads, dim = q.shape
    kv_heads = k_new.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads")
    if q.dtype not in FLOATS:
        raise ValueError(f"q is {q.dtype}, not one of {FLOATS}")
    for name, tensor, shape in (
        ("k_new", k_new, (rows, kv_heads, dim)),
        ("v_new", v_new, (rows, kv_heads, dim)),
        ("key_cache", key_cache, (*key_cache.shape[:2], kv_heads, dim)),
        ("value_cache", value_cache, (*key_cache.shape[:2], kv_heads, dim)),
        ("block_table", block_table, (len(context_lens), *block_table.shape[1:])),
        ("query_start_loc", query_start_loc, (len(context_lens) + 1,)),
        ("tree_mask", tree_mask, (rows, *tree_mask.shape[1:])),
        ("out", out, (rows, heads, dim)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    for name, tensor in (
        ("q", q), ("k_new", k_new), ("v_new", v_new), ("key_cache", key_cache),
        ("value_cache", value_cache), ("block_table", block_table), ("tree_mask", tree_mask),
        ("context_lens", context_lens), ("query_start_loc", query_start_loc), ("out", out),
    ):  # fmt: skip
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} is not contiguous")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    for name, tensor in (
        ("block_table", block_table), ("context_lens", context_lens),
        ("query_start_loc", query_start_loc), ("tree_mask", tree_mask),
    ):  # fmt: skip
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} is {tensor.dtype}, not int32")
    for name, keys, values in (("cache", key_cache, value_cache), ("step", k_new, v_new)):
        if keys.dtype != values.dtype:
            raise ValueError(f"{name}: keys are {keys.dtype}, values {values.dtype}")
        if keys.dtype not in (*FLOATS, FP8):
            raise ValueError(f"{name}: K/V of {keys.dtype}, not one of {(*FLOATS, FP8)}")
    if k_new.dtype == FP8 != key_cache.dtype:
        raise ValueError("float8 step tokens need a float8 cache")
    if depths is not None and (depths.shape != (rows,) or depths.dtype != torch.int32):
        raise ValueError(f"depths is {depths.dtype} {tuple(depths.shape)}, not int32 ({rows},)")
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is not None and (factor.numel() != 1 or factor.dtype != torch.float32):
            raise ValueError(f"{name} is not a float32 tensor of one element")


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device (no synchronisation); an H100's where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def _compute_type(dtype: torch.dtype):
    """Type of the operands of matrix products; Triton's interpreter has no bfloat16 there."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]


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
def _request_of(
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
    request = _request_of(query_start_loc, num_requests, row, 1, 0)
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

    request = _request_of(query_start_loc, num_requests, tile, BLOCK_Q, 1)
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
