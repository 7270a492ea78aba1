"""Logits over the tokens that a head may draft (FR-Spec, arXiv 2502.14856)."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


class ShortVocabulary(nn.Module):
    """The rows of the target's LM head that belong to some tokens, gathered when first used.

    Args:
        size: tokens that may be drafted.
        vocabulary: tokens of the target.
    """

    def __init__(self, size: int, vocabulary: int) -> None:
        super().__init__()
        self.d2t = nn.Parameter(torch.zeros(size, dtype=torch.long), requires_grad=False)
        self.vocabulary = vocabulary
        self._rows: torch.Tensor | None = None

    @cached_property
    def ids(self) -> torch.Tensor:
        """Ids int64 [size] of the tokens that may be drafted; not before the weights are loaded."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def short_logits(self, lm_head: VocabParallelEmbedding, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, size] of the tokens ``ids``."""
        if self._rows is None:
            self._rows = _rows_of(lm_head, self.ids)
        return F.linear(hidden, self._rows)

    def forget(self) -> None:
        """Gather the rows anew: the LM head has other weights now."""
        self._rows = None

    def logits(self, lm_head: VocabParallelEmbedding, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocabulary]; those of tokens that are never drafted are minus infinity."""
        found = self.short_logits(lm_head, hidden)
        full = found.new_full((len(found), self.vocabulary), -torch.inf)
        return full.index_copy_(1, self.ids, found)


def _rows_of(lm_head: VocabParallelEmbedding, ids: torch.Tensor) -> torch.Tensor:
    """Rows [len(ids), hidden] of an LM head that may be spread over ranks."""
    shard = lm_head.shard_indices
    start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
    mine = (ids >= start) & (ids < end)
    rows = lm_head.weight.new_zeros(len(ids), lm_head.weight.shape[1])
    rows[mine] = lm_head.weight[ids[mine] - start]
    return tensor_model_parallel_all_reduce(rows) if lm_head.tp_size > 1 else rows
