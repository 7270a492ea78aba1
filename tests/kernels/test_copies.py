"""What travels between host and device in a draft round: one copy up, one copy down."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_ouroboros.draft import model as draft_model
from vllm_ouroboros.draft.alternatives import Choices
from vllm_ouroboros.draft.forward_rows import ForwardRows
from vllm_ouroboros.draft.model import DraftModel
from vllm_ouroboros.draft.ranks import Ranks
from vllm_ouroboros.verify.cuda.tree_step import CUDATreeStep


class Draft(DraftModel):
    """A draft whose hidden states are what it reads: tokens, and two further arrays."""

    graphs, kv_cache_gid, block_size, layer_names, ranks = None, 0, 4, ("layer",), Ranks()

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def _inputs(self, runner, rows, mask):
        inputs = super()._inputs(runner, rows, mask)
        further = np.arange(len(rows.tokens))
        return inputs._replace(arrays=(*inputs.arrays, further, further + 1))

    def _read(self, *further):
        return (further[0],)

    def _keep(self, outputs, *further) -> None:
        self.seen.append(further[1])

    def _run(self, metadata, tokens, positions, slots, more):
        tree = metadata["layer"].tree
        assert tree.block_table.equal(torch.tensor([[5, 6]])) and tree.max_context_len == 3
        return (torch.stack([tokens.long(), positions, slots, more], 1),)


@pytest.fixture
def copies(monkeypatch) -> Counter:
    """Counts copies up, and forbids those that `to_device` does not make."""
    found: Counter = Counter()
    to_device = draft_model.to_device

    def counted(device, *arrays):
        found["up"] += 1
        return to_device(device, *arrays)

    numpy = torch.Tensor.numpy

    def down(self, **more):
        found["down"] += 1
        return numpy(self, **more)

    monkeypatch.setattr(draft_model, "to_device", counted)
    monkeypatch.setattr(torch.Tensor, "numpy", down)
    for name in ("to", "cuda", "cpu", "tolist", "item"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(name))
    return found


def test_a_forward_takes_one_copy(copies) -> None:
    table = SimpleNamespace(
        block_table=SimpleNamespace(
            np=np.array([[1, 2], [5, 6]], np.int32), gpu=torch.tensor([[1, 2], [5, 6]])
        )
    )
    runner = SimpleNamespace(
        device=torch.device("cpu"), input_batch=SimpleNamespace(block_table=[table]),
        masked_step=lambda starts, contexts, mask, given: CUDATreeStep.of(starts, contexts, given),
    )  # fmt: skip
    rows = ForwardRows(
        np.array([7]), np.array([1]), np.array([8, 9], np.int32), np.array([3, 4]),
        np.array([3, -1]), np.array([0, 2], np.int32), np.array([3], np.int32), np.array([1, 0]),
    )  # fmt: skip
    draft, clock = Draft(), SimpleNamespace(model=lambda _: nullcontext())
    hidden = draft.forward(clock, runner, rows, np.ones((2, 1), np.int32))
    assert copies == {"up": 1}
    assert hidden.shape == (2, 4)
    assert hidden.equal(torch.tensor([[9, 4, -1, 1], [8, 3, 23, 0]]))
    assert draft.seen[0].equal(torch.tensor([1, 2]))


def test_a_round_is_answered_in_one_copy(copies) -> None:
    """Tokens, alternatives and probabilities of its rows and of those that expand the tree."""
    choices = Choices(torch.rand(6, 40), 4, None, at_once=True)
    assert len(choices.tokens) == 4
    choices.alternatives(np.array([0, 3]))
    choices.alternatives(np.array([4, 5]))
    assert copies == {"down": 1}
