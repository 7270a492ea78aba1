"""Which full CUDA graph of the target serves a batch: any with enough rows.

In a graph all rows attend by masks, and which rows belong to which request stands in buffers that
every step fills. So a graph is for a number of rows, however trees of all sizes, chains and plain
decodes share them; vLLM's own graphs want equally many rows of every request.
"""

from __future__ import annotations

from itertools import product

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher


class TreeDispatcher(CudagraphDispatcher):
    """vLLM's dispatcher; its "uniform decode" is a batch whose rows all attend by masks."""

    def initialize_cudagraph_keys(
        self, cudagraph_mode: CUDAGraphMode, uniform_decode_query_len: int = 1
    ) -> None:
        """As vLLM does, with a full graph for every size that a batch of trees can have."""
        super().initialize_cudagraph_keys(cudagraph_mode, uniform_decode_query_len)
        self.cudagraph_keys[CUDAGraphMode.FULL].clear()
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            return
        most = self.uniform_decode_query_len * self.vllm_config.scheduler_config.max_num_seqs
        sizes = self.compilation_config.cudagraph_capture_sizes or ()
        for size, adapters in product(sizes, self._get_lora_cases()):
            if size <= most:
                key = self._create_padded_batch_descriptor(size, True, adapters > 0, adapters)
                self.add_cudagraph_key(CUDAGraphMode.FULL, key)

    def _create_padded_batch_descriptor(
        self, num_tokens: int, uniform_decode: bool, has_lora: bool, num_active_loras: int = 0
    ) -> BatchDescriptor:
        padded = self._bs_to_padded_graph_size[num_tokens]
        return BatchDescriptor(
            num_tokens=padded,
            num_reqs=min(padded, self.vllm_config.scheduler_config.max_num_seqs),
            uniform=uniform_decode and self.cudagraph_mode.has_mode(CUDAGraphMode.FULL),
            has_lora=has_lora,
            num_active_loras=num_active_loras,
        )
