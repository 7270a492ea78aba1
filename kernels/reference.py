"""Torch oracles of the kernels: plain, slow, and the definition of what is right."""

from __future__ import annotations

from collections.abc import Sequence

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


def choose_tokens(
    logits: torch.Tensor,
    query_start_loc: torch.Tensor,
    depths: torch.Tensor,
    temperatures: torch.Tensor | None,
    predicted: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> None:
    """The target's choice after each row: argmax(logits / temperature + Gumbel noise).

    Of equal tokens the first is chosen. Noise belongs to a place in the text: rows of one request
    that have the same depth share it, and so does a draft that asks for the same place.

    Args:
        logits: [T, V], processed but for the temperature.
        query_start_loc: int32 [R + 1], first row of each request.
        depths: int32 [T], depth of each row below the first of its request.
        temperatures: float32 [R], greedy below 1e-5; None: all are greedy.
        predicted: int32 or int64 [T], written; rows behind the last request are left alone.
        noise: float32 [R, depths, V], Gumbel noise of each depth.
        seeds: int64 [R], instead of ``noise``: it comes from `gumbel_noise`.
        positions: int32 or int64 [R], place in the text of the token after a request's first row.
    """
    vocab = torch.arange(logits.shape[1], device=logits.device)
    for r in range(query_start_loc.shape[0] - 1):
        for row in range(query_start_loc[r].item(), query_start_loc[r + 1].item()):
            scores = logits[row].float()
            if temperatures is not None and temperatures[r] >= 1e-5:
                scores = scores / temperatures[r]
                if noise is not None:
                    scores = scores + noise[r, depths[row]]
                elif seeds is not None and positions is not None:
                    place = int(positions[r] + depths[row])
                    scores = scores + gumbel_noise(int(seeds[r]), place, vocab)
            predicted[row] = (scores == scores.max()).nonzero()[0, 0]


def gumbel_noise(seed: int, position: int, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of (seed, position, token), float32 of the shape of ``tokens``.

    -log(E) of an exponential E = -log(1 - u); u comes from the first word of Philox-4x32-10 (Salmon
    et al., "Parallel random numbers: as easy as 1, 2, 3") with the key ``seed`` and the counter
    (token, position, 0, 0).
    """
    u = (philox(seed, tokens, position).float() + 0.5) * 2.0**-32
    u = u.clamp(max=1 - 2.0**-24)
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * (0.25 + u * 0.2))))
    return -torch.where(u < 2.0**-4, series, -torch.log(1 - u)).log()


def philox(seed: int, tokens: torch.Tensor, position: int) -> torch.Tensor:
    """First word of Philox-4x32-10 of the counter (token, position, 0, 0): int64 below 2**32."""
    word = 0xFFFFFFFF
    c0 = tokens.to(torch.int64) & word
    c1 = torch.full_like(c0, position & word)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & word, seed >> 32 & word
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of the product of 32-bit words, within int64."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # both below 2**48
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | (low & 0xFFFF)


def accept_trees(
    tokens: torch.Tensor,
    parents: torch.Tensor,
    query_start_loc: torch.Tensor,
    predicted: torch.Tensor,
    out_path: torch.Tensor,
    out_len: torch.Tensor,
    out_tokens: torch.Tensor,
    *,
    stops: torch.Tensor | None = None,
) -> None:
    """Walk the trees of a batch from their first rows on.

    A child is accepted if and only if it equals the token that the target chooses at its parent;
    of equal children the first. The walk ends where no child is accepted, at a token that ends
    the text, and after max_depth rows; the token chosen there is the one after the path.

    Args:
        tokens: int32 or int64 [T].
        parents: int32 [T], rows counted from the first of the request, which is the root; a row
            stands behind its parent; -1: no parent.
        query_start_loc: int32 [R + 1].
        predicted: int32 or int64 [T], the target's choice after each row; negative: none.
        out_path: int32 [R, max_depth], written: accepted rows, counted from the first of the
            request, padded with -1.
        out_len: int32 [R], written: how many.
        out_tokens: int32 or int64 [R, max_depth + 1], written: their tokens and the one after the
            path, padded with -1. A request without rows has none.
        stops: int32 or int64 [R, S], tokens that end a request's text, padded with -1.
    """
    out_path.fill_(-1)
    out_tokens.fill_(-1)
    out_len.zero_()
    for r in range(out_len.shape[0]):
        first, end = query_start_loc[r].item(), query_start_loc[r + 1].item()
        ends = set() if stops is None else set(stops[r].tolist()) - {-1}
        drafted = list(zip(parents[first:end].tolist(), tokens[first:end].tolist(), strict=True))
        row: int | None = 0 if drafted else None
        length = 0
        while row is not None:
            token = int(predicted[first + row])
            out_tokens[r, length] = token
            if token < 0 or token in ends or length == out_path.shape[1]:
                break
            children = range(row + 1, len(drafted))
            row = next((i for i in children if drafted[i] == (row, token)), None)
            if row is not None:
                out_path[r, length] = row
                length += 1
        out_len[r] = length


def kv_compact(
    key_caches: Sequence[torch.Tensor],
    value_caches: Sequence[torch.Tensor],
    path: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """Move the accepted path's KV to the places where the next step expects it.

    Row i of a request's step was written at position ``context_lens + i``; the k-th row of the
    path (from 1) belongs at ``context_lens + k``.

    Args:
        key_caches: of each layer [num_blocks, block_size, Hkv, D], may be strided views; written.
        value_caches: the same.
        path: int32 [R, max_depth] as `accept_trees` writes it: ascending rows, none above its
            number in the path, padded with -1.
        context_lens: int32 [R], committed tokens in the cache before the step.
        block_table: int32 [R, max_blocks].
    """
    page = key_caches[0].shape[1]
    for r in range(path.shape[0]):
        rows = path[r][path[r] >= 0].long()
        source = context_lens[r].long() + rows
        target = context_lens[r].long() + 1 + torch.arange(len(rows), device=rows.device)
        pages = block_table[r].long()
        for cache in (*key_caches, *value_caches):
            kept = cache[pages[source // page], source % page].clone()
            cache[pages[target // page], target % page] = kept
