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
import triton.language as tl

from .launch import LaunchConfig, gpu_of, launch_config, power_of_two
from .tree_attention_device import INTERPRETED, _attend, _merge
from .tree_attention_layout import FP8, check_layout
from .tree_depths import _count_depths
from .tuned import Shape, best_config

__all__ = ["Launch", "LaunchConfig", "count_depths", "launch_config", "scratch", "tree_attention"]


class Launch(NamedTuple):
    """What a call launched; tests assert on it."""

    config: LaunchConfig
    grid: tuple[int, int, int]
    one_page: bool  # a context tile never crosses a page: one look-up for all its keys
    window: bool
    soft_cap: bool
    cache_fp8: bool
    step_fp8: bool


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
        config: how to cut the work; None: `tuned.best_config`, with no more splits than ``buffers``
            hold.
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
        context = block_table.shape[1] * block_size if max_context_len is None else max_context_len
        queries = num_rows if max_query_len is None else max_query_len
        shape = Shape(dim, group, q.itemsize, block_size, num_kv_heads, num_rows, queries, context)
        config = best_config(gpu_of(q.device), shape)
        if buffers is not None:  # no more splits than there is room for
            room = min(buffers[0].numel() // max(dim, 1), buffers[1].numel())
            room //= max(num_rows * num_heads, 1)
            config = config._replace(num_splits=max(min(config.num_splits, room), 1))
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
    dim_pad = max(power_of_two(dim), 16)
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
            DIM=dim, DIM_PAD=dim_pad, SPLITS_PAD=power_of_two(splits), num_warps=1,
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


def _compute_type(dtype: torch.dtype):
    """Type of the operands of matrix products; Triton's interpreter has no bfloat16 there."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]
