"""Sampling parameters mean what they mean in vLLM; only the plain greedy requests speculate."""

from __future__ import annotations

import itertools

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

NEW_TOKENS = 32


def greedy(**more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, **more)


CASES = {
    "temperature": lambda i: SamplingParams(temperature=0.8, seed=i, max_tokens=NEW_TOKENS),
    "top_k and top_p": lambda i: SamplingParams(
        temperature=1.1, top_k=20, top_p=0.9, seed=100 + i, max_tokens=NEW_TOKENS
    ),
    "repetition_penalty": lambda i: greedy(repetition_penalty=1.3),
    "presence_penalty": lambda i: greedy(presence_penalty=0.8),
    "frequency_penalty": lambda i: greedy(frequency_penalty=0.6),
    "min_tokens": lambda i: greedy(min_tokens=24),
    "bad_words": lambda i: greedy(bad_words=["return", " self", "if"]),
    "allowed_token_ids": lambda i: greedy(allowed_token_ids=list(range(2, 1500))),
    "regex": lambda i: greedy(
        structured_outputs=StructuredOutputsParams(regex=r"(\n    [a-z]{1,8} = [0-9]{1,4}){2,4}")
    ),
    "choice": lambda i: greedy(structured_outputs=StructuredOutputsParams(choice=["yes", "no"])),
    "logprobs": lambda i: greedy(logprobs=3),
    "prompt_logprobs": lambda i: greedy(logprobs=1, prompt_logprobs=1),
    "greedy": lambda i: greedy(),
}
SPECULATES = ("logprobs", "prompt_logprobs", "greedy")


def assert_close_logprobs(found, wanted) -> None:
    """Two lists of {token: Logprob}: same tokens and ranks, values within 1e-4."""
    assert (found is None) == (wanted is None)
    for ours, theirs in zip(found or [], wanted or [], strict=True):
        if theirs is None:
            assert ours is None
            continue
        assert ours.keys() == theirs.keys()
        for token, value in theirs.items():
            assert ours[token].logprob == pytest.approx(value.logprob, abs=1e-4)
            assert ours[token].rank == value.rank


def assert_same(outputs, expected) -> None:
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_close_logprobs(ours.prompt_logprobs, theirs.prompt_logprobs)
        for got, want in zip(ours.outputs, theirs.outputs, strict=True):
            assert list(got.token_ids) == list(want.token_ids)
            assert got.finish_reason == want.finish_reason
            assert got.text == want.text
            assert_close_logprobs(got.logprobs, want.logprobs)
            if want.cumulative_logprob is not None:
                assert got.cumulative_logprob == pytest.approx(want.cumulative_logprob, abs=1e-2)


@pytest.mark.parametrize("case", list(CASES))
def test_equals_vanilla(case, ouroboros, prompts, vanilla, tools):
    some = prompts[:8]
    params = [CASES[case](i) for i in range(len(some))]
    expected = vanilla(some, params)
    with tools.Used(ouroboros()) as used:
        outputs = tools.generate(ouroboros(), some, params)
    assert_same(outputs, expected)
    assert (used["verified_nodes"] > 0) == (case in SPECULATES)


def test_all_kinds_in_one_batch(ouroboros, prompts, vanilla, tools):
    """Requests of every kind above share the batches of one run."""
    params = [CASES[case](i) for i, case in zip(range(26), itertools.cycle(CASES))]
    some = prompts[: len(params)]
    expected = vanilla(some, params)
    with tools.Used(ouroboros()) as used:
        outputs = tools.generate(ouroboros(), some, params)
    assert_same(outputs, expected)
    assert used["accepted_tokens"] > 0


def test_greedy_speculates_next_to_sampled(ouroboros, prompts, vanilla, tools):
    params = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=NEW_TOKENS) if i % 2 else greedy()
        for i in range(16)
    ]
    some = prompts[:16]
    with tools.Used(ouroboros()) as used:
        outputs = tools.generate(ouroboros(), some, params)
    expected = vanilla(some, params)
    assert_same(outputs, expected)
    emitted_by_greedy = sum(len(o.outputs[0].token_ids) for o in outputs[::2])
    assert emitted_by_greedy // 4 < used["accepted_tokens"] < emitted_by_greedy


def test_several_completions(ouroboros, prompts, vanilla, tools):
    params = SamplingParams(temperature=0.7, seed=11, n=3, max_tokens=16)
    assert_same(tools.generate(ouroboros(), prompts[:4], params), vanilla(prompts[:4], params))


@pytest.mark.parametrize("refused", [{"min_p": 0.1}, {"logit_bias": {5: 2.0}}])
def test_what_vllm_refuses_with_speculation(refused, ouroboros, prompts, vanilla, tools):
    """vLLM's own limits come as an error of the one request; the engine lives on."""
    llm = ouroboros()
    with pytest.raises(VLLMValidationError, match="speculative decoding"):
        tools.generate(llm, prompts[:1], SamplingParams(temperature=0.5, **refused))
    expected = tools.tokens_of(vanilla(prompts[:4], greedy()))
    assert tools.tokens_of(tools.generate(llm, prompts[:4], greedy())) == expected
