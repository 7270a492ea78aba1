"""The trees of one forward, for attention on the CPU: what each row may see, and what to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

Schedule = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""vLLM's scheduler metadata of its CPU kernel, from sequence lengths and query starts."""


@dataclass
class TreeRowKV:
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
class LinearRows:
    """The rows of a forward that belong to no tree, as vLLM's kernel takes them.

    Attributes:
        rows: int64 [L], in the forward.
        metadata: of these rows alone.
    """

    rows: torch.Tensor
    metadata: CPUAttentionMetadata

    @classmethod
    def of(cls, metadata: CPUAttentionMetadata, tree_rows: np.ndarray) -> LinearRows:
        """Leave the rows of trees int64 [T] out of a forward.

        Args:
            metadata: of the whole forward, with its `Schedule` as the attribute ``schedule``.
            tree_rows: the last rows of their requests.
        """
        starts = metadata.query_start_loc.numpy()
        linear = np.ones(metadata.num_actual_tokens, bool)
        linear[tree_rows] = False
        before = np.concatenate([[0], np.cumsum(linear)])[starts]
        lengths = np.diff(before)
        kept = torch.from_numpy(np.flatnonzero(lengths))
        left_out = torch.from_numpy((np.diff(starts) - lengths).astype(np.int32))
        query_start_loc = torch.from_numpy(np.unique(before).astype(np.int32))
        seq_lens = (metadata.seq_lens - left_out)[kept]
        part = replace(
            metadata,
            num_actual_tokens=int(before[-1]),
            max_query_len=int(lengths.max()),
            query_start_loc=query_start_loc,
            max_seq_len=int(seq_lens.max()),
            seq_lens=seq_lens,
            block_table=metadata.block_table[kept],
            scheduler_metadata=metadata.schedule(seq_lens, query_start_loc),
        )
        return cls(torch.from_numpy(np.flatnonzero(linear)), part)


@dataclass
class CPUTreeStep:
    """The trees of one forward: what each of its tree rows may see.

    Attributes:
        rows: int64 [T], rows of the forward that belong to trees, request by request.
        starts: int64 [R + 1], first tree row of each request.
        contexts: int64 [R], tokens of each request in the KV cache before the step.
        block_table: int32 [R, max_blocks].
        mask: int32 [T, words], see `kernels.reference.tree_attention`.
        num_rows: rows of the whole forward.
        save_kv: whether the forward saves keys and values, so that `write` can move them.
        saved_kv: filled by the forward, by layer name.
    """

    rows: torch.Tensor
    starts: np.ndarray
    contexts: np.ndarray
    block_table: torch.Tensor
    mask: np.ndarray
    num_rows: int
    save_kv: bool = True
    saved_kv: dict[str, TreeRowKV] = field(default_factory=dict)
    linear: LinearRows | None = None  # the other rows, once a layer has asked for them

    @classmethod
    def of(
        cls,
        rows: np.ndarray,
        query_start_loc: np.ndarray,
        context_lens: np.ndarray,
        block_table: torch.Tensor,
        mask: np.ndarray,
        num_rows: int,
    ) -> CPUTreeStep:
        """A step of arrays of any integers; arguments as the attributes."""
        return cls(
            torch.from_numpy(rows), query_start_loc.astype(np.int64),
            context_lens.astype(np.int64), block_table, mask, num_rows,
        )  # fmt: skip

    @property
    def covers_all(self) -> bool:
        """Whether no row of the forward needs the native kernel."""
        return self.rows.shape[0] == self.num_rows

    @cached_property
    def table(self) -> np.ndarray:
        """The block table int32, contiguous, as every layer's kernel reads it."""
        return self.block_table.to(torch.int32).contiguous().numpy()

    def linear_rows(self, metadata: CPUAttentionMetadata) -> LinearRows:
        """The rows of the forward that belong to none of these trees; made once."""
        if self.linear is None:
            self.linear = LinearRows.of(metadata, self.rows.numpy())
        return self.linear

    def write(self, moves: torch.Tensor) -> None:
        """Copy accepted rows to their canonical KV slots, in every layer that was run.

        Args:
            moves: int64 [M, 3] of (request of this step, tree row, position in the text).
        """
        if not len(moves) or not self.saved_kv:
            return
        requests, rows, positions = moves.unbind(1)
        block_size = next(iter(self.saved_kv.values())).kv_cache.shape[2]
        blocks = self.block_table[requests, positions // block_size].long()
        slots = blocks * block_size + positions % block_size
        for layer in self.saved_kv.values():
            layer.write(rows, slots)
