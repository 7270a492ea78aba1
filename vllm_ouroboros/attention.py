"""Tree attention on the CPU, exact, over vLLM's paged KV cache.

Rows of a request that branches attend by mask: to the whole context in the cache, to their
ancestors in the step and to themselves. Everything else (prefill, plain decode, chains) stays on
vLLM's own C++ kernel. A forward's tree travels as `TreeStep` on the attention metadata.
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.tree_step import Bucket, KeptKV


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
        num_requests, (width, length) = bucket.bias.shape[0], bucket.bias.shape[3:]
        num_kv, dim, block_size = self.num_kv_heads, self.head_size, kv_cache.shape[2]
        group = self.num_heads // num_kv
        num_pages = bucket.pages.shape[0] // num_requests
        if bucket.rows is not None:
            query, key, value = (t.index_select(0, bucket.rows) for t in (query, key, value))

        context = length - width
        k = torch.empty(num_requests, num_kv, dim, length)
        v = torch.empty(num_requests, num_kv, length, dim)
        if num_pages:
            key_pages, value_pages = split_pages(kv_cache)
            pages = (num_requests, num_pages, num_kv)
            old = key_pages.index_select(0, bucket.pages).view(*pages, dim, block_size)
            whole = context // block_size  # pages of which all slots are looked at
            end, rest = whole * block_size, context - whole * block_size
            k[..., :end].unflatten(-1, (whole, block_size)).copy_(
                old[:, :whole].permute(0, 2, 3, 1, 4)
            )
            if rest:
                k[..., end:context].copy_(old[:, -1, ..., :rest])
            old = value_pages.index_select(0, bucket.pages).view(*pages, block_size, dim)
            v[:, :, :end].unflatten(2, (whole, block_size)).copy_(old[:, :whole].transpose(1, 2))
            if rest:
                v[:, :, end:context].copy_(old[:, -1, :, :rest])
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
