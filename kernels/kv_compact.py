"""Accepted KV to its canonical slots, in every layer by one launch; oracle: `reference.kv_compact`.

A step writes the KV of its rows one after another behind the context. The accepted path is moved
together there. Its k-th row (from 1) stands at the k-th place or behind it, so moving in the order
of the path never overwrites a row that is still to be moved; within a tile of the path everything
is read before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class KVLayers(NamedTuple):
    """Where the KV of some layers of one geometry lies; made once by `kv_layers`."""

    pointers: torch.Tensor  # int64 [2 * layers], addresses of the first elements
    page: int  # tokens of a page
    heads: int
    dim: int
    strides: tuple[int, int, int]  # of page, slot and head, in elements
    itemsize: int
    aligned: bool  # every head's vector starts at a multiple of 16 bytes
    caches: tuple[torch.Tensor, ...]  # keeps the addresses valid


def kv_layers(key_caches: Sequence[torch.Tensor], value_caches: Sequence[torch.Tensor]) -> KVLayers:
    """The table of layers that `kv_compact` works on.

    Args:
        key_caches: of each layer [num_blocks, block_size, Hkv, D], views of one shape, type and
            strides; the elements of a head are contiguous. Layers that differ need a table of
            their own.
        value_caches: the same.

    Raises:
        ValueError: layers of different geometry.
    """
    caches = (*key_caches, *value_caches)
    first = caches[0]
    for cache in caches:
        if (cache.shape, cache.stride(), cache.dtype, cache.device) != (
            first.shape, first.stride(), first.dtype, first.device,
        ):  # fmt: skip
            raise ValueError("the caches differ in shape, strides, type or device")
    if first.stride(3) != 1:
        raise ValueError("the elements of a head are not contiguous")
    size = first.itemsize
    addresses = [cache.data_ptr() for cache in caches]
    strides = first.stride()[:3]
    return KVLayers(
        pointers=torch.tensor(addresses, dtype=torch.int64, device=first.device),
        page=first.shape[1], heads=first.shape[2], dim=first.shape[3], strides=strides,
        itemsize=size, caches=caches,
        aligned=not any(n % 16 for n in (*addresses, *(s * size for s in strides))),
    )  # fmt: skip


def kv_compact(
    layers: KVLayers,
    path: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    block_p: int = 16,
    block_c: int = 256,
) -> None:
    """Move the accepted path's KV in all layers; arguments as for `reference.kv_compact`, and:

    Args:
        layers: of `kv_layers`, instead of the caches.
        block_p: rows of the path that are moved at once; a power of two.
        block_c: elements of a row that one program moves; a power of two.

    Raises:
        ValueError: a shape, layout or type that the kernel does not take.
    """
    num_requests, max_depth = path.shape
    for name, tensor, shape in (
        ("path", path, (num_requests, max_depth)),
        ("context_lens", context_lens, (num_requests,)),
        ("block_table", block_table, (num_requests, *block_table.shape[1:])),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, not int32 {shape}")
        if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} is not contiguous")
    if not num_requests or not max_depth:
        return
    width = layers.heads * layers.dim
    block_c = min(block_c, triton.next_power_of_2(width))
    grid = (num_requests, layers.pointers.shape[0], triton.cdiv(width, block_c))
    _compact[grid](
        layers.pointers, path, context_lens, block_table, max_depth, path.stride(0),
        block_table.stride(0), *layers.strides, HEADS=layers.heads, DIM=layers.dim,
        PAGE=layers.page, ELEMENT=BITS[layers.itemsize], ALIGNED=layers.aligned, BLOCK_P=block_p,
        BLOCK_C=block_c,
    )  # fmt: skip


BITS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
"""Elements are moved as integers of their size: bit by bit, whatever they mean."""


@triton.jit(do_not_specialize=["max_depth", "stride_path", "stride_table"])
def _compact(
    pointers,  # int64 [2 * layers], each of a cache [num_blocks, PAGE, HEADS, DIM]
    path,  # int32 [R, max_depth]
    context_lens,  # int32 [R]
    block_table,  # int32 [R, max_blocks]
    max_depth,
    stride_path,
    stride_table,
    stride_page,
    stride_slot,
    stride_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One request, one layer's keys or values, some elements of each row."""
    request = tl.program_id(0).to(tl.int64)
    cache = tl.load(pointers + tl.program_id(1)).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        cache = tl.multiple_of(cache, 16)
    context = tl.load(context_lens + request)
    column = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    element = (column // DIM) * stride_head + column % DIM
    in_row = column < HEADS * DIM
    table = block_table + request * stride_table
    for first in range(0, max_depth, BLOCK_P):
        depth = first + tl.arange(0, BLOCK_P)
        row = tl.load(path + request * stride_path + depth, mask=depth < max_depth, other=-1)
        moved = (row >= 0) & (row != depth + 1)
        source = context + row
        target = context + 1 + depth
        source_page = tl.load(table + source // PAGE, mask=moved, other=0).to(tl.int64)
        target_page = tl.load(table + target // PAGE, mask=moved, other=0).to(tl.int64)
        source_at = source_page * stride_page + source % PAGE * stride_slot
        target_at = target_page * stride_page + target % PAGE * stride_slot
        mask = moved[:, None] & in_row[None, :]
        kept = tl.load(cache + source_at[:, None] + element[None, :], mask=mask)
        tl.debug_barrier()  # all threads have read: a target may be another thread's source
        tl.store(cache + target_at[:, None] + element[None, :], kept, mask=mask)
        tl.debug_barrier()  # nothing of the next tile is read before this one is written
