"""What a step with trees launches and copies outside graphs, and how often the host waits for it.

The counts do not depend on the batch. A launch is an operation on a device's tensors that neither
gives another view of one nor asks for memory, or a kernel of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_ouroboros.draft import model as draft_model
from vllm_ouroboros.draft.alternatives import Choices
from vllm_ouroboros.draft.cuda_graphs import DraftGraphs
from vllm_ouroboros.draft.features import HeadFeatures
from vllm_ouroboros.draft.forward_rows import ForwardRows
from vllm_ouroboros.draft.model import DraftModel
from vllm_ouroboros.draft.ranks import Ranks
from vllm_ouroboros.integration import runner as runner_module
from vllm_ouroboros.integration.cuda_runner import OuroborosCUDARunner
from vllm_ouroboros.kernels import kv_compact, tree_accept
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.verify import host_arrays
from vllm_ouroboros.verify.cuda import acceptance, static_arrays, tree_step
from vllm_ouroboros.verify.cuda.attention import layer_tables
from vllm_ouroboros.verify.cuda.static_arrays import StaticArrays

CPU = torch.device("cpu")
NODES, VOCAB, PAGE = 3, 40, 16
NO_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "detach"}


class Launches(TorchDispatchMode):
    """Counts what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.overloadpacket.__name__ not in NO_LAUNCH:
            self.found["launches"] += 1
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Kernel:
    """A kernel of ours that counts its launches."""

    def __init__(self, kernel, counts: Launches) -> None:
        self.kernel, self.counts = kernel, counts

    def __getitem__(self, grid):
        def launch(*args, **more):
            self.counts.found["launches"] += 1
            with _disable_current_modes():
                self.kernel[grid](*args, **more)

        return launch


@pytest.fixture
def counts(monkeypatch) -> Launches:
    """Counts launches where it is a context, copies up and down wherever they are made."""
    mode = Launches()
    to_device, cpu, numpy = host_arrays.to_device, torch.Tensor.cpu, torch.Tensor.numpy

    def up(device, *arrays):
        mode.found["up"] += 1
        return to_device(device, *arrays)

    def fill(self, *arrays):
        mode.found["up"] += 1
        with _disable_current_modes():
            real_fill(self, *arrays)

    real_fill = StaticArrays.fill

    def down(tensor):
        mode.found["down"] += 1
        return cpu(tensor)

    def forced(tensor, *, force=False):
        mode.found["down"] += force
        return numpy(tensor)

    for module in (draft_model, runner_module, acceptance, tree_step):
        monkeypatch.setattr(module, "to_device", up)
    monkeypatch.setattr("vllm_ouroboros.draft.features.to_device", up)
    monkeypatch.setattr(static_arrays.StaticArrays, "fill", fill)
    monkeypatch.setattr(torch.Tensor, "cpu", down)
    monkeypatch.setattr(torch.Tensor, "numpy", forced)
    for module, names in (
        (tree_accept, ("_best_of_chunk", "_best_of_row", "_walk")), (kv_compact, ("_compact",)),
    ):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, Kernel(getattr(module, name), mode))
    for name in ("item", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(name))
    return mode


@contextmanager
def counting(counts: Launches, **expected: int) -> Iterator[None]:
    """A block with so many launches, and copies up and down."""
    counts.found.clear()
    counts.names.clear()
    with counts:
        yield
    assert +counts.found == Counter(expected), counts.names


def forked(batch: int) -> list[DraftTree | None]:
    """A tree with a branch for each request."""
    tree = DraftTree(
        np.array([5, 6, 7], np.int32), np.array([-1, 0, 0], np.int32), np.ones(NODES, np.int32)
    )
    return [tree] * batch


@pytest.mark.parametrize("batch", [1, 32])
def test_a_verification_around_its_graph(monkeypatch, counts, batch) -> None:
    trees, width = forked(batch), NODES + 1
    rows = batch * width
    runner = OuroborosCUDARunner.__new__(OuroborosCUDARunner)
    names = [str(r) for r in range(batch)]
    clock = SimpleNamespace(phase=lambda name: nullcontext())
    of = dict(zip(names, trees, strict=True))
    requests = SimpleNamespace(tree_of=lambda req_id, tokens: of[req_id])
    runner.drafter = SimpleNamespace(clock=clock, requests=requests)
    runner.device, runner.positions = CPU, torch.zeros(rows, dtype=torch.int64)
    runner.input_batch = SimpleNamespace(
        req_ids=names, num_computed_tokens_cpu=np.full(batch, 9, np.int32)
    )
    runner.query_start_loc = SimpleNamespace(np=np.arange(0, rows + 1, width, dtype=np.int32))
    runner.static = tree_step.StaticSteps(CPU, batch, rows, width, 64)
    monkeypatch.setattr(GPUModelRunner, "_prepare_inputs", lambda *_: None)
    scheduled = SimpleNamespace(
        scheduled_spec_decode_tokens={name: [5, 6, 7] for name in names},
        total_num_scheduled_tokens=rows,
    )
    with counting(counts, up=1, launches=3):  # positions: gather, add, scatter
        runner._prepare_inputs(scheduled, np.full(batch, width))
    table = torch.arange(batch * 2, dtype=torch.int32).view(batch, 2)
    built = SimpleNamespace(block_table=table, tree=None)
    cache = torch.zeros(2 * batch, 2, PAGE, 8)
    impl = SimpleNamespace(split_cache=lambda kv: kv.transpose(1, 2).chunk(2, -1))
    runner.target_layers = {"layer": SimpleNamespace(impl=impl, kv_cache=cache)}
    runner.tables = {frozenset(["layer"]): layer_tables([runner.target_layers["layer"]])}
    with counting(counts, up=1):  # masks, into the graph's buffers
        runner._attach_masks({"layer": built}, batch, rows)
    logits = torch.zeros(rows, VOCAB)
    logits[:, 5] = 1
    trees_of = runner.trees
    with counting(counts, up=1, down=1, launches=5):  # best token, walk, moves, one tensor of all
        walked = acceptance.walk_on_device(
            logits, trees_of.rows, trees_of.trees, [frozenset()] * batch, NODES
        )
        built.tree.compact(walked.path)
        found = walked.to_host(trees_of.rows, trees_of.trees)
    assert [one.path.tolist() for one in found] == [[0]] * batch


@pytest.mark.parametrize("batch", [1, 32])
def test_a_round_of_drafting_around_its_graph(counts, batch) -> None:
    table = SimpleNamespace(
        block_table=SimpleNamespace(
            np=np.zeros((batch, 4), np.int32), gpu=torch.zeros(batch, 4, dtype=torch.int32)
        )
    )
    draft = DraftModel.__new__(DraftModel)
    draft.kv_cache_gid, draft.block_size, draft.ranks = 0, PAGE, Ranks()
    draft.graphs = DraftGraphs(
        CPU, 2 * batch, 8, 64, table.block_table.gpu,
        lambda function: (lambda: None, function()),
        lambda step, tokens, positions, slots, asked: torch.zeros(len(tokens), 8),
    )  # fmt: skip
    draft.graphs.capture()
    rows = ForwardRows(
        np.arange(batch), np.arange(batch), np.zeros(2 * batch, np.int32), np.zeros(2 * batch, int),
        np.zeros(2 * batch, int), np.arange(0, 2 * batch + 1, 2, dtype=np.int32),
        np.full(batch, 3, np.int32), np.arange(batch) * 2 + 1,
    )  # fmt: skip
    runner = SimpleNamespace(input_batch=SimpleNamespace(block_table=[table]), device=CPU)
    clock = SimpleNamespace(model=lambda name: nullcontext())
    with counting(counts, up=1):
        hidden = draft.forward(clock, runner, rows, np.ones((2 * batch, 1), np.int32))
    assert hidden.shape == (batch, 8)
    logits = torch.rand(batch, VOCAB)
    with counting(counts, launches=4, down=1):  # softmax, alternatives, one tensor of both
        Choices(logits, batch, None, at_once=True)


@pytest.mark.parametrize("batch", [1, 32])
def test_features_of_a_step(counts, batch) -> None:
    features, hidden = HeadFeatures(batch, 64, 4, 8, torch.float32, CPU), torch.rand(2 * batch, 8)
    with counting(counts, up=1, launches=2):  # gather, scatter
        places = features.place(
            np.arange(batch), np.zeros(batch, int), np.full(batch, 2), np.arange(2 * batch)
        )
        features.store(hidden, *places)
