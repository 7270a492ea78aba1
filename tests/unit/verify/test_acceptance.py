"""Acceptance against vLLM's own batch and sampler, which decode one token at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.sampler import Sampler

from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.verify.acceptance import Verified, greedy, verify
from vllm_ouroboros.verify.token_sampler import RequestSampling, TokenSampler, build_processors

from ..helpers.fakes import Language, engine_config, input_batch, node_paths, request_state
from ..helpers.random_requests import CPU, DEEPEST, EOS, MODES, VOCAB, make_tree
from ..helpers.sampler_cases import Case, emitted_tokens, logits_of, one_by_one

pytestmark = pytest.mark.usefixtures("quick")


@given(
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    custom=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_speculation_changes_nothing(seed, mode, dtype, custom) -> None:
    """Tokens, logprobs and the use of noise are those of one token at a time, in any batch."""
    case = Case(seed, mode, dtype, custom)
    for _ in range(12):
        case.recompose()
        if case.batch.req_ids:
            case.step()


def run_alone(params: SamplingParams, tree: DraftTree, texts) -> tuple[list[int], Verified]:
    """Verify one request's tree, whose rows have 9 at the given tokens and 0 elsewhere."""
    config = engine_config()
    state = request_state("x", [1], params)
    batch = input_batch(VOCAB, build_processors(config, CPU))
    batch.add_request(state)
    batch.refresh_metadata()
    sampler = TokenSampler(Sampler(), build_processors(config, CPU))
    logits = 9 * torch.nn.functional.one_hot(torch.tensor(texts), VOCAB).float()
    [found], output = verify(
        sampler, logits, np.zeros(1, np.int64), [tree],
        [RequestSampling.of(state, EOS, False, CPU)], set(), batch.sampling_metadata,
    )  # fmt: skip
    return emitted_tokens(output)[0], found


@pytest.mark.parametrize("penalty", [1.0, 1.001])
def test_a_stop_inside_the_path_ends_it(penalty) -> None:
    """The stop comes last, as the token after the path, though the tree goes on."""
    tree = make_tree([[1, 2, 3, 4]])
    for stop, expected in ((9, [1, 2, 3, 4, 5]), (3, [1, 2, 3]), (1, [1]), (4, [1, 2, 3, 4])):
        params = SamplingParams(temperature=0, stop_token_ids=[stop], repetition_penalty=penalty)
        tokens, found = run_alone(params, tree, [1, 2, 3, 4, 5])
        assert tokens == expected
        assert found.path.tolist() == [*range(len(expected) - 1)]
        assert found.predicted.tolist() == [1, 2, 3, 4, 5]
    assert run_alone(SamplingParams(temperature=0), make_tree([[11, 2]]), [11, 2, 3])[0] == [11]
    params = SamplingParams(temperature=0, ignore_eos=True, repetition_penalty=penalty)
    assert run_alone(params, make_tree([[11, 2]]), [11, 2, 3])[0] == [11, 2, 3]


def test_a_plain_request_chooses_as_the_sampler_does() -> None:
    """The walk by argmax and vLLM's sampler agree on equal logits, in half precision too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.zeros(4, VOCAB, dtype=dtype)
        logits[0, [2, 5]] = 1.0
        logits[1, [0, 11]] = 1.0
        logits[2, [7, 3, 9]] = torch.inf
        logits[3, :] = -torch.inf
        assert greedy(logits).tolist() == Sampler.greedy_sample(logits.float()).tolist()


def test_a_budget_of_thoughts_beside_trees() -> None:
    """vLLM's thinking budget ends the thoughts of its request, whatever the others draft."""
    model, config = Language(5, VOCAB, surprise=3), engine_config()
    thinking = {"reasoning_start_token_ids": [3], "reasoning_end_token_ids": [4, 5]}
    more = {"reasoning_config": SimpleNamespace(**thinking)}
    given_params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1, seed=4, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, seed=5, thinking_token_budget=3),
    ]

    def states():
        for i, params in enumerate(given_params):
            noise = None if i == 0 else torch.Generator().manual_seed(params.seed)
            yield request_state(f"r{i}", [7, 3, i], params, generator=noise)

    references = one_by_one(model, config, Sampler(), [*states()], [()] * 3, **more)
    assert references[2].tokens[2:4] == [4, 5], "its prompt has thought one token already"
    batch = input_batch(VOCAB, build_processors(config, CPU), num_spec_tokens=DEEPEST, **more)
    live = [*states()]
    requests = [RequestSampling.of(state, frozenset(), False, CPU) for state in live]
    for state in live:
        batch.add_request(state)
    sampler = TokenSampler(Sampler(), build_processors(config, CPU))
    while len(live[2].output_token_ids) < 8:
        batch.refresh_metadata()
        texts, rows, trees = [], [], []
        for state, reference in zip(live, references, strict=True):
            truth = reference.tokens[len(state.output_token_ids) :]
            tree = DraftTree.chain([truth[0]]) if state is not live[2] else None
            trees.append(tree)
            rows.append(len(texts))
            text = [*state.prompt_token_ids, *state.output_token_ids]
            texts += [[*text, *path] for path in [(), *(node_paths(tree) if tree else [])]]
        _, output = verify(
            sampler, logits_of(model, texts), np.array(rows), trees, requests, set(),
            batch.sampling_metadata,
        )  # fmt: skip
        for state, tokens in zip(live, emitted_tokens(output), strict=True):
            state.output_token_ids += tokens
    for state, reference in zip(live, references, strict=True):
        assert state.output_token_ids == reference.tokens[: len(state.output_token_ids)]
    assert len(live[0].output_token_ids) == len(live[1].output_token_ids) == 16


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_table_of_chosen_ids_leaves_one_token_each(temperature) -> None:
    """`logprob_token_ids` of one request: vLLM's table for it has no room for several tokens."""
    model, config = Language(7, VOCAB), engine_config()
    params = SamplingParams(temperature=temperature, logprob_token_ids=[2, 7])
    states = [
        request_state("x", [1], SamplingParams(temperature=0)),
        request_state("y", [2], params),
    ]
    batch = input_batch(VOCAB, build_processors(config, CPU))
    for state in states:
        batch.add_request(state)
    batch.refresh_metadata()
    tree = make_tree([model.greedy([1], 3)])
    logits = logits_of(model, [[1], *([1, *path] for path in node_paths(tree)), [2]])
    verified, output = verify(
        TokenSampler(Sampler(), build_processors(config, CPU)),
        logits,
        np.array([0, 4]),
        [tree, None],
        [RequestSampling.of(state, EOS, False, CPU) for state in states],
        set(),
        batch.sampling_metadata,
    )
    assert verified == [None, None]
    assert [len(tokens) for tokens in emitted_tokens(output)] == [1, 1]
    assert output.sampled_token_ids[0, 0] == logits[0].argmax()
    ids, values = output.logprobs_tensors[:2]
    assert ids[1, 1:].tolist() == [2, 7]
    torch.testing.assert_close(values[1, 1:], logits.log_softmax(-1)[4, [2, 7]])
