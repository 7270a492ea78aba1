"""The draft model: a second vLLM model whose attention layers have their own paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from vllm.config import (
    ModelConfig,
    VllmConfig,
    get_layers_from_vllm_config,
    set_current_vllm_config,
)
from vllm.config.utils import replace
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft.forward_rows import ForwardRows
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.verify.tree_step import TreeOnly, TreeStep

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_ouroboros.draft.cuda_graphs import DraftGraphs, Outputs


@njit(cache=True)
def slot_mapping(positions, query_start_loc, requests, block_table, block_size, slots):
    """KV slots int64 [T] of positions int64 [T] (-1 stays -1).

    Args:
        positions: int64 [T], position whose slot a row fills, or -1.
        query_start_loc: int32 [R + 1], first row of each request.
        requests: int64 [R], row of each request in ``block_table``.
        block_table: int32 [*, max_blocks].
        block_size: tokens a block.
        slots: int64 [T], written.
    """
    for r in range(requests.shape[0]):
        for row in range(query_start_loc[r], query_start_loc[r + 1]):
            p = positions[row]
            if p < 0:
                slots[row] = -1
            else:
                block = block_table[requests[r], p // block_size]
                slots[row] = np.int64(block) * block_size + p % block_size


class DraftModel:
    """Loads the draft model into a runner and runs its forwards.

    Args:
        path: directory or hub id of the draft model.
        vllm_config: configuration of the engine (the target's).
        hf_overrides: entries of its ``config.json`` to replace.
    """

    reads_features = False
    """Whether it reads the target's features, as heads do."""

    def __init__(
        self, path: str, vllm_config: VllmConfig, hf_overrides: dict[str, Any] | None = None
    ) -> None:
        self.target_config = self.load_config = vllm_config
        target = vllm_config.model_config
        self.model_config = ModelConfig(
            model=path,
            runner="draft",
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            trust_remote_code=target.trust_remote_code,
            dtype=target.dtype,
            seed=target.seed,
            enforce_eager=target.enforce_eager,
            max_logprobs=target.max_logprobs,
            hf_overrides=hf_overrides or {},
        )
        self.max_len: int = self.model_config.max_model_len
        self.layer_names: list[str] = []
        self.kv_cache_gid = -1
        self.graphs: DraftGraphs | None = None  # on CUDA devices, unless eager
        self.short_ids: np.ndarray | None = None  # int64, all that it may draft, if few

    def load(self, target: torch.nn.Module) -> None:
        """Load the weights; the layers register themselves for KV cache.

        Args:
            target: the loaded target, of which a head shares embeddings and LM head.
        """
        from vllm.compilation.backends import set_model_tag
        from vllm.model_executor.model_loader import get_model

        before = set(get_layers_from_vllm_config(self.target_config, Attention))
        # adapters are the target's: the draft model has none
        self.vllm_config = replace(
            self.load_config,
            quant_config=None,
            lora_config=None,
            model_config=self.model_config,
        )
        with set_current_vllm_config(self.vllm_config), set_model_tag("ouroboros_draft"):
            self.model = get_model(vllm_config=self.vllm_config, prefix="ouroboros_draft")
        layers = get_layers_from_vllm_config(self.target_config, Attention)
        self.layer_names = [name for name in layers if name not in before]

    def bind_kv_cache(self, runner: GPUModelRunner) -> None:
        """Find the draft's KV cache group and metadata builders.

        Raises:
            ConfigError: the draft's layers do not share one block table.
        """
        mine = set(self.layer_names)
        groups = [
            gid
            for gid, group in enumerate(runner.kv_cache_config.kv_cache_groups)
            if mine.intersection(group.layer_names)
        ]
        if len(groups) != 1:
            raise ConfigError(
                f"the layers of ouroboros.draft_model = {self.model_config.model!r} fall into "
                f"{len(groups)} KV cache groups; use a draft model with one kind of attention"
            )
        self.kv_cache_gid = groups[0]
        self.attn_groups = [
            (group, [name for name in group.layer_names if name in mine])
            for group in runner.attn_groups[self.kv_cache_gid]
            if mine.intersection(group.layer_names)
        ]
        table = runner.input_batch.block_table[self.kv_cache_gid]
        self.block_size = table.block_size

    def forward(
        self, clock: StepClock, runner: GPUModelRunner, rows: ForwardRows, tree: TreeStep | None
    ) -> torch.Tensor:
        """Hidden states [T, hidden] of T rows.

        Args:
            clock: keeps the model's time apart from the preparation's.
            runner: holds the block tables.
            rows: of some requests.
            tree: attention mask of all rows, or None for plain causal rows.
        """
        return self._outputs(clock, runner, rows, tree)[0]

    def _outputs(
        self,
        clock: StepClock,
        runner: GPUModelRunner,
        rows: ForwardRows,
        tree: TreeStep | None,
        *more: torch.Tensor,
    ) -> Outputs:
        """What the model computes of T rows; ``more`` is what it reads beside their tokens."""
        table = runner.input_batch.block_table[self.kv_cache_gid]
        kv_slots = np.empty(len(rows.tokens), np.int64)
        slot_mapping(
            rows.writes, rows.query_start_loc, rows.requests, table.block_table.np,
            self.block_size, kv_slots,
        )  # fmt: skip
        device = runner.device
        ids, places, slots_tensor = (
            torch.from_numpy(array).to(device) for array in (rows.tokens, rows.positions, kv_slots)
        )
        inputs = ids, places, slots_tensor, *more
        if tree is None:
            metadata = self._causal(runner, rows, places, slots_tensor)
            with clock.model("draft"):
                return self._run(metadata, *inputs)
        tree.block_table = table.block_table.gpu[torch.from_numpy(rows.requests).to(device)]
        with clock.model("draft"):
            if self.graphs is not None and self.graphs.fits(tree):  # type: ignore[arg-type]
                return self.graphs.replay(tree, *inputs)  # type: ignore[arg-type]
            return self.masked(tree, *inputs)

    def masked(self, tree: TreeStep, *inputs: torch.Tensor) -> Outputs:
        """What the model computes of T rows that attend by the masks of ``tree``.

        ``inputs`` are tokens int32 [T], positions int64 [T], KV slots int64 [T] and
        `further_inputs`.
        """
        return self._run(dict.fromkeys(self.layer_names, TreeOnly(tree)), *inputs)

    def _run(
        self,
        metadata: dict[str, Any],
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        *more: torch.Tensor,
    ) -> Outputs:
        context = set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(tokens),
            slot_mapping=dict.fromkeys(self.layer_names, slots),
        )
        with context:
            return self._run_model(tokens, positions, *more)

    def _run_model(
        self, tokens: torch.Tensor, positions: torch.Tensor, *more: torch.Tensor
    ) -> Outputs:
        """Hidden states [T, hidden], and what else the model computes."""
        assert not more
        return (self.model(input_ids=tokens, positions=positions),)

    def further_inputs(self, rows: int) -> Outputs:
        """Zeros in the place of what the model reads beside tokens and positions."""
        return ()

    def _causal(
        self,
        runner: GPUModelRunner,
        rows: ForwardRows,
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> dict[str, Any]:
        """vLLM's own metadata for plain causal rows, by layer."""
        table = runner.input_batch.block_table[self.kv_cache_gid]
        lengths = np.diff(rows.query_start_loc)
        seq_lens = torch.from_numpy((rows.context_lens + lengths).astype(np.int32))
        start_loc = torch.from_numpy(rows.query_start_loc)
        requests = torch.from_numpy(rows.requests).to(runner.device)
        common = CommonAttentionMetadata(
            query_start_loc=start_loc.to(runner.device),
            query_start_loc_cpu=start_loc,
            seq_lens=seq_lens.to(runner.device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(requests),
            num_actual_tokens=len(positions),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=table.block_table.gpu[requests],
            slot_mapping=slots,
            causal=True,
            positions=positions,
        )
        metadata = {}
        for group, names in self.attn_groups:
            built = group.build_metadata(common, 0)
            metadata.update(dict.fromkeys(names, built))
        return metadata

    def logits(
        self, hidden: torch.Tensor, rows: np.ndarray, *, short: bool = False
    ) -> torch.Tensor:
        """Logits [M, vocab] of the rows int64 [M] of a forward.

        ``short`` asks for those of `short_ids` alone, where there are such.
        """
        del short
        return self.model.compute_logits(hidden[torch.from_numpy(rows).to(hidden.device)])

    def cannot_wait(self, slot: int) -> bool:
        """Whether a request must read its text now, even if nothing is drafted for it."""
        return False

    def has_read(self, slot: int, tokens: int) -> None:
        """A request has read so many tokens of its text."""

    def warm_up(self, num_tokens: int) -> None:
        """Compile the model on ``num_tokens`` rows without a KV cache."""
        with set_forward_context(None, self.vllm_config, num_tokens=num_tokens):
            device = self.target_config.device_config.device
            self._run_model(
                torch.zeros(num_tokens, dtype=torch.int32, device=device),
                torch.zeros(num_tokens, dtype=torch.int64, device=device),
                *self.further_inputs(num_tokens),
            )
