"""What tree attention takes: shapes, layouts and types, checked before each launch."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


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
