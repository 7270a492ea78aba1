"""Which rows of a forward vLLM's kernel still attends where trees are about."""

from types import SimpleNamespace

import numpy as np
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

from vllm_ouroboros.verify.cpu.tree_step import LinearRows


def test_rows_of_trees_are_left_out():
    lengths, seq_lens = [3, 4, 1, 6], [30, 44, 9, 16]
    asked = []
    metadata = CPUAttentionMetadata(
        num_actual_tokens=14, max_query_len=6, max_seq_len=44,
        query_start_loc=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=torch.arange(8, dtype=torch.int32).view(4, 2),
        slot_mapping=torch.arange(14), scheduler_metadata=torch.zeros(1),
    )  # fmt: skip
    metadata.schedule = lambda *given: asked.append(given) or SimpleNamespace(given=given)
    # all of the second request; of the last one what follows the first two rows of its text
    linear = LinearRows.of(metadata, np.array([3, 4, 5, 6, 10, 11, 12, 13]))
    assert linear.rows.tolist() == [0, 1, 2, 7, 8, 9]
    part = linear.metadata
    assert part.query_start_loc.tolist() == [0, 3, 4, 6]
    assert part.seq_lens.tolist() == [30, 9, 12]
    assert part.block_table.tolist() == [[0, 1], [4, 5], [6, 7]]
    assert (part.num_actual_tokens, part.max_query_len, part.max_seq_len) == (6, 3, 30)
    assert len(asked) == 1 and part.scheduler_metadata.given[0] is part.seq_lens
