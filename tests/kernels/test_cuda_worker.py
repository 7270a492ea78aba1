"""The CUDA worker's life around steps: attention backends, sleep, the draft model's weights."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_ouroboros.draft.model import DraftModel
from vllm_ouroboros.draft.rounds import DraftRounds
from vllm_ouroboros.integration import compat, cuda_runner, cuda_worker
from vllm_ouroboros.integration.cuda_runner import GRAPH_BYTES, OuroborosCUDARunner
from vllm_ouroboros.integration.cuda_worker import OuroborosCUDAWorker
from vllm_ouroboros.integration.worker import OuroborosWorkerMixin


def test_the_worker_is_the_one_that_engines_are_told() -> None:
    name = f"{cuda_worker.__name__}.{cuda_worker.OuroborosCUDAWorker.__name__}"
    assert compat.WORKERS["cuda"] == name


def test_a_later_engine_gets_vllms_backends() -> None:
    class Base:
        def init_device(self) -> None:
            self.seen = paths()

        def shutdown(self) -> None: ...

    class Ours(OuroborosWorkerMixin, Base):
        backends = OuroborosCUDAWorker.backends

    def paths() -> dict[AttentionBackendEnum, str]:
        return {backend: backend.get_path() for backend in Ours.backends}

    before, worker = paths(), Ours()
    worker.init_device()
    assert worker.seen == Ours.backends != before
    worker.shutdown()
    assert paths() == before


class Draft(DraftModel):
    """A draft that shares a layer with its target."""

    def __init__(self, shared: nn.Module) -> None:
        self.model = nn.ModuleList([nn.Linear(2, 2), shared])
        self.model.register_buffer("angles", torch.ones(3), persistent=False)
        self._of_target = {one.data_ptr() for one in shared.parameters()}
        self.changes = 0

    def target_changed(self) -> None:
        self.changes += 1


@pytest.mark.parametrize("level, tags", [(1, None), (2, None), (2, ["weights"])])
def test_sleep_keeps_the_drafts_weights(monkeypatch, level, tags) -> None:
    """Level 2 loses all weights; those of the target are loaded again by whoever asked for it."""
    shared = nn.Linear(2, 2)
    draft = Draft(shared)
    everything = [*draft.model.parameters(), *draft.model.buffers()]
    own = [one.detach().clone() for one in draft.own_tensors()]
    assert len(own) == len(everything) - 2

    def discard(self, level: int) -> None:
        for one in everything if level == 2 else ():
            one.data.fill_(torch.nan)

    monkeypatch.setattr(Worker, "sleep", discard)
    monkeypatch.setattr(Worker, "wake_up", lambda self, tags: None)
    worker = object.__new__(OuroborosCUDAWorker)
    worker.model_runner = SimpleNamespace(drafter=SimpleNamespace(draft=draft))
    worker.sleep(level)
    worker.wake_up(["kv_cache"])
    assert draft.changes == 0
    worker.wake_up(tags)
    assert draft.changes == 1
    assert all(a.equal(b) for a, b in zip(draft.own_tensors(), own, strict=True))
    assert bool(shared.weight.isnan().all()) is (level == 2)
    assert not worker._weights_of_draft


def test_weights_that_a_trainer_sends_are_the_targets_too(monkeypatch) -> None:
    done = []
    monkeypatch.setattr(Worker, "finish_weight_update", lambda self: done.append("sent"))
    worker = object.__new__(OuroborosCUDAWorker)
    worker.model_runner = SimpleNamespace(target_changed=lambda: done.append("told"))
    worker.finish_weight_update()
    assert done == ["sent", "told"]


def test_engines_without_a_draft_model_sleep(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(Worker, "sleep", lambda self, level: calls.append(level))
    monkeypatch.setattr(Worker, "wake_up", lambda self, tags: calls.append(tags))
    worker = object.__new__(OuroborosCUDAWorker)
    worker.model_runner = SimpleNamespace(drafter=SimpleNamespace(draft=None))
    worker.sleep(2)
    worker.wake_up()
    assert calls == [2, None]


@pytest.mark.parametrize(
    "draft, mode, graphs", [(1, "FULL", 11), (None, "FULL", 0), (1, "NONE", 0)]
)
def test_the_drafts_graphs_are_counted(monkeypatch, draft, mode, graphs) -> None:
    monkeypatch.setattr(GPUModelRunner, "profile_cudagraph_memory", lambda self: 1000)
    runner = object.__new__(OuroborosCUDARunner)
    runner.drafter = SimpleNamespace(draft=draft)
    runner.compilation_config = SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode])
    assert runner.profile_cudagraph_memory() == 1000 + graphs * GRAPH_BYTES


def test_a_profile_counts_the_logits_of_a_round(monkeypatch) -> None:
    """As many rows as a draft forward of the largest batch has, at most what a forward may have."""
    monkeypatch.setattr(GPUModelRunner, "profile_run", lambda self: None)
    asked = []

    class Draft(DraftModel):
        model_config = SimpleNamespace(get_hidden_size=lambda: 8, dtype=torch.float32)
        target_config = SimpleNamespace(device_config=SimpleNamespace(device="cpu"))
        short_ids = None

        def __init__(self) -> None: ...

        def compute_logits(self, hidden, *, short=False):
            asked.append(("draft", *hidden.shape, short))
            return hidden.new_zeros(len(hidden), 50)

    rounds = object.__new__(DraftRounds)
    rounds.draft, rounds.max_rows, rounds._most_rows = Draft(), 40, lambda width: 9
    runner = object.__new__(OuroborosCUDARunner)
    runner.drafter = SimpleNamespace(
        draft=rounds.draft, rounds=rounds, warm_up=lambda rows: asked.append(rows)
    )
    runner.max_num_tokens, runner.max_num_reqs, runner.uniform_decode_query_len = 64, 4, 5
    runner.model_config, runner.device = Draft.model_config, "cpu"
    runner.model = SimpleNamespace(compute_logits=lambda h: asked.append(("target", *h.shape)))
    runner.profile_run()
    assert asked == [64, ("target", 20, 8), ("draft", 36, 8, False)]
    assert rounds.rows_of_forward(100) == 40


@pytest.mark.parametrize("shared", [True, False])
def test_graphs_of_a_shared_draft_model_hold_messages(monkeypatch, shared) -> None:
    """Captured where vLLM registers the buffers that ranks exchange; not those of a whole one,
    whose rank would wait there for the others."""
    inside, seen = [], []

    @contextmanager
    def graph_capture(device):
        inside.append(device)
        yield SimpleNamespace(stream="stream of the capture")
        inside.clear()

    def graph_draft(self, capture) -> None:
        seen.append((list(inside), capture.args[1]))

    monkeypatch.setattr(cuda_runner, "graph_capture", graph_capture)
    monkeypatch.setattr(OuroborosCUDARunner, "_graph_draft", graph_draft)
    monkeypatch.setattr(GPUModelRunner, "capture_model", lambda self: 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 2))
    runner = object.__new__(OuroborosCUDARunner)
    runner.drafter = SimpleNamespace(draft=SimpleNamespace(is_shared=shared))
    runner.compilation_config = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL)
    runner.device, runner.vllm_config = "cuda", None
    assert runner.capture_model() == 7
    assert seen == [(["cuda"], "stream of the capture") if shared else ([], None)]
