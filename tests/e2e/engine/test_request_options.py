"""What a request may ask for: no drafts, nothing learned, whom to share with, a prediction."""

from __future__ import annotations

import random
import sys

import cloudpickle
import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

import vllm_ouroboros

COUNTS = ("steps", "verified_nodes", "accepted_tokens", "pool_lookups", "pool_hits")


@pytest.fixture(scope="module")
def llm(ouroboros):
    """Drafts come from the pool alone here."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to send a function, by value
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield ouroboros(options={"draft_model": None}, max_num_seqs=1)


def held(worker, tokens: list[int]) -> tuple[int, int]:
    """Phrases of the pool, and those that have one of some tokens."""
    arrays = worker.model_runner.drafter.drafting.pool.arrays
    places = np.arange(arrays.tokens.shape[2])
    held = np.arange(arrays.tokens.shape[1]) < arrays.counts[:, None]
    inside = held[:, :, None] & (places < arrays.lengths[:, :, None])
    found = (np.isin(arrays.tokens, tokens) & inside).any(2)
    return int(held.sum()), int(found.sum())


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


def test_nothing_is_learned_of_drafts(ouroboros, prompts, tools) -> None:
    """Nor of what a draft model and its window say, where the pool knows what others wrote."""
    llm = ouroboros()
    tools.generate(llm, prompts[:6], params())
    with tools.Used(llm) as used:
        tools.generate(llm, prompts[4:12], params(learn=False))
    assert used["accepted_from_draft"] > 0
    assert used["accepted_from_suffix"] > 0
    changed = {name: n for name, n in used.counts.items() if name.startswith("pool_from_")}
    assert len(changed) == 4
    assert not any(changed.values())
    assert used["pool_phrases"] == 0


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


def test_a_prediction_is_of_its_request_alone(llm, prompts, tools) -> None:
    """It never enters the pool, though the request's own text does."""
    some = prompts[:6]
    vllm_ouroboros.reset_pool(llm)
    texts, _ = run(llm, tools, some)
    rare = [4000, 4017, 4033, 4051]
    assert llm.collective_rpc(held, args=(rare,))[0][1] == 0, "no text has them"
    vllm_ouroboros.reset_pool(llm)
    with tools.Used(llm) as used:
        assert run(llm, tools, some, prediction=rare * 3)[0] == texts
    assert used["verified_nodes"] > 100
    [(phrases, found)] = llm.collective_rpc(held, args=(rare,))
    assert phrases == vllm_ouroboros.stats(llm)["pool_phrases"] > 100
    assert found == 0


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
