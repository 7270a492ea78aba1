"""The draft model: a second vLLM model whose attention layers have their own paged KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import (
    ModelConfig,
    VllmConfig,
    get_layers_from_vllm_config,
    set_current_vllm_config,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft.alternatives import top_alternatives
from vllm_ouroboros.draft.causal import causal_metadata
from vllm_ouroboros.draft.forward_rows import ForwardInputs, ForwardRows, slot_mapping
from vllm_ouroboros.draft.loading import draft_config
from vllm_ouroboros.draft.ranks import Ranks
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.verify.host_arrays import to_device
from vllm_ouroboros.verify.tree_step import TreeOnly, TreeStep

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_ouroboros.draft.cuda_graphs import DraftGraphs


Outputs = tuple[torch.Tensor, ...]
"""Hidden states [T, hidden], and what else a model computes of T rows."""


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
        self.ranks = Ranks()  # those that have a part of it
        self.sharding: Callable[[], AbstractContextManager[None]] = nullcontext  # to run it in

    @property
    def is_shared(self) -> bool:
        """Whether other ranks have parts of it, too."""
        return self.ranks.leads or self.ranks.follows

    @classmethod
    def is_whole(cls, vllm_config: VllmConfig) -> bool:
        """Whether the first rank runs all of it; else each rank has a part, as of the target."""
        size = vllm_config.speculative_config.draft_tensor_parallel_size
        return (size or 1) == 1

    def load(self, target: torch.nn.Module) -> None:
        """Load the weights; the layers register themselves for KV cache.

        Args:
            target: the loaded target, of which a head shares embeddings and LM head.
        """
        from vllm.compilation.backends import set_model_tag
        from vllm.model_executor.model_loader import get_model

        before = set(get_layers_from_vllm_config(self.target_config, Attention))
        alone = self.sharding is not nullcontext
        self.vllm_config = draft_config(self.load_config, self.model_config, alone=alone)
        tag = set_model_tag("ouroboros_draft")
        with set_current_vllm_config(self.vllm_config), tag, self.sharding():
            self.model = get_model(vllm_config=self.vllm_config, prefix="ouroboros_draft")
        self._of_target = {one.data_ptr() for one in target.parameters()}
        layers = get_layers_from_vllm_config(self.target_config, Attention)
        self.layer_names = [name for name in layers if name not in before]

    def own_tensors(self) -> Iterator[torch.Tensor]:
        """Weights and buffers, without those that are the target's."""
        for one in (*self.model.parameters(), *self.model.buffers()):
            if one.data_ptr() not in self._of_target:
                yield one

    def target_changed(self) -> None:
        """The target's weights are others now."""

    def bind_kv_cache(self, runner: GPUModelRunner) -> None:
        """Find the draft's KV cache group and metadata builders.

        Raises:
            ConfigError: the draft's layers do not share one block table, or read smaller blocks.
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
                f"{len(groups)} KV cache groups, as vLLM groups them with the target's: use a head "
                "(one layer), phrases alone, or a draft model with one kind of attention"
            )
        self.kv_cache_gid = groups[0]
        self.attn_groups = [
            (group, [name for name in group.layer_names if name in mine])
            for group in runner.attn_groups[self.kv_cache_gid]
            if mine.intersection(group.layer_names)
        ]
        smaller = {group.kernel_block_size for group, _ in self.attn_groups} - {None}
        if smaller:
            raise ConfigError(
                f"attention of ouroboros.draft_model = {self.model_config.model!r} wants blocks of "
                f"{min(smaller)} tokens: use --block-size {min(smaller)}"
            )
        table = runner.input_batch.block_table[self.kv_cache_gid]
        self.block_size = table.block_size

    def forward(
        self, clock: StepClock, runner: GPUModelRunner, rows: ForwardRows, mask: np.ndarray | None
    ) -> torch.Tensor:
        """Hidden states [M, hidden] of the M rows asked for, of T rows, on every rank that has a
        part of the model.

        Args:
            clock: keeps the model's time apart from the preparation's.
            runner: holds the block tables.
            rows: of some requests.
            mask: int32 [T, words] of `step_mask`, or None for plain causal rows.
        """
        inputs = self._inputs(runner, rows, mask)
        self.ranks.tell("forward", *inputs)
        with self.ranks.together():
            return self.run(clock, runner, inputs)

    def _inputs(
        self, runner: GPUModelRunner, rows: ForwardRows, mask: np.ndarray | None
    ) -> ForwardInputs:
        table = runner.input_batch.block_table[self.kv_cache_gid]
        kv_slots = np.empty(len(rows.tokens), np.int64)
        slot_mapping(
            rows.writes, rows.query_start_loc, rows.requests, table.block_table.np,
            self.block_size, kv_slots,
        )  # fmt: skip
        arrays = rows.requests, rows.tokens, rows.positions, kv_slots, rows.asked
        return ForwardInputs(rows.query_start_loc, rows.context_lens, mask, arrays)

    def run(self, clock: StepClock, runner: GPUModelRunner, inputs: ForwardInputs) -> torch.Tensor:
        """This rank's part of `forward`."""
        starts, contexts, mask, arrays, _ = inputs
        graphs = self.graphs
        if graphs is not None and mask is not None and graphs.fits(len(contexts), mask):
            with clock.model("draft"):
                return graphs.replay(starts, contexts, mask, *arrays)
        masks = () if mask is None else (mask,)
        first, count, *given = to_device(runner.device, starts, contexts, *masks, *arrays)
        masked, (requests, *on_device) = given[: len(masks)], given[len(masks) :]
        block_table = runner.input_batch.block_table[self.kv_cache_gid].block_table.gpu[requests]
        if mask is None:
            tokens, positions, slots, asked, *further = on_device
            common = causal_metadata(inputs, block_table, first, count, positions, slots)
            metadata = {
                name: built
                for group, names in self.attn_groups
                for built in (group.build_metadata(common, 0),)
                for name in names
            }
            read = self._read_text(inputs, *further)
            with clock.model("draft"):
                return self._run(metadata, tokens, positions, slots, *read)[0][asked]
        tree = runner.masked_step(starts, contexts, mask, (first, count, *masked))
        tree.block_table = block_table
        with clock.model("draft"):
            return self.masked(tree, *on_device)

    def orders(self, clock: StepClock, runner: GPUModelRunner) -> dict[str, Callable[..., None]]:
        """What a rank that follows can be told to do, by name."""
        hidden = torch.empty(0)

        def forward(*inputs: Any) -> None:
            nonlocal hidden
            hidden = self.run(clock, runner, ForwardInputs(*inputs))

        def logits(short: bool) -> None:
            self.compute_logits(hidden, short=short)

        return {"forward": forward, "logits": logits}

    padding: tuple[int, ...] = ()
    """What each further array of a masked forward holds for rows that are none."""

    def _read_text(self, inputs: ForwardInputs, *further: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model reads of T rows of texts beside their tokens."""
        return ()

    def _read(self, *further: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model reads of T rows that attend by masks beside their tokens."""
        return ()

    def _keep(self, outputs: Outputs, *further: torch.Tensor) -> None:
        """Keep what a later forward will read of one by masks."""

    def masked(
        self,
        tree: TreeStep,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        asked: torch.Tensor,
        *further: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states [M, hidden] of the rows int64 [M] asked for, of T rows that attend by the
        masks of ``tree``: tokens int32 [T], positions int64 [T], KV slots int64 [T], and what
        further arrays there are.
        """
        metadata = dict.fromkeys(self.layer_names, TreeOnly(tree))
        outputs = self._run(metadata, tokens, positions, slots, *self._read(*further))
        self._keep(outputs, *further)
        return outputs[0][asked]

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
        with context, self.sharding():
            return self._run_model(tokens, positions, *more)

    @torch.inference_mode()
    def profile(self, rows: int) -> None:
        """Take the memory that a round needs for logits of so many rows."""
        config, device = self.model_config, self.target_config.device_config.device
        hidden = torch.zeros(rows, config.get_hidden_size(), dtype=config.dtype, device=device)
        logits = self.compute_logits(hidden, short=self.short_ids is not None)
        if logits is not None:  # a rank that follows may get none
            top_alternatives(logits)

    def _run_model(
        self, tokens: torch.Tensor, positions: torch.Tensor, *more: torch.Tensor
    ) -> Outputs:
        """Hidden states [T, hidden], and what else the model computes."""
        assert not more
        return (self.model(input_ids=tokens, positions=positions),)

    def further_inputs(self, rows: int) -> Outputs:
        """Zeros in the place of what the model reads beside tokens and positions."""
        return ()

    def logits(self, hidden: torch.Tensor, *, short: bool = False) -> torch.Tensor:
        """Logits [M, vocab] of the hidden states [M, hidden] of the last forward.

        ``short`` asks for those of `short_ids` alone, where there are such.
        """
        self.ranks.tell("logits", short)
        with self.ranks.together():
            return self.compute_logits(hidden, short=short)

    def compute_logits(self, hidden: torch.Tensor, *, short: bool = False) -> torch.Tensor:
        """This rank's part of `logits`."""
        del short
        with self.sharding():
            return self.model.compute_logits(hidden)

    def cannot_wait(self, slot: int) -> bool:
        """Whether a request must read its text now, even if nothing is drafted for it."""
        return False

    def has_read(self, slot: int, tokens: int) -> None:
        """A request has read so many tokens of its text."""

    @torch.inference_mode()
    def warm_up(self, num_tokens: int) -> None:
        """Compile the model on ``num_tokens`` rows without a KV cache."""
        context = set_forward_context(None, self.vllm_config, num_tokens=num_tokens)
        with context, self.sharding():
            device = self.target_config.device_config.device
            self._run_model(
                torch.zeros(num_tokens, dtype=torch.int32, device=device),
                torch.zeros(num_tokens, dtype=torch.int64, device=device),
                *self.further_inputs(num_tokens),
            )
