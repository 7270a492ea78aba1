"""A draft head (FSPAD, EAGLE) as a draft model: it reads features beside the tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft.features import TextFeatures
from vllm_ouroboros.draft.model import DraftModel

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_ouroboros.draft.cuda_graphs import Outputs
    from vllm_ouroboros.heads.short_vocabulary import ShortVocabulary
    from vllm_ouroboros.trees.request_state import RequestState

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


class DraftHead(DraftModel):
    """Loads a draft head beside its target and runs its forwards.

    The row of the token at place p reads the feature of place p - 1: the target's where the place
    belongs to the text, its own prediction in the chain that is being drafted.

    Args:
        path: folder of the head.
        vllm_config: configuration of the engine (the target's).
    """

    reads_features = True

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
        requests = vllm_config.scheduler_config.max_num_seqs
        self.features = TextFeatures(requests, self.hidden, target.dtype.itemsize)
        self.dtype = target.dtype
        self.short: ShortVocabulary | None = None
        self.state: RequestState | None = None
        self._predicted = torch.zeros(0)  # by slot and place of the chain, once there are slots

    def use(self, state: RequestState) -> None:
        """Draft for the requests of ``state``."""
        self.state = state
        slots, budget = state.chain.shape
        device = self.target_config.device_config.device
        shape = slots, budget + 1, self.hidden
        self._predicted = torch.zeros(shape, dtype=self.dtype, device=device)

    def load(self, target: torch.nn.Module) -> None:
        super().load(target)
        inner = target.get_language_model() if hasattr(target, "get_language_model") else target
        if not getattr(self.model, "has_own_embed_tokens", False):
            self.model.model.embed_tokens = inner.model.embed_tokens
        if not getattr(self.model, "has_own_lm_head", False):
            self.model.lm_head = inner.lm_head
        self.short = getattr(self.model, "short", None)
        if self.short is not None:
            self.short_ids = self.short.ids.numpy(force=True)

    def _inputs(
        self, slots: np.ndarray, positions: np.ndarray, starts: np.ndarray, text_alone: bool
    ) -> torch.Tensor:
        """Features [T, hidden] of the place before each row."""
        assert self.state is not None
        device = self._predicted.device
        found = torch.zeros(len(positions), self.hidden, dtype=self.dtype, device=device)
        chain_rows, chain_slots, chain_places = [], [], []
        for r, slot in enumerate(slots.tolist()):
            committed = int(self.state.committed[slot])  # not known before a prompt's end
            rows = positions[starts[r] : starts[r + 1]]
            # rows of text come first, place by place
            text = len(rows) if text_alone else int((rows < committed).sum())
            if text:
                first = int(rows[0])
                known = self.features.before(slot, first, first + text)
                if known is not None:
                    found[starts[r] : starts[r] + text] = known
            rest = np.arange(starts[r] + text, starts[r + 1])
            chain_rows.append(rest)
            chain_slots.append(np.full(len(rest), slot))
            chain_places.append(rows[text:] - committed)
        index, owner, place = (
            torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)
            for parts in (chain_rows, chain_slots, chain_places)
        )
        found[index] = self._predicted[owner, place]
        return found

    def _keep(
        self, slots: np.ndarray, positions: np.ndarray, starts: np.ndarray, predicted
    ) -> None:
        """Keep the features that rows from the last committed token on predict.

        A slot that comes again has a row of an expansion, which no other row follows.
        """
        assert self.state is not None
        owner = np.repeat(slots, np.diff(starts))
        chains = int(starts[len(np.unique(slots))])
        owner, positions = owner[:chains], positions[:chains]
        place = positions - self.state.committed[owner] + 1
        rows = np.flatnonzero((place >= 0) & (place < self._predicted.shape[1]))
        index, owner, place = (
            torch.from_numpy(array.astype(np.int64)).to(predicted.device)
            for array in (rows, owner[rows], place[rows])
        )
        self._predicted[owner, place] = predicted[index]

    def forward(
        self, clock, runner, slots, requests, tokens, positions, writes, query_start_loc,
        context_lens, tree,
    ) -> torch.Tensor:  # fmt: skip
        """See `DraftModel.forward`."""
        starts = query_start_loc[: len(slots) + 1]
        features = self._inputs(slots, positions, starts, tree is None)
        hidden, predicted = self._outputs(
            clock, runner, requests, tokens, positions, writes, query_start_loc, context_lens,
            tree, features,
        )  # fmt: skip
        if tree is not None:
            self._keep(slots, positions, starts, predicted)
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
        return self.features.waiting(slot) > self.features.most // 2

    def has_read(self, slot: int, tokens: int) -> None:
        self.features.trim(slot, tokens)
