"""A draft head (FSPAD, EAGLE) as a draft model: it reads features beside the tokens."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft.expansion import MAX_PATHS
from vllm_ouroboros.draft.features import TextFeatures
from vllm_ouroboros.draft.forward_rows import ForwardRows
from vllm_ouroboros.draft.model import DraftModel
from vllm_ouroboros.trees.request_state import NUM_FOLLOWING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_ouroboros.draft.cuda_graphs import Outputs
    from vllm_ouroboros.heads.short_vocabulary import ShortVocabulary
    from vllm_ouroboros.metrics.step_clock import StepClock
    from vllm_ouroboros.trees.request_state import RequestState
    from vllm_ouroboros.verify.tree_step import TreeStep

EAGLE = "EagleLlamaForCausalLM"


def is_head(path: str) -> bool:
    """Whether a draft model is a head: a folder with ``config.json`` of an "Eagle" architecture.

    EAGLE's own checkpoints name their target's architecture; they have a tensor ``fc.weight``.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return _is_named(config) or _has_fc(folder)


def _is_named(config: dict[str, Any]) -> bool:
    return any(name.startswith("Eagle") for name in config.get("architectures") or [])


def _has_fc(folder: Path) -> bool:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
        if "fc.weight" in names:
            return True
    return False


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


def _take(found: torch.Tensor, rows: np.ndarray, kept: torch.Tensor, *at: np.ndarray) -> None:
    """Fill rows bool [T] of features with what is kept ``at`` some places."""
    index, *where = (_index(one, kept.device) for one in (np.flatnonzero(rows), *at))
    found[index] = kept[tuple(where)]


def _put(kept: torch.Tensor, made: torch.Tensor, rows: np.ndarray, *at: np.ndarray) -> None:
    """Keep rows bool [T] of features ``at`` some places."""
    index, *where = (_index(one, kept.device) for one in (np.flatnonzero(rows), *at))
    kept[tuple(where)] = made[index]


def _index(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)


class DraftHead(DraftModel):
    """Loads a draft head beside its target and runs its forwards.

    The row of the token at place p reads the feature of place p - 1: the target's where the place
    belongs to the text, its own prediction in the chain that is being drafted.

    Args:
        path: folder of the head.
        vllm_config: configuration of the engine (the target's).
    """

    reads_features = True
    features: TextFeatures  # of the requests that it drafts for, see `use`

    def __init__(self, path: str, vllm_config: VllmConfig) -> None:
        config = json.loads((Path(path) / "config.json").read_text())
        overrides = {} if _is_named(config) else {"architectures": [EAGLE]}
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
        self._predicted = torch.zeros(0)  # by slot and place of the chain, once there are slots
        self._of_paths = torch.zeros(0)  # by slot, number of the path and level

    def use(self, state: RequestState) -> None:
        """Draft for the requests of ``state``."""
        self.state = state
        slots, budget = state.chain.shape
        device = self.target_config.device_config.device
        self.features = TextFeatures(
            slots, self.target_config.model_config.max_model_len, self.hidden, self.dtype, device
        )
        shape = slots, budget + 1, self.hidden
        self._predicted = torch.zeros(shape, dtype=self.dtype, device=device)
        paths = slots, MAX_PATHS, NUM_FOLLOWING - 1, self.hidden
        self._of_paths = torch.zeros(paths, dtype=self.dtype, device=device)

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

    def _inputs(self, at: _Places, text_alone: bool) -> torch.Tensor:
        """Features [T, hidden] of the place before each row; ``text_alone``: all are of text."""
        found = self.features.before(at.slots, at.positions)
        if not text_alone:
            chain, path = (at.chain >= 0) & (at.levels <= 0), at.levels > 0
            _take(found, chain, self._predicted, at.slots[chain], at.chain[chain])
            if path.any():
                where = at.slots[path], at.paths[path], at.levels[path] - 1
                _take(found, path, self._of_paths, *where)
        return found

    def _keep(self, at: _Places, predicted: torch.Tensor) -> None:
        """Keep the features that rows predict from the last committed token on."""
        place = at.chain + 1
        chain = (at.levels < 0) & (place >= 0) & (place < self._predicted.shape[1])
        _put(self._predicted, predicted, chain, at.slots[chain], place[chain])
        path = (at.levels >= 0) & (at.levels < NUM_FOLLOWING - 1)
        if path.any():
            where = at.slots[path], at.paths[path], at.levels[path]
            _put(self._of_paths, predicted, path, *where)

    def forward(
        self, clock: StepClock, runner: GPUModelRunner, rows: ForwardRows, tree: TreeStep | None
    ) -> torch.Tensor:
        """See `DraftModel.forward`; also keeps the features that the rows predict."""
        assert self.state is not None
        at = _Places.of(rows, self.state)
        features = self._inputs(at, tree is None)
        hidden, predicted = self._outputs(clock, runner, rows, tree, features)
        if tree is not None:
            self._keep(at, predicted)
        return hidden

    def _run_model(
        self, tokens: torch.Tensor, positions: torch.Tensor, *more: torch.Tensor
    ) -> Outputs:
        (features,) = more
        return self.model(input_ids=tokens, positions=positions, hidden_states=features)

    def further_inputs(self, rows: int) -> Outputs:
        device = self.target_config.device_config.device
        return (torch.zeros(rows, self.hidden, dtype=self.dtype, device=device),)

    def logits(
        self, hidden: torch.Tensor, rows: np.ndarray, *, short: bool = False
    ) -> torch.Tensor:
        if not short or self.short is None:
            return super().logits(hidden, rows)
        wanted = hidden[torch.from_numpy(rows).to(hidden.device)]
        return self.short.short_logits(self.model.lm_head, wanted)

    def cannot_wait(self, slot: int) -> bool:
        return self.features.runs_out(slot)

    def has_read(self, slot: int, tokens: int) -> None:
        self.features.trim(slot, tokens)
