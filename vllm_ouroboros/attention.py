"""Tree attention on the CPU, exact, over vLLM's paged KV cache.

Rows of a request that branches attend by mask: to the whole context in the cache, to their
ancestors in the step and to themselves. Everything else (prefill, plain decode, chains) stays on
vLLM's own C++ kernel. A forward's tree travels as `TreeStep` on the attention metadata.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.kernels.reference import unpack_mask

MAX_SCORES = 2**21
"""Scores of one head that a padded batch may have (8 MiB), if it holds more than one request."""


@dataclass
class KeptKV:
    """One layer's keys and values of the step's tree rows, and how to write them again."""

    impl: CPUAttentionBackendImpl
    layer: torch.nn.Module
    kv_cache: torch.Tensor
    keys: torch.Tensor  # [tree rows, Hkv, D]
    values: torch.Tensor  # [tree rows, Hkv, D]

    def write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Write tree rows int64 [M] to KV slots int64 [M]."""
        keys, values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        self.impl.do_kv_cache_update(self.layer, keys, values, self.kv_cache, slots)


@dataclass
class Bucket:
    """Requests of similar context length, attended in one padded batch.

    Sizes: R requests, Q rows each at most, P pages each at most, S = P * block_size + Q.
    """

    rows: torch.Tensor | None  # int64 [R * Q] among the tree rows (padding: row 0); None: all
    pages: torch.Tensor  # int64 [R * P], blocks of the cache; padding repeats block 0
    bias: torch.Tensor  # float32 [R, 1, 1, Q, S], 0 where a row sees a key, else -inf
    valid: torch.Tensor | None  # int64 [*], positions in ``rows`` that are no padding
    targets: torch.Tensor | None  # int64 [*], their rows among the tree rows


@dataclass
class TreeStep:
    """The trees of one forward: what each of its tree rows may see.

    Attributes:
        rows: int64 [T], rows of the forward that belong to trees, request by request.
        query_start_loc: list [R + 1], first tree row of each request.
        context_lens: list [R], tokens of each request in the KV cache before the step.
        block_table: int32 [R, max_blocks].
        mask: int32 [T, words], see `kernels.reference.tree_attention`.
        num_rows: rows of the whole forward.
        keep: whether the forward keeps keys and values, so that `write` can move them.
        kept: filled by the forward, by layer name.
    """

    rows: torch.Tensor
    query_start_loc: list[int]
    context_lens: list[int]
    block_table: torch.Tensor
    mask: torch.Tensor
    num_rows: int
    keep: bool = True
    kept: dict[str, KeptKV] = field(default_factory=dict)
    _buckets: dict[tuple[int, int], list[Bucket]] = field(default_factory=dict)

    @property
    def covers_all(self) -> bool:
        """Whether no row of the forward needs the native kernel."""
        return self.rows.shape[0] == self.num_rows

    def write(self, moves: torch.Tensor) -> None:
        """Copy accepted rows to their canonical KV slots, in every layer that was run.

        Args:
            moves: int64 [M, 3] of (request of this step, tree row, position in the text).
        """
        if not len(moves) or not self.kept:
            return
        requests, rows, positions = moves.unbind(1)
        block_size = next(iter(self.kept.values())).kv_cache.shape[2]
        blocks = self.block_table[requests, positions // block_size].long()
        slots = blocks * block_size + positions % block_size
        for kept in self.kept.values():
            kept.write(rows, slots)

    def buckets(self, block_size: int, sliding_window: int) -> list[Bucket]:
        """Padded batches for one page size and window (-1: none), made once a forward."""
        key = (block_size, sliding_window)
        if key not in self._buckets:
            groups: dict[int, list[int]] = {}
            for r, context in enumerate(self.context_lens):
                pages = -(-context // block_size)
                groups.setdefault(pages.bit_length(), []).append(r)
            parts = [part for g in groups.values() for part in self._parts(g, block_size)]
            self._buckets[key] = [self._bucket(part, *key) for part in parts]
        return self._buckets[key]

    def _parts(self, requests: list[int], block_size: int) -> list[list[int]]:
        """Cut a group so that the scores of one head fit into `MAX_SCORES`."""
        width = max(self.query_start_loc[r + 1] - self.query_start_loc[r] for r in requests)
        length = max(self.context_lens[r] for r in requests) + block_size + width
        most = max(1, MAX_SCORES // (width * length))
        return [requests[i : i + most] for i in range(0, len(requests), most)]

    def _bucket(self, requests: list[int], block_size: int, sliding_window: int) -> Bucket:
        starts = torch.tensor([self.query_start_loc[r] for r in requests])
        ends = torch.tensor([self.query_start_loc[r + 1] for r in requests])
        contexts = torch.tensor([self.context_lens[r] for r in requests])
        width = int((ends - starts).max())
        num_pages = -(-int(contexts.max()) // block_size)

        index = torch.arange(width)
        real = index < (ends - starts)[:, None]  # [R, Q]
        rows = torch.where(real, starts[:, None] + index, 0)
        step = unpack_mask(self.mask[rows.flatten()], width).view(len(requests), width, width)
        slot = torch.arange(num_pages * block_size)
        context = (slot < contexts[:, None])[:, None, :]  # [R, 1, P * block_size]
        if sliding_window > 0:
            position = contexts[:, None] + step.sum(-1) - 1  # [R, Q]
            context = context & (slot > position[..., None] - sliding_window)
            step = step & (position[:, None, :] > position[..., None] - sliding_window)
        seen = torch.cat([context.expand(-1, width, -1), step], dim=-1)
        bias = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None, None]
        used = torch.arange(num_pages) * block_size < contexts[:, None]
        table = self.block_table[torch.tensor(requests), :num_pages]
        pages = torch.where(used, table, 0).long().flatten()
        whole = bool(real.all())
        if whole and len(requests) == len(self.context_lens):
            return Bucket(None, pages, bias, None, None)
        flat = rows.flatten()
        valid = real.flatten().nonzero().flatten()
        return Bucket(flat, pages, bias, None if whole else valid, flat[valid])


@dataclass
class TreeOnly:
    """Metadata of a forward whose rows all belong to trees: vLLM's kernel sees none of it."""

    tree: TreeStep


class TreeAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Keeps the page layout that `TreeAttentionImpl` reads."""

    isa: str

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.isa == "amx":
            self.isa = "vec"
            self._set_isa_to_layers(self.layer_names)
        check_layout(self.isa, self.dtype, self.block_size, self.head_dim)


class TreeAttentionImpl(CPUAttentionBackendImpl):
    """The CPU implementation, tree rows included."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name, value in (("ALiBi", self.alibi_slopes), ("attention sinks", self.sinks)):
            if value is not None:
                raise ConfigError(f"this model uses {name}, which tree attention cannot do yet")

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ):
        """See `CPUAttentionBackendImpl.forward`; shapes as there."""
        tree = None if attn_metadata is None else getattr(attn_metadata, "tree", None)
        if tree is None or not tree.covers_all:
            super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        if tree is None:
            return output
        if tree.covers_all:
            queries, keys, values = (t[: tree.num_rows] for t in (query, key, value))
            if tree.keep:  # copies: the compiled graph around us may reuse its tensors' memory
                keys, values = keys.clone(), values.clone()
        else:
            queries, keys, values = (t.index_select(0, tree.rows) for t in (query, key, value))
        if tree.keep:
            tree.kept[layer.layer_name] = KeptKV(self, layer, kv_cache, keys, values)
        for bucket in tree.buckets(kv_cache.shape[2], self.sliding_window):
            result = self._attend(bucket, queries, keys, values, kv_cache)
            result = result.view(-1, *output.shape[1:]).to(output.dtype)
            if bucket.targets is not None:
                output[tree.rows[bucket.targets]] = result
            elif tree.covers_all:
                output[: tree.num_rows] = result
            else:
                output[tree.rows] = result
        return output

    def _attend(self, bucket: Bucket, query, key, value, kv_cache) -> torch.Tensor:
        """Attention of a bucket in float32: [real rows, Hq, D]."""
        num_requests, width = bucket.bias.shape[0], bucket.bias.shape[3]
        num_kv, dim, block_size = self.num_kv_heads, self.head_size, kv_cache.shape[2]
        group = self.num_heads // num_kv
        num_pages = bucket.pages.shape[0] // num_requests
        if bucket.rows is not None:
            query, key, value = (t.index_select(0, bucket.rows) for t in (query, key, value))

        context = num_pages * block_size
        length = context + width
        k = torch.empty(num_requests, num_kv, dim, length)
        v = torch.empty(num_requests, num_kv, length, dim)
        if num_pages:
            key_pages, value_pages = split_pages(kv_cache)
            pages = (num_requests, num_pages, num_kv)
            old = key_pages.index_select(0, bucket.pages).view(*pages, dim, block_size)
            k[..., :context].unflatten(-1, (num_pages, block_size)).copy_(
                old.permute(0, 2, 3, 1, 4)
            )
            old = value_pages.index_select(0, bucket.pages).view(*pages, block_size, dim)
            v[:, :, :context].unflatten(2, (num_pages, block_size)).copy_(old.transpose(1, 2))
        step = (num_requests, width, num_kv, dim)
        k[..., context:].copy_(key.reshape(step).permute(0, 2, 3, 1))
        v[:, :, context:].copy_(value.reshape(step).transpose(1, 2))

        # the heads of a group share their keys: [R, Hkv, group * Q, D]
        q = query.reshape(num_requests, width, num_kv, group, dim).permute(0, 2, 3, 1, 4)
        q = q.reshape(num_requests, num_kv, group * width, dim).float() * self.scale
        scores = torch.matmul(q, k)
        if self.logits_soft_cap:
            scores = self.logits_soft_cap * torch.tanh(scores / self.logits_soft_cap)
        scores.view(num_requests, num_kv, group, width, length).add_(bucket.bias)
        result = torch.matmul(scores.softmax(-1), v)
        result = result.view(num_requests, num_kv, group, width, dim).permute(0, 3, 1, 2, 4)
        result = result.reshape(-1, self.num_heads, dim)
        return result if bucket.valid is None else result.index_select(0, bucket.valid)


class TreeAttentionBackend(CPUAttentionBackend):
    """Takes the place of ``CPU_ATTN`` in an engine that selected Ouroboros."""

    @staticmethod
    def get_impl_cls():
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls():
        return TreeAttentionMetadataBuilder


def split_pages(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a layer's cache as vLLM's "vec" kernels lay it out.

    Args:
        kv_cache: [num_blocks, Hkv, block_size, 2 * D].

    Returns:
        Keys [num_blocks, Hkv, D, block_size] and values [num_blocks, Hkv, block_size, D].
    """
    num_blocks, num_kv, block_size, double = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv, 2, block_size * double // 2)
    keys = halves[:, :, 0].unflatten(-1, (double // 2, block_size))
    return keys, halves[:, :, 1].unflatten(-1, (block_size, double // 2))


def check_layout(isa: str, dtype: torch.dtype, block_size: int, dim: int) -> None:
    """Write a page with vLLM's kernel and read it back as `split_pages` does.

    Raises:
        ConfigError: this CPU's page layout is not the one that tree attention reads.
    """
    cache = torch.zeros(2, 1, block_size, 2 * dim, dtype=dtype)
    keys = torch.randn(block_size, 1, dim).to(dtype)
    values = torch.randn(block_size, 1, dim).to(dtype)
    flat = cache.view(2, 1, block_size * 2, dim)
    slots = torch.arange(block_size, 2 * block_size)
    ops.cpu_attn_reshape_and_cache(
        keys, values, *flat.chunk(2, dim=2), slots, isa,
        k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip
    key_pages, value_pages = split_pages(cache)
    if not (
        torch.equal(key_pages[1, 0].T, keys[:, 0]) and torch.equal(value_pages[1, 0], values[:, 0])
    ):
        raise ConfigError(
            f"CPU attention kernel {isa!r} ({dtype}, block size {block_size}, head size {dim}) "
            "lays out KV pages in a way that tree attention does not know: this CPU cannot be used"
        )


def attach(attn_metadata: dict, tree: TreeStep) -> None:
    """Give each distinct metadata object of a forward its tree, as the attribute ``tree``."""
    for metadata in {id(m): m for m in attn_metadata.values()}.values():
        metadata.tree = tree
