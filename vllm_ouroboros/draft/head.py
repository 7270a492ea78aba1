"""A draft head (FSPAD, EAGLE) as a draft model: it reads features beside the tokens."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft.features import HeadFeatures
from vllm_ouroboros.draft.forward_rows import ForwardInputs, ForwardRows
from vllm_ouroboros.draft.model import DraftModel, Outputs
from vllm_ouroboros.heads.checkpoint import EAGLE, is_named

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_ouroboros.heads.short_vocabulary import ShortVocabulary
    from vllm_ouroboros.metrics.step_clock import StepClock
    from vllm_ouroboros.trees.request_state import RequestState


def _plain(layer: torch.nn.Module) -> torch.nn.Module:
    """A layer of the target without its adapters, which are not the head's."""
    return getattr(layer, "base_layer", layer)


class _Places(NamedTuple):
    """Where the rows of a forward stand, T of them."""

    slots: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]
    chain: np.ndarray  # int64 [T], place in the chain, negative in the text; nonsense in a prompt
    paths: np.ndarray  # int64 [T], number of the path that a row belongs to, or -1
    levels: np.ndarray  # int64 [T], of the row in that path, or -1

    @classmethod
    def of(cls, rows: ForwardRows, state: RequestState) -> _Places:
        counts, positions = np.diff(rows.query_start_loc), rows.positions
        slots = np.repeat(rows.slots, counts)
        paths = np.full(len(rows.slots), -1) if rows.paths is None else rows.paths
        paths = np.repeat(paths, counts)
        within = np.arange(len(slots)) - np.repeat(rows.query_start_loc[:-1], counts)
        levels = np.where(paths < 0, -1, within)
        return cls(slots, positions, positions - state.committed[slots], paths, levels)


class DraftHead(DraftModel):
    """Loads a draft head beside its target and runs its forwards.

    The row of the token at place p reads the feature of place p - 1: the target's where the place
    belongs to the text, its own prediction in the chain that is being drafted.

    Args:
        path: folder of the head.
        vllm_config: configuration of the engine (the target's).
    """

    reads_features = True
    features: HeadFeatures  # of the requests that it drafts for, see `use`

    def __init__(self, path: str, vllm_config: VllmConfig) -> None:
        config = json.loads((Path(path) / "config.json").read_text())
        overrides = {} if is_named(config) else {"architectures": [EAGLE]}
        super().__init__(path, vllm_config, hf_overrides=overrides)
        target = vllm_config.model_config
        self.hidden = target.get_hidden_size()
        if self.model_config.get_hidden_size() != self.hidden:
            raise ConfigError(
                f"ouroboros.draft_model = {path!r}: a head for features of "
                f"{self.model_config.get_hidden_size()}, and the target's have {self.hidden}; "
                "take the head that was trained for this target"
            )
        # what a head needs to know of its target is in the speculative configuration
        speculative = copy.copy(vllm_config.speculative_config)
        speculative.draft_model_config = self.model_config
        self.load_config = copy.copy(vllm_config)
        self.load_config.speculative_config = speculative
        self.dtype = target.dtype
        self.short: ShortVocabulary | None = None
        self.state: RequestState | None = None

    @classmethod
    def is_whole(cls, vllm_config: VllmConfig) -> bool:
        """Never: it shares embeddings and LM head with a target that has a part on each rank."""
        return False

    def use(self, state: RequestState) -> None:
        """Draft for the requests of ``state``."""
        self.state = state
        slots, budget = state.chain.shape
        self.features = HeadFeatures(
            slots, self.target_config.model_config.max_model_len, budget, self.hidden, self.dtype,
            self.target_config.device_config.device,
        )  # fmt: skip

    def load(self, target: torch.nn.Module) -> None:
        super().load(target)
        inner = target.get_language_model() if hasattr(target, "get_language_model") else target
        if not getattr(self.model, "has_own_embed_tokens", False):
            self.model.model.embed_tokens = _plain(inner.model.embed_tokens)
        if not getattr(self.model, "has_own_lm_head", False):
            self.model.lm_head = _plain(inner.lm_head)
        # what was replaced goes now: on the CPU vLLM's handler of a matrix product may not be
        # finalised while a model is compiled
        gc.collect()
        self.short = getattr(self.model, "short", None)
        if self.short is not None:
            self.short_ids = self.short.ids.numpy(force=True)

    def target_changed(self) -> None:
        if self.short is not None:
            self.short.forget()

    def _inputs(
        self, runner: GPUModelRunner, rows: ForwardRows, mask: np.ndarray | None
    ) -> ForwardInputs:
        """As for any draft model, with rows of features to read, and to keep those predicted."""
        assert self.state is not None
        inputs = super()._inputs(runner, rows, mask)
        at, features = _Places.of(rows, self.state), self.features
        reads = features.before(at.slots, at.positions)
        if mask is None:
            more = features.beyond(at.slots, at.positions)
            return inputs._replace(arrays=(*inputs.arrays, reads), more=more)
        chain, path = (at.chain >= 0) & (at.levels <= 0), at.levels > 0
        reads = np.where(chain, features.of_chain(at.slots, at.chain), reads)
        reads = np.where(path, features.of_paths(at.slots, at.paths, at.levels - 1), reads)
        writes = np.where(
            at.levels < 0,
            features.of_chain(at.slots, at.chain + 1),
            features.of_paths(at.slots, at.paths, at.levels),
        )
        return inputs._replace(arrays=(*inputs.arrays, reads, writes))

    @property
    def padding(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.features.zeros, self.features.nowhere

    def _read_text(self, inputs: ForwardInputs, *further: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.features.read_text(further[0], inputs.more),)

    def _read(self, *further: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.features.read(further[0]),)

    def _keep(self, outputs: Outputs, *further: torch.Tensor) -> None:
        """Keep the features that rows predict from the last committed token on."""
        self.features.keep(further[1], outputs[1])

    def _run_model(
        self, tokens: torch.Tensor, positions: torch.Tensor, *more: torch.Tensor
    ) -> Outputs:
        (features,) = more
        return self.model(input_ids=tokens, positions=positions, hidden_states=features)

    def further_inputs(self, rows: int) -> Outputs:
        device = self.target_config.device_config.device
        return (torch.zeros(rows, self.hidden, dtype=self.dtype, device=device),)

    def compute_logits(self, hidden: torch.Tensor, *, short: bool = False) -> torch.Tensor:
        if not short or self.short is None:
            return super().compute_logits(hidden)
        return self.short.short_logits(self.model.lm_head, hidden)

    def keep_text(
        self,
        slots: np.ndarray,
        firsts: np.ndarray,
        counts: np.ndarray,
        hidden: torch.Tensor,
        rows: np.ndarray,
    ) -> None:
        """Keep the features that a step made of texts, on every rank.

        Args:
            slots: int64 [R].
            firsts: int64 [R], the first place of each.
            counts: int64 [R], consecutive places of each.
            hidden: [*, hidden], what the target made in the step.
            rows: int64 [sum of counts], those of the texts.
        """
        places = self.features.place(slots, firsts, counts, rows)
        self.ranks.tell("features", *places)
        self.features.store(hidden, *places)

    def orders(self, clock: StepClock, runner: GPUModelRunner) -> dict[str, Callable[..., None]]:
        def features(*places: Any) -> None:
            self.features.store(runner.hidden_states, *places)

        return {**super().orders(clock, runner), "features": features}

    def cannot_wait(self, slot: int) -> bool:
        return self.features.runs_out(slot)

    def has_read(self, slot: int, tokens: int) -> None:
        self.features.trim(slot, tokens)
