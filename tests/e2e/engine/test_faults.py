"""Faults while drafting, put into a running engine: no request fails, and texts stay vanilla's."""

from __future__ import annotations

import shutil
import sys

import cloudpickle
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

import vllm_ouroboros

GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
SEEDED = [SamplingParams(temperature=0.8, seed=i, max_tokens=48) for i in range(8)]
MIXED = [one for seeded in SEEDED for one in (GREEDY, seeded)]


@pytest.fixture(scope="module")
def started(ouroboros, pair):
    """Starts engines that take functions, by value: they cannot import this module."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        cloudpickle.register_pickle_by_value(sys.modules[__name__])

        def start(draft: str):
            options = {"num_suffixes": 4, "draft_model": str(pair / draft)}
            return ouroboros(options=options, enable_prefix_caching=True)

        yield start


@pytest.fixture(scope="module")
def engine(started):
    return started("draft")


def fail_rounds(worker) -> None:
    """Let each round of drafting fail."""

    def fail(*args, **kwargs):
        raise ValueError("put in by a test")

    worker.model_runner.drafter.rounds._round = fail


def no_numbers(worker) -> None:
    """Let the draft model say nothing but NaN."""
    draft = worker.model_runner.drafter.draft
    original = type(draft).compute_logits

    def compute_logits(hidden, *, short=False):
        return torch.full_like(original(draft, hidden, short=short), float("nan"))

    draft.compute_logits = compute_logits


def infinite(worker) -> None:
    """Let it be infinitely sure of a token."""
    draft = worker.model_runner.drafter.draft
    original = type(draft).compute_logits

    def compute_logits(hidden, *, short=False):
        logits = original(draft, hidden, short=short)
        logits[:, 7] = float("inf")
        return logits

    draft.compute_logits = compute_logits


def no_memory(worker) -> None:
    """Let it find no memory."""

    def forward(*args, **kwargs):
        return torch.empty(2**60)

    worker.model_runner.drafter.draft.forward = forward


def mend(worker) -> None:
    """Take out what the functions above put in, and forget that it was there."""
    drafter = worker.model_runner.drafter
    drafter.pause.__init__(drafter.counters)
    drafter.rounds.__dict__.pop("_round", None)
    for name in ("compute_logits", "forward"):
        drafter.draft.__dict__.pop(name, None)


def kinds(worker) -> list[int]:
    """Faults so far, by kind."""
    return list(worker.model_runner.drafter.counters.faults)


@pytest.mark.parametrize(
    ("fault", "kind"), [(fail_rounds, 0), (no_memory, 1), (no_numbers, 2), (infinite, 2)]
)
@pytest.mark.parametrize("draft", ["draft", "head"])
def test_a_draft_model_that_fails(draft, fault, kind, started, prompts, vanilla, tools) -> None:
    engine = started(draft)
    expected = tools.tokens_of(vanilla(prompts[:16], MIXED))
    [before] = engine.collective_rpc(kinds)
    engine.collective_rpc(fault)
    with tools.Used(engine) as used:
        assert tools.tokens_of(tools.generate(engine, prompts[:12], MIXED[:12])) == expected[:12]
    [after] = engine.collective_rpc(kinds)
    assert used["faults"] >= 2
    assert after[kind] - before[kind] == used["faults"], "of that kind, all of them"
    assert used["faults"] < used["target_forwards"] // 2, "it tries again at growing intervals"
    assert used["emitted_tokens"] == sum(map(len, expected[:12]))
    engine.collective_rpc(mend)
    assert engine.reset_prefix_cache()  # a head reads no prompt whose features it has not seen
    with tools.Used(engine) as used:
        assert tools.tokens_of(tools.generate(engine, prompts[:16], MIXED)) == expected
    assert used["faults"] == 0
    assert used["accepted_from_draft"] > used["emitted_tokens"] // 10, "it drafts again"


def break_slots(worker) -> None:
    """Let slots of the pool hold more phrases than they can, of impossible lengths."""
    pool = worker.model_runner.drafter.drafting.pool.arrays
    rng = np.random.default_rng(0)
    held = pool.counts > 0
    pool.counts[held] = rng.choice([-3, 10**6, 2**31 - 1], held.sum())
    pool.lengths[held] = rng.choice([-5, 0, 10**6], pool.lengths[held].shape)
    pool.sources[held] = rng.choice([-7, 99], pool.sources[held].shape)


def break_tokens(worker) -> None:
    """Let phrases have tokens that the target does not know."""
    pool = worker.model_runner.drafter.drafting.pool.arrays
    pool.tokens[:] = np.random.default_rng(0).choice([-1, 2**31 - 1, -(2**31)], pool.tokens.shape)


@pytest.mark.parametrize("fault", [break_slots, break_tokens])
def test_a_pool_that_cannot_be(fault, engine, prompts, vanilla, tools) -> None:
    """It starts anew, and nothing of it reaches the target."""
    expected = tools.tokens_of(vanilla(prompts[:16], GREEDY))
    tools.generate(engine, prompts[:12], GREEDY)
    [before] = engine.collective_rpc(kinds)
    engine.collective_rpc(fault)
    with tools.Used(engine) as used:
        assert tools.tokens_of(tools.generate(engine, prompts[:16], GREEDY)) == expected
    [after] = engine.collective_rpc(kinds)
    assert after[3] - before[3] == used["faults"] == 1
    assert used["accepted_tokens"] > used["emitted_tokens"] // 10


def fail_later(worker) -> None:
    """Let what is put off fail: learning rates, saving."""

    def fail():
        raise OSError("put in by a test")

    deferred = worker.model_runner.drafter.deferred
    deferred.waits = True
    deferred.call(fail)


def test_work_that_is_put_off_fails(engine, prompts, vanilla, tools) -> None:
    expected = tools.tokens_of(vanilla(prompts[:16], GREEDY))[:8]
    with tools.Used(engine) as used:
        engine.collective_rpc(fail_later)
        assert tools.tokens_of(tools.generate(engine, prompts[:8], GREEDY)) == expected
    assert used["faults"] == 1


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory) -> str:
    """The target after a step of training, as it were."""
    folder = tmp_path_factory.mktemp("trained") / "target"
    shutil.copytree(pair / "target", folder)
    [path] = folder.glob("*.safetensors")
    tensors, generator = load_file(path), torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        weight = tensors[name]
        noise = torch.randn(weight.shape, generator=generator) * weight.float().std() / 8
        tensors[name] = (weight.float() + noise).to(weight.dtype) if weight.dim() > 1 else weight
    save_file(tensors, path, {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def after_training(trained, pair, prompts, vanilla, tools) -> list[list]:
    """What vanilla vLLM says once it has loaded those weights, and then the first ones again."""
    plain = vanilla.engine(max_num_batched_tokens=1024)  # which no other test asks for
    found = []
    for path in (trained, str(pair / "target")):
        plain.collective_rpc("reload_weights", kwargs={"weights_path": path})
        found.append(tools.tokens_of(tools.generate(plain, prompts[:16], GREEDY)))
    assert sum(a != b for a, b in zip(*found, strict=True)) > 8
    return found


@pytest.mark.parametrize("draft", ["draft", "head"])
def test_weights_are_loaded_again(
    draft, started, trained, after_training, pair, prompts, tools
) -> None:
    """As those who train a policy do between its steps: phrases stay, texts are the target's."""
    engine = started(draft)
    tools.generate(engine, prompts[:8], GREEDY)
    for path, expected in zip((trained, str(pair / "target")), after_training, strict=True):
        before = vllm_ouroboros.stats(engine)["pool_phrases"]
        assert before > 0
        engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
        assert engine.reset_prefix_cache()
        assert vllm_ouroboros.stats(engine)["pool_phrases"] == before, "they are no KV"
        with tools.Used(engine) as used:
            outputs = tools.generate(engine, prompts[:16], GREEDY)
        assert tools.tokens_of(outputs) == expected
        assert used["accepted_from_draft"] > used["emitted_tokens"] // 10
    vllm_ouroboros.reset_pool(engine)
    assert vllm_ouroboros.stats(engine)["pool_phrases"] == 0
    with tools.Used(engine) as used:
        assert tools.tokens_of(tools.generate(engine, prompts[:8], GREEDY)) == expected[:8]
    assert used["pool_phrases"] > 0


def test_cached_prefixes_are_forgotten_with_what_was_drafted_of_them(
    engine, prompts, tools
) -> None:
    """The draft model's KV stands in the target's blocks: it goes with them, and comes again."""
    given, cached = [prompts[0] * 3], []
    for reset in (False, False, True):
        if reset:
            assert engine.reset_prefix_cache()
        with tools.Used(engine) as used:
            [output] = tools.generate(engine, given, GREEDY)
        cached.append(output.num_cached_tokens)
        assert used["accepted_from_draft"] + used["accepted_from_suffix"] > 0
    assert cached[1] > 0 == cached[2]


def test_sleep(engine, prompts, vanilla, tools) -> None:
    """Whatever the device makes of it, phrases and texts are as before."""
    expected = tools.tokens_of(vanilla(prompts[:16], GREEDY))[:8]
    tools.generate(engine, prompts[:8], GREEDY)
    before = vllm_ouroboros.stats(engine)["pool_phrases"]
    engine.sleep(level=1)
    engine.wake_up()
    assert vllm_ouroboros.stats(engine)["pool_phrases"] == before
    assert tools.tokens_of(tools.generate(engine, prompts[:8], GREEDY)) == expected
