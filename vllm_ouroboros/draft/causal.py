"""vLLM's attention metadata of a draft forward without masks."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ouroboros.draft.forward_rows import ForwardInputs


def causal_metadata(
    inputs: ForwardInputs,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    context_lens: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
) -> CommonAttentionMetadata:
    """What vLLM's builders need to know of plain causal rows.

    Args:
        inputs: on the host.
        block_table: int32 [R, max_blocks].
        query_start_loc: those of ``inputs`` on the device, as are all others.
        context_lens: int32 [R].
        positions: int64 [T].
        slots: int64 [T], KV slots.
    """
    lengths = np.diff(inputs.query_start_loc)
    seq_lens = torch.from_numpy((inputs.context_lens + lengths).astype(np.int32))
    return CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=torch.from_numpy(inputs.query_start_loc),
        seq_lens=context_lens + query_start_loc.diff(),
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(lengths),
        num_actual_tokens=len(positions),
        # TRITON_ATTN decodes with scratch of the size of the target's heads: 2 keeps off it
        max_query_len=max(2, int(lengths.max())),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=block_table,
        slot_mapping=slots,
        causal=True,
        positions=positions,
    )
