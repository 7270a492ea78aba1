"""Tree attention on CUDA devices: vLLM's backends, with tree rows in our Triton kernel.

In a forward with trees, the rows of all requests that are no long prompts attend by masks, in one
launch of `kernels.tree_attention`; vLLM has put these requests first. What is behind them, and
every forward without trees and graphs, stays with the backend that vLLM chose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.worker.ubatch_utils import UBatchSlice, split_attn_metadata

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.kernels.kv_compact import KVLayers, kv_layers
from vllm_ouroboros.kernels.tree_attention import tree_attention
from vllm_ouroboros.verify.cuda.tree_step import CUDATreeStep

FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn}
"""Types of a quantised KV cache that the kernel reads, by vLLM's name."""


@dataclass
class MaskedFirst:
    """Metadata of a forward whose first rows attend by masks.

    Attributes:
        others: vLLM's own metadata of the rows behind them; None: there are none.
        block_table: int32 [R, max_blocks], of the requests that attend by masks.
        slot_mapping: int64, KV slots of all rows.
        tree: their masks, once they are known.
    """

    others: Any
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    tree: CUDATreeStep | None = None


class TreeRows:
    """Mixed into an attention implementation of vLLM: attends the rows of trees."""

    num_heads: int
    head_size: int
    scale: float
    logits_soft_cap: float | None
    sliding_window: tuple[int, int]
    kv_cache_dtype: str

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # queries stay as they are: the kernel multiplies them with keys of any type
        self.supports_quant_query_input = False
        lacking = (
            ("ALiBi", self.alibi_slopes is not None),  # type: ignore[attr-defined]
            ("attention sinks", self.sinks is not None),  # type: ignore[attr-defined]
            ("another kind of attention than a decoder's",
             self.attn_type != "decoder"),  # type: ignore[attr-defined]
            (f"KV cache type {self.kv_cache_dtype!r}",
             self.kv_cache_dtype not in ("auto", "float16", "bfloat16", *FP8)),
            ("attention to blocks before the last ones (chunk_lookback)",
             getattr(self, "chunk_lookback", -1) >= 0),
        )  # fmt: skip
        for what, found in lacking:
            if found:
                raise ConfigError(f"this model uses {what}, which tree attention cannot do yet")

    def fused_output_quant_supported(self, quant_key) -> bool:
        """No: the rows of trees are written as they are."""
        return False

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
        """See `AttentionImpl.forward`; shapes as there."""
        tree: CUDATreeStep | None = getattr(attn_metadata, "tree", None)
        first, others = 0, attn_metadata
        if tree is not None:
            self._attend(tree, layer, query, key, value, kv_cache, attn_metadata, output)
            first, others = tree.num_rows, getattr(attn_metadata, "others", None)
        if tree is None or others is not None:
            if first and key is not None:  # None: a layer that reads another one's cache
                key, value = key[first:], value[first:]
            super().forward(  # type: ignore[misc]
                layer, query[first:], key, value, kv_cache, others, output[first:],
                output_scale, output_block_scale,
            )  # fmt: skip
        return output

    def _attend(self, tree, layer, query, key, value, kv_cache, attn_metadata, output) -> None:
        """Attention of the first rows by masks, into ``output``."""
        keys, values = self.split_cache(kv_cache)
        query = query[: tree.num_rows]
        out = output.view(-1, self.num_heads, self.head_size)[: tree.num_rows]
        k_scale = v_scale = None
        if keys.dtype in FP8.values():
            k_scale, v_scale = layer._k_scale, layer._v_scale
        # quantised rows of the target see each other as a later step will see them
        slots = None if k_scale is None else getattr(attn_metadata, "slot_mapping", None)
        if key is None:  # a layer that reads another one's cache
            slots = attn_metadata.slot_mapping
        if slots is None:
            key, value = key[: tree.num_rows], value[: tree.num_rows]
        else:
            slots = slots[: tree.num_rows].clamp(min=0)
            page, place = slots // keys.shape[1], slots % keys.shape[1]
            key, value = keys[page, place], values[page, place]
        window = self.sliding_window[0]
        tree_attention(
            query, key, value, keys, values, tree.block_table, tree.context_lens,
            tree.query_start_loc, tree.mask, self.scale, out,
            soft_cap=self.logits_soft_cap or 0.0,
            sliding_window=window + 1 if window >= 0 else None,
            k_scale=k_scale, v_scale=v_scale, depths=tree.depths() if window >= 0 else None,
            max_query_len=tree.max_query_len, max_context_len=tree.max_context_len,
        )  # fmt: skip

    def split_cache(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_blocks, block_size, Hkv, D], views of a layer's cache.

        Args:
            kv_cache: [num_blocks, Hkv, block_size, 2 * D], of any strides.
        """
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if (kind := FP8.get(self.kv_cache_dtype)) is not None:
            keys, values = keys.view(kind), values.view(kind)
        return keys, values


class TreeTritonImpl(TreeRows, TritonAttentionImpl):
    """vLLM's Triton attention, tree rows included."""


class TreeFlashImpl(TreeRows, FlashAttentionImpl):
    """FlashAttention, tree rows included."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.kv_cache_dtype in FP8:
            raise ConfigError(
                f"kv_cache_dtype = {self.kv_cache_dtype!r} with attention backend FLASH_ATTN is "
                "not supported with Ouroboros yet: use --attention-backend TRITON_ATTN"
            )


class TreeBuilder:
    """Mixed into a metadata builder of vLLM's: leaves out the rows that attend by masks.

    Attributes:
        masked: requests at the front of the batch whose rows attend by masks; 0 for vLLM's own
            metadata. The runner sets it around the building of a forward's metadata.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False  # it would copy the metadata of another group
    masked = 0

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, **kwargs) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)  # type: ignore[call-arg]
        # vLLM puts requests of so few rows first, in front of prompts
        self.reorder_batch_threshold = 1 + vllm_config.num_speculative_tokens

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """See `AttentionMetadataBuilder.build`."""
        common, masked, others = common_attn_metadata, self.masked, None
        if not masked:
            return super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        if masked < common.num_reqs:
            first = int(common.query_start_loc_cpu[masked])
            behind = UBatchSlice(
                slice(masked, common.num_reqs), slice(first, common.num_actual_tokens)
            )
            [rest] = split_attn_metadata([behind], common)
            if (ranges := common.mm_req_doc_ranges) is not None:  # these it leaves out
                rest.mm_req_doc_ranges = {r - masked: of for r, of in ranges.items() if r >= masked}
            others = super().build(common_prefix_len, rest, fast_build)  # type: ignore[misc]
        return MaskedFirst(others, common.block_table_tensor[:masked], common.slot_mapping)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """See `AttentionMetadataBuilder.build_for_cudagraph_capture`."""
        if self.masked:
            return self.build(0, common_attn_metadata)
        return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]


class TreeTritonBuilder(TreeBuilder, TritonAttentionMetadataBuilder):
    """For vLLM's Triton attention."""


class TreeFlashBuilder(TreeBuilder, FlashAttentionMetadataBuilder):
    """For FlashAttention."""


class TreeTritonBackend(TritonAttentionBackend):
    """Takes the place of ``TRITON_ATTN`` in an engine that selected Ouroboros."""

    @staticmethod
    def get_impl_cls():
        return TreeTritonImpl

    @staticmethod
    def get_builder_cls():
        return TreeTritonBuilder


class TreeFlashBackend(FlashAttentionBackend):
    """Takes the place of ``FLASH_ATTN`` in an engine that selected Ouroboros."""

    @staticmethod
    def get_impl_cls():
        return TreeFlashImpl

    @staticmethod
    def get_builder_cls():
        return TreeFlashBuilder


def layer_tables(layers: list) -> list[KVLayers]:
    """Where the KV of attention layers lies, one table for each geometry; layers that share a
    cache stand there once.

    Args:
        layers: vLLM's `Attention` modules, with their cache bound.
    """
    groups: dict[tuple, list] = {}
    own = {layer.kv_cache.data_ptr(): layer for layer in layers}
    for layer in own.values():
        keys, values = layer.impl.split_cache(layer.kv_cache)
        key = (keys.shape, keys.stride(), keys.dtype, keys.device)
        groups.setdefault(key, []).append((keys, values))
    return [kv_layers(*zip(*pairs, strict=True)) for pairs in groups.values()]
