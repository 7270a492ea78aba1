"""What a request may ask for: no drafts, nothing learned, whom to share with, a prediction."""

from __future__ import annotations

import random

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

import vllm_ouroboros

COUNTS = ("steps", "verified_nodes", "accepted_tokens", "pool_lookups", "pool_hits")


@pytest.fixture(scope="module")
def llm(ouroboros):
    """Drafts come from the pool alone here."""
    return ouroboros(options={"draft_model": None}, max_num_seqs=1)


def params(**options) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=32, extra_args={"ouroboros": options})


def run(llm, tools, prompts, **options) -> tuple[list, dict[str, int]]:
    """Outputs, and what drafting did, for requests with such options, one after the other."""
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, prompts, params(**options), one_by_one=True)
    return tools.tokens_of(outputs), {name: used[name] for name in COUNTS}


def test_without_drafts(llm, prompts, vanilla, tools) -> None:
    some = prompts[:6]
    expected = tools.tokens_of(vanilla(some, SamplingParams(temperature=0.0, max_tokens=32)))
    tokens, counts = run(llm, tools, some, speculate=False)
    assert tokens == expected
    assert counts["verified_nodes"] == 0
    assert counts["steps"] == sum(map(len, expected))
    _, warm = run(llm, tools, some)
    assert warm["accepted_tokens"] > 40, "others learned from them"


def test_nothing_is_learned(llm, prompts, tools) -> None:
    some = prompts[:6]
    vllm_ouroboros.reset_pool(llm)
    texts, cold = run(llm, tools, some)
    vllm_ouroboros.reset_pool(llm)
    assert run(llm, tools, some, learn=False)[0] == texts
    assert vllm_ouroboros.stats(llm)["pool_phrases"] == 0
    assert run(llm, tools, some) == (texts, cold), "as if they had never been there"
    _, warm = run(llm, tools, some, learn=False)
    assert warm["accepted_tokens"] > cold["accepted_tokens"], "what others wrote may be used"


def test_phrases_stay_in_their_scope(llm, prompts, tools) -> None:
    some = prompts[:6]
    vllm_ouroboros.reset_pool(llm)
    texts, cold = run(llm, tools, some, scope="one")
    assert run(llm, tools, some, scope="two") == (texts, cold)
    assert run(llm, tools, some) == (texts, cold)
    again, warm = run(llm, tools, some, scope="one")
    assert again == texts
    assert warm["accepted_tokens"] > cold["accepted_tokens"]


def test_a_prediction_that_comes_true(llm, prompts, tools) -> None:
    """A tree has 26 nodes, so 32 tokens take the step of the prompt and two more."""
    for ids in prompts[:6]:
        vllm_ouroboros.reset_pool(llm)
        [text], _ = run(llm, tools, [ids], speculate=False)
        words = llm.get_tokenizer().decode(text)
        for prediction in (text, words):
            [again], counts = run(llm, tools, [ids], prediction=prediction, learn=False)
            assert again == text
            assert counts["steps"] <= (3 if prediction == text else 6), "text may be split anew"


def test_predictions_with_mistakes(llm, prompts, vanilla, tools) -> None:
    rng = random.Random(0)
    some = prompts[:12]
    greedy = SamplingParams(temperature=0.0, max_tokens=32)
    expected = tools.tokens_of(vanilla(some, greedy))
    given = []
    for text in expected:
        i = rng.randrange(8, 24)
        wrong = [text[:i] + text[i + 3 :], [*text[:i], 5, 6, 7, *text[i:]], [3] * 40, text[::-1]]
        given.append(params(prediction=rng.choice(wrong)))
    with tools.Used(llm) as used:
        assert tools.tokens_of(tools.generate(llm, some, given)) == expected
    assert used["accepted_from_prediction"] > 50


def test_predictions_of_requests_that_sample(llm, prompts, vanilla, tools) -> None:
    plain = [SamplingParams(temperature=0.8, seed=i, max_tokens=32, n=2) for i in range(4)]
    with_text = [one.clone() for one in plain]
    for one in with_text:
        one.extra_args = {"ouroboros": {"prediction": "    return x\n"}}
    expected = vanilla(prompts[:4], plain)
    found = tools.generate(llm, prompts[:4], with_text)
    for one, other in zip(found, expected, strict=True):
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"speculte": False}, "ouroboros.speculte"),
        ({"learn": 1}, "ouroboros.learn = 1"),
        ({"prediction": [10**6]}, "token id 1000000"),
    ],
)
def test_wrong_options_are_an_error_of_their_request(options, named, llm, prompts, tools) -> None:
    with pytest.raises(VLLMValidationError, match=named):
        tools.generate(llm, prompts[:1], params(**options))
    assert len(tools.generate(llm, prompts[:1], params())) == 1
