"""Acceptance on the device, in Triton: what the target chooses, and the walk through the trees.

The oracles are `reference.choose_tokens` and `reference.accept_trees`. Nothing goes back to the
host between the logits and the accepted path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GREEDY_BELOW = tl.constexpr(1e-5)  # temperatures below are greedy, as in vLLM
NO_NOISE = tl.constexpr(0)
GIVEN_NOISE = tl.constexpr(1)
SEEDED_NOISE = tl.constexpr(2)


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
    chunk: int = 16384,
) -> None:
    """The target's choice after each row: argmax(logits / temperature + Gumbel noise).

    Arguments as for `reference.choose_tokens`, and:

    Args:
        chunk: entries of the vocabulary that one program reads.

    Raises:
        ValueError: a shape, layout or type that the kernel does not take.
    """
    num_rows, vocab = logits.shape
    num_requests = query_start_loc.shape[0] - 1
    _check("query_start_loc", query_start_loc, (num_requests + 1,), torch.int32)
    _check("depths", depths, (num_rows,), torch.int32)
    _check("predicted", predicted, (num_rows,), torch.int32, torch.int64)
    if logits.stride(1) != 1 or not logits.is_floating_point():
        raise ValueError("logits are no rows of contiguous floats")
    if noise is not None and seeds is not None:
        raise ValueError("noise is given and seeded: which of the two?")
    if temperatures is not None:
        _check("temperatures", temperatures, (num_requests,), torch.float32)
        if noise is None and seeds is None:
            raise ValueError("temperatures without noise: give noise, or seeds and positions")
    mode, noise_strides = NO_NOISE.value, (0, 0)
    if temperatures is not None and noise is not None:
        mode, noise_strides = GIVEN_NOISE.value, noise.stride()[:2]
        _check("noise", noise, (num_requests, noise.shape[1], vocab), torch.float32, strided=True)
    elif temperatures is not None and seeds is not None:
        mode = SEEDED_NOISE.value
        _check("seeds", seeds, (num_requests,), torch.int64)
        if positions is None:
            raise ValueError("seeds without positions")
        _check("positions", positions, (num_requests,), torch.int32, torch.int64)
    if not num_rows or not num_requests:
        return
    tile = min(1024, triton.next_power_of_2(vocab))
    chunk = triton.cdiv(min(chunk, vocab), tile) * tile
    chunks = triton.cdiv(vocab, chunk)
    best = torch.empty(num_rows, chunks, dtype=torch.float32, device=logits.device)
    index = torch.empty(num_rows, chunks, dtype=torch.int32, device=logits.device)
    _best_of_chunk[(num_rows, chunks)](
        logits, query_start_loc, depths, temperatures, noise, seeds, positions, best, index,
        num_requests, vocab, chunk, logits.stride(0), *noise_strides, MODE=mode, TILE=tile,
    )  # fmt: skip
    _best_of_row[(num_rows,)](
        best, index, query_start_loc, predicted, num_requests, chunks,
        CHUNKS_PAD=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip


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
    """Walk the trees of a batch; arguments as for `reference.accept_trees`.

    Raises:
        ValueError: a shape, layout or type that the kernel does not take.
    """
    num_rows, (num_requests, max_depth) = tokens.shape[0], out_path.shape
    _check("tokens", tokens, (num_rows,), torch.int32, torch.int64)
    _check("parents", parents, (num_rows,), torch.int32)
    _check("query_start_loc", query_start_loc, (num_requests + 1,), torch.int32)
    _check("predicted", predicted, (num_rows,), torch.int32, torch.int64)
    _check("out_path", out_path, (num_requests, max_depth), torch.int32)
    _check("out_len", out_len, (num_requests,), torch.int32)
    _check("out_tokens", out_tokens, (num_requests, max_depth + 1), torch.int32, torch.int64)
    num_stops = 0
    if stops is not None:
        num_stops = stops.shape[1]
        _check("stops", stops, (num_requests, num_stops), torch.int32, torch.int64)
    if num_requests:
        _walk[(num_requests,)](
            tokens, parents, query_start_loc, predicted, stops, out_path, out_len, out_tokens,
            max_depth, num_stops, TILE=64, OUT_TILE=triton.next_power_of_2(max_depth + 1),
            STOPS_PAD=triton.next_power_of_2(num_stops) if num_stops else 0, num_warps=1,
        )  # fmt: skip


def _check(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], *dtypes: torch.dtype, strided=False
) -> None:
    """Refuse a tensor that the kernel would misread; ``strided``: only its rows are contiguous."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, not one of {dtypes}")
    if not (tensor.stride(-1) == 1 if strided else tensor.is_contiguous()):
        raise ValueError(f"{name} is not contiguous")


@triton.jit
def gumbel_noise(
    seed,  # int64, the request's
    position,  # int32 or int64, place of the token in the text
    token,  # int32 block
):
    """Gumbel noise of (seed, position, token): Philox of the counter (token, position, 0, 0).

    It is -log(E) of an exponential E = -log(1 - u), with a series where u is small: that is where
    the greatest noise comes from, which must not be rounded to a few values.
    """
    zero = token * 0
    place = (zero + position).to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, token.to(tl.uint32), place, zero.to(tl.uint32),
                              zero.to(tl.uint32))  # fmt: skip
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = tl.minimum(u, 0.99999994)
    series = u * (1 + u * (0.5 + u * (0.33333334 + u * (0.25 + u * 0.2))))
    return -tl.log(tl.where(u < 0.0625, series, -tl.log(1 - u)))


@triton.jit(do_not_specialize=["num_requests"])
def _best_of_chunk(
    logits,  # [T, V]
    query_start_loc,  # int32 [R + 1]
    depths,  # int32 [T]
    temperatures,  # float32 [R]
    noise,  # float32 [R, depths, V]
    seeds,  # int64 [R]
    positions,  # int32 or int64 [R]
    best,  # float32 [T, chunks], written
    index,  # int32 [T, chunks], written
    num_requests,
    vocab,
    chunk,
    stride_logits,
    stride_noise,
    stride_noise_depth,
    MODE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row, one chunk of the vocabulary; the first of equals."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    if row >= tl.load(query_start_loc + num_requests):
        return
    low = row * 0  # the last request that starts at or before the row: it owns the row
    high = num_requests + low
    while high - low > 1:
        middle = (low + high) // 2
        ahead = tl.load(query_start_loc + middle) > row
        low = tl.where(ahead, low, middle)
        high = tl.where(ahead, middle, high)
    temperature = 0.0
    if MODE != NO_NOISE:
        temperature = tl.load(temperatures + low)
    greedy = temperature < GREEDY_BELOW
    divisor = tl.where(greedy, 1.0, temperature)
    depth = tl.load(depths + row)
    own = logits + row.to(tl.int64) * stride_logits
    offset = tl.arange(0, TILE)
    value = float("-inf")
    token = part * chunk
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, vocab), TILE):
        column = first + offset
        inside = column < vocab
        score = tl.load(own + column, mask=inside, other=float("-inf")).to(tl.float32)
        if MODE != NO_NOISE:
            score = tl.div_rn(score, divisor)
            if not greedy:
                if MODE == GIVEN_NOISE:
                    place = low.to(tl.int64) * stride_noise + depth * stride_noise_depth
                    score += tl.load(noise + place + column, mask=inside, other=0.0)
                else:
                    position = tl.load(positions + low) + depth
                    score += gumbel_noise(tl.load(seeds + low), position, column)
        top, where = tl.max(score, axis=0, return_indices=True)
        token = tl.where(top > value, first + where, token)
        value = tl.maximum(top, value)
    tl.store(best + row * tl.num_programs(1) + part, value)
    tl.store(index + row * tl.num_programs(1) + part, token)


@triton.jit(do_not_specialize=["num_requests", "chunks"])
def _best_of_row(
    best,  # float32 [T, chunks]
    index,  # int32 [T, chunks]
    query_start_loc,  # int32 [R + 1]
    predicted,  # int32 or int64 [T], written
    num_requests,
    chunks,
    CHUNKS_PAD: tl.constexpr,
):
    """The best of a row's chunks; of equals the first."""
    row = tl.program_id(0)
    if row >= tl.load(query_start_loc + num_requests):
        return
    chunk = tl.arange(0, CHUNKS_PAD)
    value = tl.load(best + row * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    where = tl.argmax(value, axis=0)
    token = tl.load(index + row * chunks + where)
    tl.store(predicted + row, token.to(predicted.dtype.element_ty))


@triton.jit(do_not_specialize=["max_depth", "num_stops"])
def _walk(
    tokens,  # int32 or int64 [T]
    parents,  # int32 [T]
    query_start_loc,  # int32 [R + 1]
    predicted,  # int32 or int64 [T]
    stops,  # int32 or int64 [R, num_stops], or None
    out_path,  # int32 [R, max_depth], written
    out_len,  # int32 [R], written
    out_tokens,  # int32 or int64 [R, max_depth + 1], written
    max_depth,
    num_stops,
    TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    STOPS_PAD: tl.constexpr,
):
    """One request. Parents stand before their children, so one pass over the rows is enough."""
    request = tl.program_id(0)
    start = tl.load(query_start_loc + request)
    num_rows = tl.load(query_start_loc + request + 1) - start
    path = out_path + request * max_depth
    chosen = out_tokens + request * (max_depth + 1)
    offset = tl.arange(0, TILE)
    length = request * 0
    row = request * 0
    going = num_rows > 0
    while going:
        token = tl.load(predicted + start + row)
        tl.store(chosen + length, token.to(out_tokens.dtype.element_ty))
        end = num_rows
        if STOPS_PAD:
            stop = tl.arange(0, STOPS_PAD)
            own = tl.load(stops + request * num_stops + stop, mask=stop < num_stops, other=-1)
            end = tl.where(tl.max((own == token).to(tl.int32), axis=0) > 0, 0, end)
        end = tl.where((length < max_depth) & (token >= 0), end, 0)
        # A child is accepted if and only if it equals the token that the target chooses here.
        child = num_rows
        first = row + 1
        while (first < end) & (child == num_rows):
            candidate = first + offset
            inside = candidate < end
            parent = tl.load(parents + start + candidate, mask=inside, other=-1)
            drafted = tl.load(tokens + start + candidate, mask=inside, other=-1)
            match = inside & (parent == row) & (drafted == token)
            child = tl.min(tl.where(match, candidate, num_rows), axis=0)
            first += TILE
        going = child < num_rows
        if going:
            tl.store(path + length, child)
            length += 1
            row = child
    tl.store(out_len + request, length)
    place = tl.arange(0, OUT_TILE)
    tl.store(path + place, place * 0 - 1, mask=(place >= length) & (place < max_depth))
    emitted = length + (num_rows > 0).to(tl.int32)
    padding = (place * 0 - 1).to(out_tokens.dtype.element_ty)
    tl.store(chosen + place, padding, mask=(place >= emitted) & (place <= max_depth))
