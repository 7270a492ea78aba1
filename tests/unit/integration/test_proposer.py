"""The proposer between a fake engine and a fake draft model with paged KV."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.integration import proposer as module
from vllm_ouroboros.integration.proposer import OuroborosProposer
from vllm_ouroboros.phrases.arrays import PoolFault
from vllm_ouroboros.policy.controller import Policy
from vllm_ouroboros.policy.forward_costs import Costs
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.verify.acceptance import Verified

from ..helpers.fake_draft import FakeDraft, said
from ..helpers.fake_engine import Engine, Sequence, bound, make, state_of
from ..helpers.fakes import Language, ancestors
from ..helpers.policy_fakes import curve

_NUMBER = StructuredOutputsParams(regex="[0-9]*")


@given(
    seed=st.integers(0, 2**32 - 1),
    draft_len=st.sampled_from([0, 40, 80]),
    window=st.sampled_from([0, 3]),
    rows=st.sampled_from([24, 256]),
    scope=st.sampled_from(["global", "request"]),
    overlap=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_an_engines_life(seed, draft_len, window, rows, scope, overlap) -> None:
    """Chunked prompts, cut drafts, preemption, rows that change places: text and KV stay right."""
    rng = np.random.default_rng(seed)
    surprise = int(rng.choice([3, 9, 10**9]))
    target = Language(seed, surprise=surprise)
    draft = FakeDraft(Language(seed, surprise=surprise, twist=6), draft_len) if draft_len else None
    with pytest.MonkeyPatch.context() as context:
        proposer = make(
            context, draft, max_rows=rows, window_size=window, pool_scope=scope, num_suffixes=2
        )
    engine = Engine(proposer, draft, target, seed, 80, overlap)
    sequences = []
    for i in range(int(rng.integers(1, 6))):
        prompt = rng.integers(2, 8, rng.integers(1, 30)).tolist()
        params = SamplingParams(
            temperature=rng.choice([0, 0, 1]),
            seed=i,
            max_tokens=int(rng.integers(1, 40)),
            repetition_penalty=rng.choice([1, 1.1]),  # no plain argmax, though it is one here
            structured_outputs=_NUMBER if rng.random() < 0.2 else None,
        )
        sequences.append(Sequence(str(i), prompt, params, rng.choice([None, "a", "b"])))
    waiting = list(sequences)
    for _ in range(400):
        while waiting and len(engine.sequences) < 4:
            engine.sequences.append(waiting.pop())
        if not engine.sequences:
            break
        engine.step()
    assert not engine.sequences
    assert_said(target, sequences)
    assert all(len(s.text) <= 80 for s in sequences)
    stats = proposer.stats()
    assert {key: stats[key] for key in engine.expected} == engine.expected
    assert stats["accepted_from_draft"] + stats["accepted_from_suffix"] == stats["accepted_tokens"]
    assert stats["draft_forwards"] == (draft.forwards if draft else 0)
    assert len(proposer.requests) == len(proposer.deferred) == 0
    free = sorted(proposer.drafting._free)
    assert free == [0, 1, 2, 3], "a slot was lost or given back twice"


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.1, 0.5]), adaptive=st.booleans())
@settings(max_examples=25, deadline=None)
def test_an_engines_life_with_faults(seed, share, adaptive) -> None:
    """Wherever drafting breaks off, texts go on, and no draft KV of another text is read later."""
    rng = np.random.default_rng(seed)
    surprise = int(rng.choice([3, 9, 10**9]))
    target = Language(seed, surprise=surprise)
    draft = FakeDraft(Language(seed, surprise=surprise, twist=6), 80)
    with pytest.MonkeyPatch.context() as context:
        proposer = make(context, draft, window_size=2, num_suffixes=2, adaptive=adaptive)
    engine = Engine(proposer, draft, target, seed, 80, overlap=True)
    engine.exact = False
    if adaptive:
        proposer.set_policy(Policy(Costs(curve(1e-3, 1e-5), curve(1e-6, 1e-8))))
    errors = [ValueError("x"), FloatingPointError("x"), MemoryError(), PoolFault("x")]

    def broken(function):
        def call(*args, **kwargs):
            before = rng.random() < share
            if before and rng.random() < 0.5:
                raise errors[rng.integers(4)]
            result = function(*args, **kwargs)
            if before:
                raise errors[rng.integers(4)]
            return result

        return call

    drafting, cache = proposer.drafting, proposer.rounds.cache
    for owner, name in (
        (draft, "logits"), (draft, "forward"), (cache, "catch_up"), (cache, "mark_complete"),
        (drafting, "plan"), (drafting, "absorb"), (drafting, "build"), (drafting, "grow"),
        (drafting, "commit"), (drafting, "settle"), (drafting, "learn"), (drafting, "start"),
    ):  # fmt: skip
        if rng.random() < 0.3:
            setattr(owner, name, broken(getattr(owner, name)))
    sequences = [
        Sequence(
            str(i),
            rng.integers(2, 8, rng.integers(1, 30)).tolist(),
            SamplingParams(temperature=rng.choice([0, 1]), seed=i, max_tokens=30),
        )
        for i in range(4)
    ]
    engine.sequences += sequences
    for _ in range(400):
        if not engine.sequences:
            break
        engine.step()
    assert not engine.sequences
    assert_said(target, sequences)
    assert len(proposer.deferred) == 0
    assert sorted(proposer.drafting._free) == [0, 1, 2, 3]


def assert_said(target: Language, sequences: list[Sequence]) -> None:
    """Every text is what the target says alone."""
    for s in sequences:
        noise = torch.Generator().manual_seed(s.params.seed) if s.params.temperature else None
        expected = said(target, s.text[: s.prompt], len(s.text) - s.prompt, (1,), noise)
        assert s.text[s.prompt :] == expected


def simple(monkeypatch, **changes) -> OuroborosProposer:
    proposer = bound(make(monkeypatch, None, **changes))
    proposer.requests.admit("a", state_of(), 0, None)
    return proposer


TREE = DraftTree(
    np.array([5, 6, 7, 8], np.int32), np.array([-1, 0, 0, 2], np.int32), np.full(4, 2, np.int32)
)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_cut_list_is_the_same_tree_cut(monkeypatch, size) -> None:
    proposer = simple(monkeypatch)
    proposer.requests["a"].tree = TREE
    tree = proposer.requests.tree_of("a", [5, 6, 7, 8][:size])
    assert tree.parents.tolist() == [-1, 0, 0, 2][:size]
    assert tree.tokens.tolist() == [5, 6, 7, 8][:size]
    assert tree.sources.tolist() == [2] * size


@pytest.mark.parametrize(
    "scheduled, expected",
    [
        ([5, 6, 9], [5, 6, 9]),  # not what was drafted
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9]),  # longer than what was drafted
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([5, -1, -1], [5]),
        ([5, 6, -1, 8], [5, 6]),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_list_that_is_not_ours_is_a_chain(monkeypatch, scheduled, expected, known) -> None:
    proposer = simple(monkeypatch)
    if known:
        proposer.requests["a"].tree = TREE
    tree = proposer.requests.tree_of("a" if known else "stranger", scheduled)
    assert tree.tokens.tolist() == expected
    assert tree.is_chain
    assert (tree.tokens >= 0).all()


@pytest.mark.parametrize("known", [True, False])
def test_placeholders_alone_are_no_tree(monkeypatch, known) -> None:
    proposer = simple(monkeypatch)
    if known:
        proposer.requests["a"].tree = TREE
    assert proposer.requests.tree_of("a", [-1] * 4) is None
    assert proposer.requests.tree_of("b", [-1]) is None


def test_the_engine_s_stops_are_those_of_its_requests(monkeypatch) -> None:
    proposer = bound(make(monkeypatch, None, eos=1))
    proposer.requests.admit("x", state_of(stop_token_ids=[4]), 0, None)
    assert proposer.requests["x"].sampling.stops == {1, 4}


def test_slots_follow_the_life_of_a_request(monkeypatch) -> None:
    proposer = simple(monkeypatch, max_num_seqs=2)
    proposer.requests.suspend("a")
    proposer.requests.suspend("a")
    assert sorted(proposer.drafting._free) == [0, 1]
    proposer.requests.admit("b", state_of("b"), 0, None)
    proposer.requests.resume("a", 12)
    assert proposer.drafting.state.cached[proposer.requests["a"].slot] == 12
    proposer.requests.suspend("b")
    proposer.requests.forget("b")
    proposer.requests.forget("b")
    proposer.requests.forget("nobody")
    proposer.requests.suspend("nobody")
    proposer.requests.forget("a")
    assert sorted(proposer.drafting._free) == [0, 1]


def test_a_session_goes_on_with_its_noise(monkeypatch) -> None:
    """vLLM admits a request again when its input goes on: the slot is new, the noise is not."""
    proposer = bound(make(monkeypatch, None, max_num_seqs=1))
    first = state_of(temperature=1, seed=3)
    noise = first.generator = torch.Generator().manual_seed(3)
    proposer.requests.admit("a", first, 0, None)
    torch.rand(5, generator=noise)
    for _ in range(2):
        again = state_of(temperature=1, seed=3)
        proposer.requests.admit("a", again, 7, None)
        request = proposer.requests["a"]
        assert request.sampling.generator is noise
        assert request.sampling.state is again
        assert proposer.drafting.state.cached[request.slot] == 7


def lora(name: str, number: int) -> SimpleNamespace:
    return SimpleNamespace(lora_name=name, lora_int_id=number)


@pytest.mark.parametrize("scope", ["global", "request"])
def test_phrases_stay_with_the_tenant(monkeypatch, scope) -> None:
    """Requests share phrases if salt and adapter are the same, and the pool is not per request."""
    proposer = bound(make(monkeypatch, None, max_num_seqs=32, pool_scope=scope))
    tenants = [
        (None, None), ("x", None), ("y", None), ("", None), (None, lora("p", 1)),
        (None, lora("q", 2)), (None, lora("p", 2)), ("x", lora("p", 1)),
    ]  # fmt: skip
    scopes = []
    for turn in range(2):
        for i, (salt, adapter) in enumerate(tenants):
            state = state_of()
            state.lora_request = adapter
            name = f"{turn}-{i}"
            proposer.requests.admit(name, state, 0, salt)
            proposer.requests.suspend(name)
            proposer.requests.resume(name, 0)
            slot = proposer.requests[name].slot
            scopes.append(int(proposer.drafting.state.scope[slot]))
            assert scopes[-1] == proposer.requests[name].scope
    if scope == "request":
        assert len({0, *scopes}) == 1 + 2 * len(tenants)
    else:
        assert scopes[: len(tenants)] == scopes[len(tenants) :]
        assert len(set(scopes)) == len(tenants)
        assert scopes[0] == 0


def test_an_unbound_proposer_says_what_to_do(monkeypatch) -> None:
    proposer = make(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"--worker-cls.*VLLM_PLUGINS"):
        proposer.load_model(None)


def test_a_wrong_setting_is_refused(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="draft_tokens = 0"):
        make(monkeypatch, None, draft_tokens=0)
    with pytest.raises(ConfigError, match=r"num_speculative_tokens = 3.*draft_tokens = 4"):
        make(monkeypatch, None, budget=3, adaptive=False)


def test_origins_say_who_proposed_each_token(monkeypatch) -> None:
    proposer = simple(monkeypatch)
    proposer.requests.tracing = True
    tree = DraftTree(
        np.array([5, 6, 7], np.int32), np.array([-1, 0, 0], np.int32), np.array([1, 1, 2], np.int32)
    )
    proposer.requests["a"].tree = tree
    proposer.drafting.state.committed[proposer.requests["a"].slot] = 2
    verified = {"a": Verified(tree, np.array([0, 2], np.int32), np.array([5, 7, 0, 9]))}
    ids = np.array([[3, 4, 5, 7, 9, 0, 0, 0]], np.int32)
    batch = SimpleNamespace(
        req_ids=["a"], num_prompt_tokens=np.array([2]), num_computed_tokens_cpu=np.array([1])
    )
    bound(proposer, input_batch=batch, verified=verified, scheduled_tokens={"a": 4})
    proposer.propose([[5, 7, 9]], np.array([5], np.int32), ids)
    proposer.requests.forget("a")
    assert proposer.requests.finished_origins == {"a": [1, 2, 0]}
    stats = proposer.stats()
    assert (stats["accepted_from_draft"], stats["accepted_from_suffix"]) == (1, 1)
    assert (stats["verified_nodes"], stats["emitted_tokens"], stats["steps"]) == (3, 3, 1)


class Opaque(LogitsProcessor):
    """One whose answers may depend on anything."""

    def __init__(self, *args) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        pass

    def apply(self, logits):
        return logits


class Known(Opaque):
    """One that says that it knows no more than the request."""

    ouroboros_stateless = True


@pytest.mark.parametrize(
    "changes, processors, speculates",
    [
        ({}, [], True),
        ({"temperature": 1.0, "min_p": 0.1, "logit_bias": {3: 1.0}}, [Known()], True),
        ({"thinking_token_budget": 3}, [], False),
        ({}, [Known(), Opaque()], False),
        ({"temperature": 1.0}, [Opaque()], False),
    ],
)
def test_a_request_that_cannot_speculate_gets_no_draft(
    monkeypatch, changes, processors, speculates
) -> None:
    ids = np.array([[3, 4, 3, 4, 3, 4, 0, 0]], np.int32)
    batch = SimpleNamespace(
        req_ids=["a"], num_prompt_tokens=np.array([5]), num_computed_tokens_cpu=np.array([0])
    )
    proposer = bound(
        make(monkeypatch, None), processors,
        input_batch=batch, verified={}, scheduled_tokens={"a": 5},
    )  # fmt: skip
    proposer.requests.admit("a", state_of(**changes), 0, None)
    [draft] = proposer.propose([[4]], np.array([6], np.int32), ids)
    assert bool(draft) == speculates
    assert len(proposer.drafting.pool) > 0  # its text feeds the pool anyway
    assert proposer.requests["a"].sampling.argmax_only == (
        not processors and "temperature" not in changes
    )


def test_who_may_end_all_drafting_is_named(monkeypatch, caplog) -> None:
    with caplog.at_level("WARNING", logger=module.logger.name):
        bound(make(monkeypatch, None), [Known()])
        assert not caplog.records
        bound(make(monkeypatch, None), [Known(), Opaque(), Opaque()])
    assert "logits processor Opaque may depend on more" in caplog.text


def test_ancestors_of_the_fakes() -> None:
    assert ancestors(TREE.parents, 3) == [0, 2, 3]
