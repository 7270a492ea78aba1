"""What a request or its caller may ask of vLLM beside sampling: the same answers as without us."""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from vllm.sampling_params import (
    BeamSearchParams,
    RepetitionDetectionParams,
    RequestOutputKind,
)

NEW_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
LONG = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
CACHING = {"enable_prefix_caching": True}


@pytest.fixture(scope="module")
def some(prompts):
    return prompts[:12]


@pytest.fixture(scope="module")
def expected(some, vanilla, tools):
    return tools.tokens_of(vanilla(some, GREEDY, **CACHING))


def add(llm, prompts, params, names: str) -> None:
    for i, ids in enumerate(prompts):
        llm.llm_engine.add_request(f"{names}{i}", {"prompt_token_ids": ids}, params)


# -- sleep -----------------------------------------------------------------------------------------


def sleep_in_the_middle(llm, prompts, level: int, mode: str, tools) -> tuple[list, list]:
    """Sleep and wake up while requests run: what became of them, and what comes after.

    Requests that are to be aborted are long: the engine goes on while this process is not looking.
    """
    llm.reset_prefix_cache()
    engine = llm.llm_engine
    add(llm, prompts, GREEDY if mode == "keep" else LONG, f"{mode}{level}-")
    finished = {}
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id.split("-")[1])] = output.outputs[0]
        step += 1
        if step == (3 if mode == "keep" else 12):  # prompts that are to be aborted are done
            llm.sleep(level=level, mode=mode)
            assert engine.is_sleeping()
            assert llm.wake_up(["scheduling"] if level == 0 else None)
            assert not engine.is_sleeping()
    after = tools.generate(llm, prompts, GREEDY)
    return [finished[i] for i in range(len(prompts))], after


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", ["abort", "keep"])
def test_sleep_and_wake(level, mode, ouroboros, some, vanilla, expected, tools):
    """On the CPU vLLM keeps weights and KV where they are, says so in its log, and forgets cached
    prefixes from level 1 on.
    """
    found, after = sleep_in_the_middle(ouroboros(**CACHING), some, level, mode, tools)
    theirs = vanilla.engine(**CACHING)
    wanted, after_theirs = sleep_in_the_middle(theirs, some, level, mode, tools)
    assert tools.tokens_of(after) == tools.tokens_of(after_theirs) == expected
    for ours, vanillas, text in zip(found, wanted, expected, strict=True):
        if mode == "keep":
            assert ours.finish_reason == vanillas.finish_reason
            assert list(ours.token_ids) == list(vanillas.token_ids) == text
        else:  # how far a request came before it was dropped is a matter of speed
            shared = min(len(ours.token_ids), len(text))
            assert list(ours.token_ids)[:shared] == text[:shared]
    if mode == "abort":
        assert "abort" in {output.finish_reason for output in found}
        cached = [output.num_cached_tokens for output in after]
        assert (sum(cached) > 0) == (level == 0)
        assert sum(cached) == sum(output.num_cached_tokens for output in after_theirs)


# -- beam search -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, {"length_penalty": 0.5, "ignore_eos": True}], ids=["plain", "ignore_eos"]
)
def test_beam_search(more, ouroboros, some, vanilla, tools):
    """vLLM makes it of requests for one token each, so there is nothing to draft."""
    params = BeamSearchParams(beam_width=3, max_tokens=12, **more)
    given = [{"prompt_token_ids": ids} for ids in some[:6]]
    theirs = vanilla.engine(**CACHING).beam_search(given, params)
    with tools.Used(ouroboros(**CACHING)) as used:
        ours = ouroboros(**CACHING).beam_search(given, params)
    for found, wanted in zip(ours, theirs, strict=True):
        assert [s.tokens for s in found.sequences] == [s.tokens for s in wanted.sequences]
        assert [s.text for s in found.sequences] == [s.text for s in wanted.sequences]
        scores = [s.cum_logprob for s in wanted.sequences]
        assert [s.cum_logprob for s in found.sequences] == pytest.approx(scores, abs=1e-3)
    assert used["verified_nodes"] == 0


# -- how an output is cut, and how it arrives ------------------------------------------------------


def test_stop_string_not_before_min_tokens(ouroboros, some, vanilla, tokenizer, tools):
    """Each request stops at a text of its own plain output, once min_tokens are there."""
    plain = tools.tokens_of(vanilla(some, GREEDY, **CACHING))
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=96,
            min_tokens=(4, 12, 30)[i % 3],
            stop=[tokenizer.decode([ids[len(ids) // 4]])],
            include_stop_str_in_output=i % 2 == 0,
        )
        for i, ids in enumerate(plain)
    ]
    outputs = [o.outputs[0] for o in tools.generate(ouroboros(**CACHING), some, params)]
    wanted = [o.outputs[0] for o in vanilla(some, params, **CACHING)]
    assert any(output.stop_reason for output in wanted)
    for found, want in zip(outputs, wanted, strict=True):
        assert found.text == want.text
        assert (found.finish_reason, found.stop_reason) == (want.finish_reason, want.stop_reason)


def test_repetition_detection(ouroboros, prompts, vanilla, tools):
    """vLLM ends a text that loops; the end may lie inside an accepted path."""
    looping = RepetitionDetectionParams(max_pattern_size=12, min_pattern_size=2, min_count=3)
    params = SamplingParams(temperature=0.0, max_tokens=96, repetition_detection=looping)
    some = prompts[:32]
    wanted = vanilla(some, params, **CACHING)
    assert "repetition" in {output.outputs[0].finish_reason for output in wanted}
    outputs = tools.generate(ouroboros(**CACHING), some, params)
    assert tools.tokens_of(outputs) == tools.tokens_of(wanted)
    assert [o.outputs[0].finish_reason for o in outputs] == [
        o.outputs[0].finish_reason for o in wanted
    ]


@pytest.mark.parametrize("interval", [1, 7])
def test_streamed_pieces(interval, ouroboros, some, vanilla, tools):
    """Pieces of several tokens, at least ``interval`` but for the first and the last, make up
    the text.
    """
    stop = {"stop": ["return"], "include_stop_str_in_output": True}
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, **stop)
    wanted = [output.outputs[0] for output in vanilla(some, params, **CACHING)]
    llm = ouroboros(**CACHING)
    streamed = params.clone()
    streamed.output_kind, streamed.stream_interval = RequestOutputKind.DELTA, interval
    pieces: list[list] = [[] for _ in some]
    add(llm, some, streamed, f"every{interval}-")
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            pieces[int(output.request_id.split("-")[1])].append(output.outputs[0])
    for found, want in zip(pieces, wanted, strict=True):
        assert "".join(piece.text for piece in found) == want.text
        assert all(len(piece.token_ids) >= interval for piece in found[1:-1])
        assert found[-1].finish_reason == want.finish_reason
        assert found[-1].stop_reason == want.stop_reason
    assert max(len(piece.token_ids) for found in pieces for piece in found) > interval
