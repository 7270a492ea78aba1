"""The trees of one forward, for attention on the CPU: what each row may see, and what to keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_ouroboros.kernels.reference import unpack_mask

if TYPE_CHECKING:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

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

    Sizes: R requests, Q rows each at most, P pages each at most, C slots of these
    that are looked at, S = C + Q.
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
        # slots of the last page behind every context are left out; steps of 16 suit vector units
        most = min(-(-int(contexts.max()) // 16) * 16, num_pages * block_size)
        slot = torch.arange(most)
        context = (slot < contexts[:, None])[:, None, :]  # [R, 1, C]
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


class AnyStep(Protocol):
    """The trees of one forward, on any platform."""

    block_table: torch.Tensor  # int32 [R, max_blocks]

    def write(self, moves: torch.Tensor) -> None:
        """Copy accepted rows to their canonical KV slots; see `TreeStep.write`."""


@dataclass
class TreeOnly:
    """Metadata of a forward whose rows all belong to trees: vLLM's kernel sees none of it."""

    tree: AnyStep


def attach(attn_metadata: dict, tree: AnyStep) -> None:
    """Give each distinct metadata object of a forward its tree, as the attribute ``tree``."""
    for metadata in {id(m): m for m in attn_metadata.values()}.values():
        metadata.tree = tree
