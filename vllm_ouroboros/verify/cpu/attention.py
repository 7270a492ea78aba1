"""Tree attention on the CPU, exact, over vLLM's paged KV cache.

Rows of a request that branches attend by mask: to the whole context in the cache, to their
ancestors in the step and to themselves. Everything else (prefill, plain decode, chains) stays on
vLLM's own C++ kernel. A forward's tree travels as `CPUTreeStep` on the attention metadata.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.verify.cpu.attention_kernel import tree_attention
from vllm_ouroboros.verify.cpu.page_layouts import Amx, Vec
from vllm_ouroboros.verify.cpu.tree_step import CPUTreeStep, TreeRowKV

BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}
"""Types that the kernel reads, and as what."""


class TreeAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Makes sure that `TreeAttentionImpl` reads this CPU's page layout."""

    isa: str

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        check_layout(self.isa, self.dtype, self.block_size, self.head_dim)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        """See `CPUAttentionMetadataBuilder.build`; the part of it that trees leave to vLLM's
        kernel can be scheduled later (`LinearRows`).
        """
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.schedule = partial(self._schedule, causal=metadata.causal)
        return metadata

    def _schedule(self, seq_lens, query_start_loc, *, causal: bool) -> torch.Tensor:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens), num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim, seq_lens=seq_lens, dtype=self.dtype,
            query_start_loc=query_start_loc, causal=causal, sliding_window_size=self.window_size,
            isa=self.isa, enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )  # fmt: skip


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
        if tree is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        if tree.covers_all:
            queries = query[: tree.num_rows]
        else:
            linear = tree.linear_rows(attn_metadata)
            part = query.index_select(0, linear.rows)
            output[linear.rows] = super().forward(
                layer, part, key, value, kv_cache, linear.metadata, torch.empty_like(part),
                output_scale, output_block_scale,
            )  # fmt: skip
            queries = query.index_select(0, tree.rows)
        keys, values = self._step_kv(tree, layer, key, value, kv_cache)
        result = attend(
            tree, queries, keys, values, kv_cache, isa=layer.isa, scale=self.scale,
            window=self.sliding_window, soft_cap=self.logits_soft_cap or 0.0,
        ).view(-1, *output.shape[1:])  # fmt: skip
        if tree.covers_all:
            output[: tree.num_rows] = result
        else:
            output[tree.rows] = result.to(output.dtype)
        return output

    def _step_kv(self, tree, layer, key, value, kv_cache) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tree rows, ...] of a layer, saved if the step may move them."""
        if key is None:  # a layer that reads another one's
            other = tree.saved_kv[self.kv_sharing_target_layer_name]
            return other.keys, other.values
        if tree.covers_all:
            keys, values = key[: tree.num_rows], value[: tree.num_rows]
            if tree.save_kv:  # copies: the compiled graph around us may reuse its tensors' memory
                keys, values = keys.clone(), values.clone()
        else:
            keys, values = key.index_select(0, tree.rows), value.index_select(0, tree.rows)
        if tree.save_kv:
            tree.saved_kv[layer.layer_name] = TreeRowKV(self, layer, kv_cache, keys, values)
        return keys, values


class TreeAttentionBackend(CPUAttentionBackend):
    """Takes the place of ``CPU_ATTN`` in an engine that selected Ouroboros."""

    @staticmethod
    def get_impl_cls():
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls():
        return TreeAttentionMetadataBuilder


def attend(
    tree: CPUTreeStep,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    *,
    isa: str,
    scale: float,
    window: int = -1,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Attention of the rows of trees: float32 [T, Hq, D].

    Args:
        tree: of these rows.
        query: [T, Hq, D] or [T, Hq * D].
        key: [T, Hkv, D] or [T, Hkv * D].
        value: the same.
        kv_cache: [num_blocks, Hkv, block_size, 2 * D].
        isa: kernel of vLLM that wrote it, which tells the layout.
        scale: factor of the scores.
        window: sliding window; 0 or less: none.
        soft_cap: of the scores; 0: none.
    """
    table = tree.table
    if kv_cache.dtype not in BITS:  # float16: the pages that are needed, widened
        used, places = tree.block_table.unique(return_inverse=True)
        table = places.to(torch.int32).numpy()
        kv_cache = kv_cache.index_select(0, used.long()).float()
        query, key, value = query.float(), key.float(), value.float()
    bits = BITS[kv_cache.dtype]
    num_blocks, num_kv, block_size, double = kv_cache.shape
    pages = kv_cache.view(num_blocks, num_kv, 2, block_size * double // 2)
    # contiguous, all but the cache: the kernel is compiled once for each layout it meets
    q, k, v = (
        rows.reshape(len(rows), -1, double // 2).contiguous().view(bits).numpy()
        for rows in (query, key, value)
    )
    out = torch.empty(q.shape)
    tree_attention(
        Amx() if isa == "amx" else Vec(), q, pages.view(bits).numpy(), table, tree.contexts,
        tree.starts, k, v, tree.mask, np.float32(scale), window, np.float32(soft_cap), out.numpy(),
    )  # fmt: skip
    return out


def check_layout(isa: str, dtype: torch.dtype, block_size: int, dim: int) -> None:
    """Write a page with vLLM's kernel, and attend to it as trees do.

    The compiled kernel is ready for this type from then on.

    Raises:
        ConfigError: this CPU's page layout is not the one that tree attention reads.
    """
    cache = torch.zeros(2, 1, block_size, 2 * dim, dtype=dtype)
    keys, values = torch.randn(2, block_size + 1, 1, dim).to(dtype)
    query = torch.randn(1, 1, dim).to(dtype)
    flat = cache.view(2, 1, block_size * 2, dim)
    ops.cpu_attn_reshape_and_cache(
        keys[:-1], values[:-1], *flat.chunk(2, dim=2), torch.arange(block_size, 2 * block_size),
        isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip
    one = CPUTreeStep(
        rows=torch.zeros(1, dtype=torch.int64), starts=np.array([0, 1]),
        contexts=np.array([block_size]), block_table=torch.ones(1, 1, dtype=torch.int32),
        mask=np.ones((1, 1), np.int32), num_rows=1,
    )  # fmt: skip
    got = attend(one, query, keys[-1:], values[-1:], cache, isa=isa, scale=1.0)
    weights = (keys[:, 0].float() @ query[0, 0].float()).softmax(0)
    if not torch.allclose(got[0, 0], weights @ values[:, 0].float(), rtol=1e-3, atol=1e-3):
        raise ConfigError(
            f"CPU attention kernel {isa!r} ({dtype}, block size {block_size}, head size {dim}) "
            "lays out KV pages in a way that tree attention does not know: this CPU cannot be used"
        )
