"""Tree attention on the CPU, exact, over vLLM's paged KV cache.

Rows of a request that branches attend by mask: to the whole context in the cache, to their
ancestors in the step and to themselves. Everything else (prefill, plain decode, chains) stays on
vLLM's own C++ kernel. A forward's tree travels as `TreeStep` on the attention metadata.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_ouroboros.attention_kernel import tree_attention
from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.tree_step import KeptKV, TreeStep

BITS = {torch.bfloat16: (torch.uint16, np.uint32(16)), torch.float32: (torch.uint32, np.uint32(0))}
"""Types that the kernel reads: as what, and how far up their bits are moved for float32."""


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
        result = self._attend(tree, queries, keys, values, kv_cache).view(-1, *output.shape[1:])
        if tree.covers_all:
            output[: tree.num_rows] = result
        else:
            output[tree.rows] = result.to(output.dtype)
        return output

    def _attend(self, tree: TreeStep, query, key, value, kv_cache) -> torch.Tensor:
        """Attention of the tree rows: float32 [T, Hq, D]."""
        table = tree.block_table
        if kv_cache.dtype not in BITS:  # float16: the pages that are needed, widened
            used, table = table.unique(return_inverse=True)
            kv_cache = kv_cache.index_select(0, used.long()).float()
            query, key, value = query.float(), key.float(), value.float()
        out = torch.empty(len(query), self.num_heads, self.head_size)
        bits, shift = BITS[kv_cache.dtype]
        num_blocks, num_kv, block_size, double = kv_cache.shape
        pages = kv_cache.view(num_blocks, num_kv, 2, block_size * double // 2)
        tree_attention(
            _numpy(query.view(-1, self.num_heads, self.head_size), bits), _numpy(pages, bits),
            shift, table.to(torch.int32).numpy(), tree.contexts, tree.starts,
            _numpy(key.view(-1, num_kv, self.head_size), bits),
            _numpy(value.view(-1, num_kv, self.head_size), bits), tree.mask.numpy(),
            np.float32(self.scale), self.sliding_window, np.float32(self.logits_soft_cap or 0.0),
            out.numpy(),
        )  # fmt: skip
        return out


class TreeAttentionBackend(CPUAttentionBackend):
    """Takes the place of ``CPU_ATTN`` in an engine that selected Ouroboros."""

    @staticmethod
    def get_impl_cls():
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls():
        return TreeAttentionMetadataBuilder


def _numpy(tensor: torch.Tensor, bits: torch.dtype) -> np.ndarray:
    """The bits of a tensor, contiguous: the kernel is compiled for no other layout."""
    return tensor.contiguous().view(bits).numpy()


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
