"""How requests are sampled: their noise, their stops, and paths as vLLM's sampler sees them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.sampler import Sampler

from vllm_ouroboros.verify.token_sampler import (
    RequestSampling,
    TokenSampler,
    build_processors,
    can_speculate,
    is_argmax_only,
    stateless,
)

from ..helpers.fakes import Language, engine_config, input_batch, request_state

CPU = torch.device("cpu")
VOCAB = 12
EOS = frozenset([11])


pytestmark = pytest.mark.usefixtures("quick")


class Own(LogitsProcessor):
    """A processor of which nothing is known."""

    def __init__(self, *args) -> None:
        self.rows: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        if batch_update:
            for row in batch_update.removed:
                del self.rows[row]  # a row that it knows
            for row, _, _, output in batch_update.added:
                assert row not in self.rows, "a row that was not given back"
                self.rows[row] = output

    def apply(self, logits):
        assert [*self.rows] == [*range(len(logits))], "rows that are not there"
        for row, output in self.rows.items():
            logits[row, sum(output) % VOCAB] += 4
        return logits


class Adapter(AdapterLogitsProcessor):
    """One processor for each request."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        return None


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1}, {"logit_bias": {1: 1.0}}, {"min_tokens": 2},
        {"allowed_token_ids": [1]}, {"bad_words": ["a"]}, {"logprobs": 0},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_what_needs_the_sampler_at_each_row(changes) -> None:
    assert is_argmax_only(SamplingParams(temperature=0))
    params = SamplingParams(**{"temperature": 0, **changes})
    assert not is_argmax_only(params)
    assert not sampled(params).argmax_only


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_token_ids": [1]}, {"stop": ["x"]}, {"seed": 1}, {"max_tokens": 1},
        {"ignore_eos": True}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1},
        {"prompt_logprobs": 2}, {"structured_outputs": StructuredOutputsParams(json_object=True)},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_what_leaves_the_argmax_alone(changes) -> None:
    params = SamplingParams(**{"temperature": 0, **changes})
    assert is_argmax_only(params)
    assert sampled(params).argmax_only
    assert not sampled(params, custom=True).argmax_only


def test_only_a_thinking_budget_forbids_trees() -> None:
    assert can_speculate(SamplingParams(temperature=0))
    assert can_speculate(SamplingParams(temperature=1, seed=3, min_p=0.1, logit_bias={1: 2.0}))
    assert not can_speculate(SamplingParams(temperature=0, thinking_token_budget=4))
    assert not can_speculate(None), "a pooling request"


def sampled(params: SamplingParams, custom: bool = False, generator=None) -> RequestSampling:
    return RequestSampling.of(
        request_state("x", [1], params, generator=generator), EOS, custom, CPU
    )


def test_stops_are_those_of_the_request() -> None:
    def stops(**params):
        return sampled(SamplingParams(**params)).stops

    assert stops() == {11}
    assert stops(stop_token_ids=[4, 5]) == {4, 5, 11}
    assert stops(stop_token_ids=[4], ignore_eos=True) == {4}
    assert stops(ignore_eos=True) == set()


@pytest.mark.parametrize(
    "changes, processed",
    [
        ({}, False), ({"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 1.2}, False),
        ({"temperature": 1.0, "min_p": 0.1}, True), ({"logit_bias": {1: 1.0}}, True),
        ({"min_tokens": 2}, True),
    ],
)  # fmt: skip
def test_which_requests_logits_processors_look_at(changes, processed) -> None:
    params = SamplingParams(**{"temperature": 0, **changes})
    assert sampled(params).has_processors is processed
    assert sampled(params, custom=True).has_processors


# -- noise -----------------------------------------------------------------------------------------


def draws(request: RequestSampling, count: int = 4) -> list[int]:
    return [int(torch.randint(2**31, (), generator=request.generator)) for _ in range(count)]


def test_a_seed_gives_its_own_stream() -> None:
    """The generator that vLLM seeded changes hands: nobody else can draw from it or rewind it."""
    params = SamplingParams(temperature=1, seed=5)
    generator = torch.Generator().manual_seed(5)
    state = request_state("x", [1], params, generator=generator)
    request = RequestSampling.of(state, EOS, False, CPU)
    assert request.generator is generator
    assert state.generator is None
    assert draws(request) == draws(
        RequestSampling(state, generator=torch.Generator().manual_seed(5))
    )


def test_requests_without_a_seed_have_streams_of_their_own() -> None:
    """They differ from one another, and follow the seed of the engine."""
    streams = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pair = [sampled(SamplingParams(temperature=1)) for _ in range(2)]
        streams.append([draws(request) for request in pair])
    assert streams[0] == streams[1]
    flat = [tuple(stream) for pair in streams[1:] for stream in pair]
    assert len(set(flat)) == 4


def test_a_greedy_request_has_no_noise() -> None:
    """Nor does it take any from the others: the engine's generator stays where it is."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    request = sampled(SamplingParams(temperature=0, seed=4))
    assert request.generator is None
    assert request.with_noise_copy() is request
    assert torch.equal(torch.get_rng_state(), before)


def test_drafting_draws_what_the_target_will_draw() -> None:
    request = sampled(SamplingParams(temperature=1, stop_token_ids=[2], min_tokens=1))
    ahead = request.with_noise_copy()
    expected = draws(ahead)
    assert draws(request.with_noise_copy()) == expected
    assert draws(request) == expected, "what the draft drew is still there"
    assert draws(request) != expected
    assert ahead.state is request.state
    assert (ahead.stops, ahead.has_processors, ahead.argmax_only) == (
        request.stops, request.has_processors, request.argmax_only,
    )  # fmt: skip


# -- logits processors -----------------------------------------------------------------------------


def test_all_processors_are_built() -> None:
    """Those that vLLM leaves out or refuses beside speculation too; its configuration is kept."""
    config = engine_config(processors=(Own, Adapter))
    found = [type(p) for p in build_processors(config, CPU).all]
    assert set(found) == {
        MinPLogitsProcessor, LogitBiasLogitsProcessor, MinTokensLogitsProcessor, Own, Adapter,
    }  # fmt: skip
    assert len(found) == 5
    assert config.speculative_config == "ours"
    assert config.model_config.logits_processors == [Own, Adapter]
    config.model_config.logits_processors = None
    assert len([*build_processors(config, CPU).all]) == 3


def test_who_answers_from_the_request_alone() -> None:
    assert all(stateless(p) for p in build_processors(engine_config(), CPU).all)
    assert stateless(Adapter(None, CPU, False))
    own = Own()
    assert not stateless(own)
    own.ouroboros_stateless = True
    assert stateless(own)
    own.ouroboros_stateless = "perhaps"
    assert not stateless(own)


# -- paths -----------------------------------------------------------------------------------------


KINDS = (
    {"temperature": 0},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.8, "logit_bias": {3: 2.0}},
    {"temperature": 0, "min_tokens": 4, "stop_token_ids": [2, 3]},
    {"temperature": 1.0, "top_k": 3, "top_p": 0.7},
    {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.3},
    {"temperature": 0.6, "presence_penalty": 1.0, "allowed_token_ids": [0, 1, 2, 3, 4, 5, 6]},
)


@given(
    waves=st.lists(
        st.lists(
            st.tuples(
                st.integers(0, len(KINDS) - 1), st.lists(st.integers(0, VOCAB - 1), max_size=3)
            ),
            min_size=1,
            max_size=8,
            unique_by=lambda row: row[0],
        ),
        min_size=1,
        max_size=6,
    ),
    custom=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_a_path_is_sampled_as_if_it_were_text(waves, custom, seed) -> None:
    """Each row's token is that of a request alone whose output ends with the path; nothing is left
    over from the rows before, and the batch itself sees nothing of it.
    """
    config = engine_config(processors=(Own,) if custom else ())
    model = Language(seed, VOCAB, surprise=3)
    live = input_batch(VOCAB, build_processors(config, CPU), custom=custom)
    states, requests = [], []
    for i, kind in enumerate(KINDS):
        states.append(request_state(f"r{i}", [i, 1], SamplingParams(**kind), output=[i, 4]))
        requests.append(RequestSampling.of(states[-1], EOS, custom, CPU))
        live.add_request(states[-1])
    live.refresh_metadata()
    outputs = [list(state.output_token_ids) for state in states]
    sampler = TokenSampler(Sampler(), build_processors(config, CPU))
    for wave in waves:
        paths = [path for _, path in wave]
        texts = [[i, 1, i, 4, *path] for i, path in wave]
        logits = torch.stack([torch.from_numpy(model.logits(text)) for text in texts])
        copies = [requests[i].with_noise_copy() for i, _ in wave]
        found = sampler.after_paths(
            logits.clone(), live.sampling_metadata, [i for i, _ in wave],
            [requests[i] for i, _ in wave], paths, logprobs=False,
        )  # fmt: skip
        assert found.logprobs_tensors is None
        for row, ((i, path), noise) in enumerate(zip(wave, copies, strict=True)):
            batch = input_batch(VOCAB, build_processors(config, CPU), custom=custom)
            text = states[i].output_token_ids + path
            params = SamplingParams(**KINDS[i])
            batch.add_request(request_state("x", [i, 1], params, text, noise.generator))
            batch.refresh_metadata()
            alone = Sampler()(logits[[row]], batch.sampling_metadata)
            assert found.sampled_token_ids[row] == alone.sampled_token_ids[0]
            if noise.generator is not None:
                states_after = requests[i].generator.get_state(), noise.generator.get_state()
                assert torch.equal(*states_after), "one draw for a token"
    assert [state.output_token_ids for state in states] == outputs
    assert live.sampling_metadata.generators == {}


def test_the_text_is_sampled_with_the_given_noise_only() -> None:
    """A request that is not named in ``generators`` leaves its own generator alone."""
    config = engine_config()
    live = input_batch(VOCAB, build_processors(config, CPU))
    requests = []
    for i in range(3):
        state = request_state(f"r{i}", [i], SamplingParams(temperature=1))
        requests.append(RequestSampling.of(state, EOS, False, CPU))
        live.add_request(state)
    live.refresh_metadata()
    before = [request.generator.get_state() for request in requests]
    sampler = TokenSampler(Sampler(), build_processors(config, CPU))
    output = sampler.after_text(
        torch.zeros(3, VOCAB), live.sampling_metadata, {1: requests[1].generator}
    )
    assert output.sampled_token_ids.shape == (3, 1)
    same = [
        torch.equal(request.generator.get_state(), state)
        for request, state in zip(requests, before, strict=True)
    ]
    assert same == [True, False, True]
