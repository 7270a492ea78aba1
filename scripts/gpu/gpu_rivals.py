"""Tree attention and what it is compared with, as calls on the same inputs.

Each function makes a call from `Inputs`; `Missing` says why there is none here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from gpu_inputs import Inputs

from vllm_ouroboros.kernels.launch import LaunchConfig
from vllm_ouroboros.kernels.tree_attention import scratch, tree_attention


class Call(NamedTuple):
    """What is timed, and how its result becomes rows [T, Hq, D] (which is not timed)."""

    run: Callable[[], torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach


class Missing(Exception):
    """A kernel is not installed."""


def ours(given: Inputs, config: LaunchConfig) -> Call:
    heads, _, dim = given.cell.heads
    buffers = scratch(len(given.q), heads, dim, config.num_splits, given.q.device)

    def run() -> torch.Tensor:
        tree_attention(
            given.q, given.k_new, given.v_new, given.keys, given.values, given.table,
            given.contexts, given.starts, given.mask, given.scale, given.out,
            max_query_len=given.cell.nodes, max_context_len=given.cell.context, config=config,
            buffers=buffers,
        )  # fmt: skip
        return given.out

    return Call(run)


def vllm_triton(given: Inputs) -> Call:
    """vLLM's Triton attention, causal over as many queries, as its Triton backend calls it."""
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError as error:
        raise Missing(f"vLLM is not installed: {error}") from None
    kv_heads = given.cell.heads[1]
    one = torch.ones(1, device=given.q.device).expand(given.cell.batch, kv_heads)
    out = torch.empty_like(given.q)

    def run() -> torch.Tensor:
        # More than one query a request: the backend's buffers for split softmaxes play no part.
        unified_attention(
            q=given.q, k=given.keys, v=given.values, out=out, cu_seqlens_q=given.starts,
            max_seqlen_q=given.cell.nodes, seqused_k=given.lengths,
            max_seqlen_k=given.cell.context + given.cell.nodes, softmax_scale=given.scale,
            causal=True, window_size=(-1, -1), block_table=given.table, softcap=0.0,
            q_descale=None, k_descale=one, v_descale=one,
        )  # fmt: skip
        return out

    return Call(run)


def flash_attention(given: Inputs) -> Call:
    """FlashAttention, causal over as many queries: vLLM's build (version 3 if it runs here), else
    the package flash_attn over gathered K/V."""
    nodes = given.cell.nodes
    out = torch.empty_like(given.q)
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported
    except ImportError:
        return _flash_attn_package(given)
    version = next((v for v in (3, 2) if is_fa_version_supported(v)), None)
    if version is None:
        return _flash_attn_package(given)

    def run() -> torch.Tensor:
        return flash_attn_varlen_func(
            given.q, given.keys, given.values, max_seqlen_q=nodes, cu_seqlens_q=given.starts,
            max_seqlen_k=given.cell.context + nodes, seqused_k=given.lengths,
            softmax_scale=given.scale, causal=True, block_table=given.table, out=out,
            fa_version=version,
        )  # fmt: skip

    return Call(run)


def _flash_attn_package(given: Inputs) -> Call:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError as error:
        raise Missing(f"neither vLLM's FlashAttention nor flash_attn: {error}") from None
    keys, values = (t.transpose(1, 2).contiguous() for t in given.gathered())
    q = given.q.view(given.cell.batch, given.cell.nodes, *given.q.shape[1:])

    def run() -> torch.Tensor:
        return flash_attn_with_kvcache(
            q, keys, values, cache_seqlens=given.lengths, softmax_scale=given.scale, causal=True
        )

    return Call(run, lambda result: result.flatten(0, 1))


def sdpa(given: Inputs) -> Call:
    """torch's attention with a dense mask over gathered K/V; gathering does not count.

    Queries and heads of a group are the rows of one matrix, so that K/V need no copies.
    """
    batch, nodes, context = given.cell.batch, given.cell.nodes, given.cell.context
    heads, kv_heads, dim = given.cell.heads
    group = heads // kv_heads
    keys, values = given.gathered()
    q = given.q.view(batch, nodes, kv_heads, group, dim).permute(0, 2, 1, 3, 4)
    q = q.reshape(batch, kv_heads, nodes * group, dim)
    length = context + nodes
    padded = -(-length // 16) * 16  # rows of the mask must be aligned
    bias = torch.zeros(batch, 1, nodes * group, padded, dtype=q.dtype, device=given.q.device)
    hidden = ~given.seen.repeat_interleave(group, dim=1)[:, None]
    bias[..., context:length].masked_fill_(hidden, float("-inf"))
    bias = bias[..., :length].expand(-1, kv_heads, -1, -1)

    def run() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=bias, scale=given.scale
        )

    def rows(result: torch.Tensor) -> torch.Tensor:
        result = result.view(batch, kv_heads, nodes, group, dim).permute(0, 2, 1, 3, 4)
        return result.reshape(batch * nodes, heads, dim)

    return Call(run, rows)


@cache
def _compiled_flex():
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError as error:
        raise Missing(f"this torch has no flex_attention: {error}") from None
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(flex_attention, dynamic=False)


def flex(given: Inputs) -> Call:
    """torch's flex_attention with the tree's mask over gathered K/V; gathering does not count."""
    flex_attention = _compiled_flex()
    from torch.nn.attention.flex_attention import create_block_mask

    batch, nodes, context = given.cell.batch, given.cell.nodes, given.cell.context
    keys, values = given.gathered()
    q = given.q.view(batch, nodes, *given.q.shape[1:]).transpose(1, 2).contiguous()
    seen = given.seen

    def visible(b, h, row, column):
        step = (column - context).clamp(0, nodes - 1)
        return (column < context) | seen[b, row, step]

    mask = create_block_mask(visible, batch, None, nodes, context + nodes, device=given.q.device)

    def run() -> torch.Tensor:
        return flex_attention(q, keys, values, block_mask=mask, scale=given.scale, enable_gqa=True)

    return Call(run, lambda result: result.transpose(1, 2).flatten(0, 1))


RIVALS: dict[str, Callable[[Inputs], Call]] = {
    "vllm triton, causal": vllm_triton,
    "flash attention, causal": flash_attention,
    "torch sdpa, dense mask, gathered": sdpa,
    "torch flex_attention, gathered": flex,
}
SAME_MASK = ("torch sdpa, dense mask, gathered",)
"""Those that ours is compared with."""
