"""Torch oracles of the kernels: plain, slow, and the definition of what is right."""

from __future__ import annotations

import torch


def unpack_mask(tree_mask: torch.Tensor, width: int) -> torch.Tensor:
    """Bits of a packed mask as booleans.

    Args:
        tree_mask: int32 [T, words], little-endian words.
        width: columns wanted, at most 32 * words.

    Returns:
        bool [T, width].
    """
    bits = torch.arange(32, dtype=torch.int32, device=tree_mask.device)
    return ((tree_mask[:, :, None] >> bits) & 1).flatten(1)[:, :width].bool()


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
) -> None:
    """Attention of step tokens over the paged context and, by mask, over each other.

    Args:
        q: [T, Hq, D].
        k_new: [T, Hkv, D], keys of this step's tokens.
        v_new: [T, Hkv, D].
        key_cache: [num_blocks, block_size, Hkv, D], may be a strided view.
        value_cache: the same.
        block_table: int32 [R, max_blocks].
        context_lens: int32 [R], committed tokens in the cache.
        query_start_loc: int32 [R + 1], first step token of each request.
        tree_mask: int32 [T, words]; bit j of row i is set when token i sees token j of the same
            request's step, itself included. A token's depth is the number of its bits less one.
        scale: factor of the scores.
        out: [T, Hq, D], written.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; 0 turns it off.
        sliding_window: a token at position p sees positions above ``p - sliding_window`` only,
            positions being context length plus depth; None turns it off.
    """
    block_size = key_cache.shape[1]
    group = q.shape[1] // k_new.shape[1]
    for r, context in enumerate(context_lens.tolist()):
        start, end = query_start_loc[r].item(), query_start_loc[r + 1].item()
        blocks = block_table[r, : -(-context // block_size)].long()
        keys = torch.cat([key_cache[blocks].flatten(0, 1)[:context], k_new[start:end]])
        values = torch.cat([value_cache[blocks].flatten(0, 1)[:context], v_new[start:end]])
        step = unpack_mask(tree_mask[start:end], end - start)
        seen = torch.cat([step.new_ones(end - start, context), step], dim=1)
        if sliding_window is not None:
            depth = context + step.sum(1) - 1
            position = torch.cat([torch.arange(context, device=q.device), depth])
            seen &= position[None, :] > depth[:, None] - sliding_window
        keys = keys.repeat_interleave(group, dim=1)
        values = values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[start:end] * scale, keys.to(q.dtype))
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        out[start:end] = torch.einsum("hqk,khd->qhd", weights, values.to(q.dtype))
