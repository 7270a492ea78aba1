"""Sampling parameters mean what they mean in vLLM, to the last token, and requests speculate."""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

NEW_TOKENS = 24
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "size": {"type": "integer"}},
    "required": ["name", "size"],
}
GRAMMAR = """
root ::= line line
line ::= "\\n    " [a-z]+ " = " ("None" | "True" | [0-9]+)
"""


def greedy(**more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, **more)


def drawn(i: int, **more) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.8, "seed": i, "max_tokens": NEW_TOKENS, **more})


def structured(**kind) -> dict:
    return {"structured_outputs": StructuredOutputsParams(**kind)}


CASES = {
    "temperature": lambda i: drawn(i),
    "top_k": lambda i: drawn(i, temperature=1.3, top_k=20),
    "top_p": lambda i: drawn(i, temperature=1.0, top_p=0.8),
    "top_k and top_p": lambda i: drawn(100 + i, temperature=1.1, top_k=20, top_p=0.9),
    "min_p": lambda i: drawn(i, temperature=1.2, min_p=0.05),
    "repetition_penalty": lambda i: greedy(repetition_penalty=1.3),
    "presence_penalty": lambda i: drawn(i, presence_penalty=0.8),
    "frequency_penalty": lambda i: greedy(frequency_penalty=0.6),
    "min_tokens": lambda i: drawn(i, min_tokens=16, stop_token_ids=[5, 20]),
    "stop": lambda i: drawn(i, stop=["\n\n", "self"]),
    "ignore_eos": lambda i: drawn(i, ignore_eos=True),
    "bad_words": lambda i: greedy(bad_words=["return", " self", "if"]),
    "allowed_token_ids": lambda i: drawn(i, allowed_token_ids=list(range(2, 1500))),
    "logit_bias": lambda i: greedy(logit_bias={5: 3.0, 300: 5.0, 20: -4.0}),
    "regex": lambda i: greedy(**structured(regex=r"(\n    [a-z]{1,8} = [0-9]{1,4}){2,4}")),
    "json": lambda i: drawn(i, **structured(json=SCHEMA)),
    "grammar": lambda i: greedy(**structured(grammar=GRAMMAR)),
    "choice": lambda i: greedy(**structured(choice=["yes", "no"])),
    "logprobs": lambda i: greedy(logprobs=3),
    "logprobs of drawn tokens": lambda i: drawn(i, logprobs=i % 4),
    "prompt_logprobs": lambda i: greedy(logprobs=1, prompt_logprobs=1),
    "greedy": lambda i: greedy(),
}


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
    if case != "choice":  # whose grammar may let no drafted token through
        assert used["accepted_tokens"] > 0


def test_all_kinds_in_one_batch(ouroboros, prompts, vanilla, tools):
    """Requests of every kind above share the batches of one run."""
    params = [case(i) for i, case in enumerate(CASES.values())]
    some = prompts[: len(params)]
    expected = vanilla(some, params)
    with tools.Used(ouroboros()) as used:
        outputs = tools.generate(ouroboros(), some, params)
    assert_same(outputs, expected)
    assert used["accepted_tokens"] > 0


def test_seeds_give_the_tokens_of_vanilla(ouroboros, prompts, vanilla, tools):
    """Batch 8, temperatures from 0.3 to 1.3."""
    count = 100 if tools.ALL_PROMPTS else 32
    some = [prompts[i % len(prompts)] for i in range(count)]
    params = [
        drawn(
            1000 + i,
            temperature=0.3 + i / count,
            top_p=1.0 if i % 3 else 0.9,
            top_k=0 if i % 4 else 40,
        )
        for i in range(len(some))
    ]
    expected = vanilla(some, params)
    with tools.Used(ouroboros()) as used:
        outputs = tools.generate(ouroboros(), some, params)
    assert_same(outputs, expected)
    assert used["accepted_tokens"] > used["emitted_tokens"] // 4


def test_requests_without_a_seed_differ(ouroboros, prompts, tools):
    """Each has noise of its own, and goes on drawing from it."""
    params = SamplingParams(temperature=1.0, max_tokens=16)
    outputs = tools.generate(ouroboros(), prompts[:1] * 16, params)
    assert len({tuple(ids) for ids in tools.tokens_of(outputs)}) > 12


def test_several_completions(ouroboros, prompts, vanilla, tools):
    params = SamplingParams(temperature=0.7, seed=11, n=3, max_tokens=16)
    assert_same(tools.generate(ouroboros(), prompts[:4], params), vanilla(prompts[:4], params))


MODES = ("processed_logits", "processed_logprobs")  # raw_logprobs is the default elsewhere


@pytest.mark.parametrize("mode", MODES)
def test_logprobs_modes(mode, ouroboros, prompts, vanilla, tools):
    cases = ("top_k and top_p", "repetition_penalty", "min_p", "logit_bias", "greedy")
    params = [CASES[case](i) for i, case in enumerate(cases)]
    for one in params:
        one.logprobs = 2
    expected = vanilla(prompts[:5], params, logprobs_mode=mode)
    outputs = tools.generate(ouroboros(logprobs_mode=mode), prompts[:5], params)
    assert_same(outputs, expected)


def test_thinking_budgets(ouroboros, prompts, vanilla, tools):
    """Requests with a budget take one token a step, others in the batch go on speculating."""
    arguments = {
        "reasoning_config": {"reasoning_start_str": '"""', "reasoning_end_str": "\n    return"}
    }
    params = [greedy(thinking_token_budget=3 + i) if i % 2 else greedy() for i in range(12)]
    expected = vanilla(prompts[:12], params, **arguments)
    llm = ouroboros(**arguments)
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, prompts[:12], params)
    assert_same(outputs, expected)
    assert used["accepted_tokens"] > 0
    forced = [output.outputs[0].text.find("\n    return") >= 0 for output in expected[1::2]]
    assert sum(forced) > 3
