"""Parts of the runner that need no engine."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample import logits_processor
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_ouroboros.integration.cpu_worker import OuroborosCPURunner
from vllm_ouroboros.integration.deferred import Deferred
from vllm_ouroboros.integration.runner import TreeBatch
from vllm_ouroboros.metrics.counters import Counters
from vllm_ouroboros.metrics.forward_timer import HostTimer
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.verify.token_sampler import RequestSampling, TokenSampler, build_processors

from ..helpers.fakes import engine_config, input_batch, request_state

CPU = torch.device("cpu")
VOCAB = 8


def branching(size: int) -> DraftTree:
    """A root with ``size`` children."""
    return DraftTree(
        np.arange(size, dtype=np.int32), np.full(size, -1, np.int32), np.ones(size, np.int32)
    )


def test_layout_of_a_batch() -> None:
    """A prompt chunk, a tree, a chain with placeholders behind it, another tree."""
    trees = [None, branching(3), DraftTree.chain([4]), branching(2)]
    scheduled = [7, 4, 4, 3]
    batch = TreeBatch(trees, np.array([0, 3, 3, 2]), np.cumsum(scheduled))
    assert batch.rows.tolist() == [0, 1, 5, 9]  # among the sampled rows
    assert batch.starts.tolist() == [6, 7, 11, 15]  # in the forward
    assert batch.branching == [1, 3]
    rows, parents, starts = batch.layout
    assert rows.tolist() == [7, 8, 9, 10, 15, 16, 17]
    assert parents.tolist() == [-1, 0, 0, 0, -1, 0, 0]
    assert starts.tolist() == [0, 4, 7]
    assert starts.dtype == parents.dtype == np.int32


def sampling_runner(*params: SamplingParams) -> OuroborosCPURunner:
    """A runner with as much as sampling needs, and requests "r0", "r1" ..."""
    config = engine_config()
    runner = OuroborosCPURunner.__new__(OuroborosCPURunner)
    runner.input_batch = input_batch(VOCAB, build_processors(config, CPU))
    runner.token_sampler = TokenSampler(Sampler(), build_processors(config, CPU))
    runner.drafter = SimpleNamespace(clock=StepClock(), requests={})
    runner.discard_request_mask = SimpleNamespace(np=np.zeros(8, np.bool_))
    runner.verified = {"r0": "what the last step found"}
    for i, one in enumerate(params):
        state = request_state(f"r{i}", [1, 2], one)
        sampled = RequestSampling.of(state, frozenset(), False, CPU)
        runner.drafter.requests[state.req_id] = SimpleNamespace(sampling=sampled)
        runner.input_batch.add_request(state)
    runner.input_batch.refresh_metadata()
    return runner


def test_a_step_without_drafts_has_verified_nothing() -> None:
    """What the last step found must not be counted and learned a second time."""
    runner = sampling_runner(SamplingParams(temperature=0))
    runner.trees = TreeBatch([None], np.array([0]), np.array([1]))
    output = runner._sample(torch.eye(VOCAB)[[5]], None)
    assert output.sampled_token_ids.tolist() == [[5]]
    assert runner.verified == {}
    assert runner.trees is None


def test_sampling_walks_trees_and_moves_what_was_accepted() -> None:
    """A plain request, one in the middle of its prompt, and one with noise; the KV of accepted
    nodes goes to where a chain would have put it.
    """
    greedy, drawn = SamplingParams(temperature=0), SamplingParams(temperature=0.01)
    runner = sampling_runner(greedy, drawn, drawn)
    runner.discard_request_mask.np[1] = True
    noise = [q.sampling.generator for q in runner.drafter.requests.values()][1:]
    before = [generator.get_state() for generator in noise]
    tree = branching(3)  # of tokens 0, 1 and 2
    runner.trees = TreeBatch([tree, None, tree], np.array([3, 0, 3]), np.array([4, 9, 13]))
    moves = []
    runner.trees.steps = [SimpleNamespace(write=lambda rows: moves.extend(rows.tolist()))]
    runner.input_batch.num_computed_tokens_cpu[:3] = [40, 50, 60]
    rows = [1, 7, 6, 7, 4, 0, 5, 7, 7]
    output = runner._sample(100 * torch.eye(VOCAB)[rows], None)
    assert output.sampled_token_ids.tolist() == [[1, 6], [4, -1], [0, 5]]
    assert [*runner.verified] == ["r0", "r2"]
    assert runner.verified["r0"].path.tolist() == [1]
    assert runner.verified["r2"].predicted.tolist() == [0, 5, 7, 7]
    # of the first tree, row 2 of its 4 goes to the slot after the root; the other is in its place
    assert moves == [[0, 2, 41]]
    same = [torch.equal(g.get_state(), s) for g, s in zip(noise, before, strict=True)]
    assert same == [True, False]


def test_requests_are_made_known_in_the_order_of_their_lives(monkeypatch) -> None:
    """Preempted before vLLM's own update, new and resumed ones after it; no generator is left."""
    calls = []

    def update(self, output):
        calls.append("vllm")
        self.requests["new"] = "state"
        self.input_batch.generators[0] = torch.Generator()
        return "result"

    monkeypatch.setattr(CPUModelRunner, "_update_states", update)
    runner = OuroborosCPURunner.__new__(OuroborosCPURunner)
    runner.requests, runner.input_batch = {}, SimpleNamespace(generators={})
    requests = SimpleNamespace(
        suspend=lambda *args: calls.append(("suspend", *args)),
        admit=lambda *args: calls.append(("admit", *args)),
        resume=lambda *args: calls.append(("resume", *args)),
    )
    runner.drafter = SimpleNamespace(requests=requests)
    scheduled = SimpleNamespace(
        preempted_req_ids={"tired"},
        scheduled_new_reqs=[
            SimpleNamespace(req_id="new", num_computed_tokens=3, cache_salt="salt")
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["back", "going"], num_computed_tokens=[8, 9], resumed_req_ids={"back"}
        ),
        num_scheduled_tokens={"new": 4},
    )
    assert runner._update_states(scheduled) == "result"
    assert calls == [
        ("suspend", "tired"), "vllm", ("admit", "new", "state", 3, "salt"), ("resume", "back", 8),
    ]  # fmt: skip
    assert runner.input_batch.generators == {}
    assert runner.scheduled_tokens == {"new": 4}


@pytest.mark.parametrize("fails", [True, False])
def test_vllm_sets_up_without_custom_processors(monkeypatch, fails) -> None:
    """It would refuse them; they are back when it is done, or has failed."""
    seen = []

    def init(self, vllm_config, device):
        seen.append((vllm_config.model_config.logits_processors, device))
        if fails:
            raise ValueError("no memory")

    monkeypatch.setattr(CPUModelRunner, "__init__", init)
    config = engine_config(processors=("one",))
    runner = OuroborosCPURunner.__new__(OuroborosCPURunner)
    with pytest.raises(ValueError, match="no memory") if fails else nullcontext():
        runner._init_without_processors(config, CPU)
    assert seen == [(None, CPU)]
    assert config.model_config.logits_processors == ["one"]
    assert not logging.getLogger(logits_processor.__name__).disabled


def test_what_no_draft_waits_for_is_done_behind_the_launch(monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(CPUModelRunner, "_model_forward", lambda self, *args: done.append("launch"))
    runner = OuroborosCPURunner.__new__(OuroborosCPURunner)
    runner.scheduled_tokens, runner.forward_timer = {"a": 3}, HostTimer()
    deferred = Deferred(waits=True)
    deferred.call(done.append, "learn")
    runner.drafter = SimpleNamespace(
        counters=Counters(), policy=None, head=None, clock=StepClock(), catch_up=deferred.catch_up
    )
    runner._model_forward()
    assert done == ["launch", "learn"]
    assert runner.drafter.counters.target_forwards == 1
