"""Compiles the kernels of steps with trees in all their variants, before a request waits for one.

Steps that a full graph serves launch what its capture compiled; these are the others, and what
comes after a forward.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from vllm_ouroboros.kernels.launch import power_of_two
from vllm_ouroboros.kernels.tree_attention import count_depths
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.verify.cuda.acceptance import walk_on_device
from vllm_ouroboros.verify.cuda.attention import MaskedFirst, layer_tables
from vllm_ouroboros.verify.cuda.tree_step import CUDATreeStep

SHORTEST_SPLIT = 128
"""Tokens of context; shorter ones are never shared out over programs."""


def sizes(width: int, max_context_len: int) -> Iterator[tuple[int, int]]:
    """Rows of a request and tokens of its context whose launches have all variants between them.

    Args:
        width: most rows of a request.
        max_context_len: most committed tokens.
    """
    rows = 1
    while True:
        yield min(rows, width), 0
        yield min(rows, width), max_context_len
        if rows >= width:
            break
        rows *= 2
    context = SHORTEST_SPLIT
    while context < max_context_len:
        yield 1, context
        context *= 2


@torch.inference_mode()
def warm_up_attention(layers: list, width: int, max_context_len: int, device: torch.device) -> None:
    """Launch attention and the moves of KV as steps do, for requests without any context.

    Args:
        layers: vLLM's `Attention` modules, with their cache bound.
        width: most rows of a request.
        max_context_len: most committed tokens of a request.
        device: of the engine.
    """
    ints = {"dtype": torch.int32, "device": device}
    for layer in {_variant(layer): layer for layer in layers}.values():
        impl = layer.impl
        for rows, context in sizes(width, max_context_len):
            query = torch.zeros(rows, impl.num_heads, impl.head_size, device=device).to(layer.dtype)
            key = query[:, : impl.num_kv_heads].contiguous()
            page = impl.split_cache(layer.kv_cache)[0].shape[1]
            table = torch.zeros(1, power_of_two(-(-max_context_len // page)), **ints)
            step = CUDATreeStep(
                torch.tensor([0, rows], **ints), torch.zeros(1, **ints), table,
                torch.zeros(rows, -(-width // 32), **ints), rows, context,
            )  # fmt: skip
            metadata = MaskedFirst(None, table, torch.zeros(rows, dtype=torch.long, device=device))
            out = torch.empty(rows, impl.num_heads * impl.head_size, device=device).to(layer.dtype)
            impl._attend(step, layer, query, key, key, layer.kv_cache, metadata, out)
        step.layers = layer_tables([layer])
        step.compact(torch.full((1, width), -1, **ints))
        count_depths(step.mask, step.query_start_loc)


def _variant(layer) -> tuple:
    """What the kernel is compiled for, as far as layers differ in it."""
    impl = layer.impl
    return (
        impl.num_heads, impl.num_kv_heads, impl.head_size, impl.sliding_window[0] >= 0,
        bool(impl.logits_soft_cap), layer.kv_cache.dtype, layer.kv_cache.stride(),
    )  # fmt: skip


@torch.inference_mode()
def warm_up_acceptance(vocab: int, nodes: int, dtype: torch.dtype, device: torch.device) -> None:
    """Walk a tree of one node as steps do.

    Args:
        vocab: tokens of the target.
        nodes: most nodes of a tree.
        dtype: of its logits.
        device: of the engine.
    """
    logits = torch.zeros(2, vocab, dtype=dtype, device=device)
    walk_on_device(logits, np.zeros(1, np.int64), [DraftTree.chain([0])], [frozenset()], nodes)
