"""Outputs stay the target's own whatever the scheduler does to a request."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

NEW_TOKENS = 48
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
CHUNKS = {
    "max_num_batched_tokens": 64,
    "max_num_seqs": 2,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "max_model_len": 256,
    "options": {"pool_scope": "request"},
}
BLOCKS = 20  # of 32 tokens; eight requests of this test want about twice as many
CROWDED = {
    "num_gpu_blocks_override": BLOCKS,
    "max_num_batched_tokens": 256,
    "long_prefill_token_threshold": 64,
    "enable_prefix_caching": True,
}
PRIORITY = {**CROWDED, "scheduling_policy": "priority"}


@pytest.fixture(scope="module")
def long_prompts(prompts):
    """12 prompts of 100 to 200 tokens; a chunk of 64 tokens cuts each of them."""
    long = [ids for ids in prompts if 100 <= len(ids) <= 200]
    assert len(long) >= 12
    return long[:12]


@pytest.fixture(scope="module")
def expected(long_prompts, vanilla, tools):
    return tools.tokens_of(vanilla(long_prompts, GREEDY))


# -- ends inside an accepted path ------------------------------------------------------------------


def test_max_tokens(ouroboros, prompts, vanilla, tools):
    some = prompts[:12]
    limits = [1, 2, 3, 4, 5, 6, 7, 9, 11, 17, 23, 31]
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in limits]
    outputs = tools.generate(ouroboros(), some, params)
    expected = vanilla(some, params)
    assert tools.tokens_of(outputs) == tools.tokens_of(expected)
    assert [o.outputs[0].finish_reason for o in outputs] == [
        o.outputs[0].finish_reason for o in expected
    ]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_end_of_sequence(ouroboros, prompts, vanilla, tools, tokenizer, ignore_eos):
    params = SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=ignore_eos)
    some = prompts[:12]
    expected = vanilla(some, params)
    endings = [o.outputs[0].finish_reason for o in expected]
    seen = [tokenizer.eos_token_id in o.outputs[0].token_ids for o in expected]
    assert any(seen)
    assert ("stop" in endings) != ignore_eos
    outputs = tools.generate(ouroboros(), some, params)
    assert tools.tokens_of(outputs) == tools.tokens_of(expected)
    assert [o.outputs[0].finish_reason for o in outputs] == endings


def test_stop_tokens_and_stop_strings(ouroboros, prompts, vanilla, tools, tokenizer):
    """Each request stops at a token, or a text, that its own plain output has in the middle."""
    some = prompts[:16]
    plain = tools.tokens_of(vanilla(some, GREEDY))
    params = []
    for i, ids in enumerate(plain):
        token = ids[len(ids) * (i % 4 + 1) // 5]
        if i % 2:
            params.append(
                SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, stop_token_ids=[token])
            )
        else:
            text = tokenizer.decode([token])
            params.append(
                SamplingParams(
                    temperature=0.0,
                    max_tokens=NEW_TOKENS,
                    stop=[text],
                    include_stop_str_in_output=i % 4 == 0,
                )
            )
    expected = [o.outputs[0] for o in vanilla(some, params)]
    outputs = [o.outputs[0] for o in tools.generate(ouroboros(), some, params)]
    assert [o.text for o in outputs] == [o.text for o in expected]
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in expected]
    assert [o.stop_reason for o in outputs] == [o.stop_reason for o in expected]
    # stop tokens end in the scheduler, stop strings in the front end after a whole step
    for i in range(1, len(some), 2):
        assert list(outputs[i].token_ids) == list(expected[i].token_ids)


# -- aborts ----------------------------------------------------------------------------------------


def run_with_aborts(llm, prompts, aborted: dict[int, int]) -> dict[int, list[int]]:
    """Step an engine by hand; ``aborted`` says after which step a request is dropped."""
    engine = llm.llm_engine
    ids = {}
    for i, prompt in enumerate(prompts):
        ids[engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, GREEDY)] = i
    finished: dict[int, list[int]] = {}
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                index = int(output.request_id[1:])
                finished[index] = list(output.outputs[0].token_ids)
        step += 1
        gone = [f"r{i}" for i, when in aborted.items() if when == step]
        if gone:
            engine.abort_request(gone)
    return finished


def test_aborts_leave_the_others_alone(ouroboros, prompts, vanilla, tools):
    some = prompts[:16]
    expected = tools.tokens_of(vanilla(some, GREEDY))
    aborted = {0: 1, 3: 2, 5: 4, 6: 4, 9: 6, 15: 1}
    finished = run_with_aborts(ouroboros(), some, aborted)
    for i, want in enumerate(expected):
        if i in aborted:
            assert i not in finished or finished[i] == want[: len(finished[i])]
        else:
            assert finished[i] == want
    # the slots of the aborted are free again
    assert tools.tokens_of(tools.generate(ouroboros(), some, GREEDY)) == expected


# -- chunked prefill and prefix caching ------------------------------------------------------------


def test_chunked_prefill_then_cached_prefix(ouroboros, long_prompts, expected, tools):
    llm = ouroboros(**CHUNKS)
    llm.reset_prefix_cache()
    first = tools.generate(llm, long_prompts, GREEDY)
    assert tools.tokens_of(first) == expected
    assert all(output.num_cached_tokens == 0 for output in first)
    with tools.Used(llm) as used:
        second = tools.generate(llm, long_prompts, GREEDY)
    assert tools.tokens_of(second) == expected
    assert all(output.num_cached_tokens >= 64 for output in second)
    assert used["accepted_from_draft"] > 0


def test_cached_prefix_costs_no_acceptance(ouroboros, long_prompts, expected, tools):
    """A cache hit brings the draft model's KV too: its drafts are as good as without the hit."""
    llm = ouroboros(**CHUNKS)
    llm.reset_prefix_cache()
    accepted = []
    for _ in range(2):
        with tools.Used(llm) as used:
            outputs = tools.generate(llm, long_prompts, GREEDY, one_by_one=True)
        assert tools.tokens_of(outputs) == expected
        accepted.append(used["accepted_tokens"])
    assert all(output.num_cached_tokens >= 64 for output in outputs)
    assert accepted[1] == accepted[0]


def test_max_model_len_inside_a_draft(ouroboros, prompts, vanilla, tools):
    """Texts that run into max_model_len, from 1 to 40 tokens before it."""
    length = CHUNKS["max_model_len"]
    text = [token for ids in prompts for token in ids[1:]]
    cuts = [1, 2, 3, 5, 8, 13, 26, 27, 28, 40]
    given = [text[i * 97 : i * 97 + length - left] for i, left in enumerate(cuts)]
    endless = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    # vLLM stops a request when prompt and output together reach max_model_len
    longer = tools.tokens_of(vanilla(given, endless))
    outputs = tools.generate(ouroboros(**CHUNKS), given, endless)
    for left, output, want in zip(cuts, outputs, longer, strict=True):
        assert list(output.outputs[0].token_ids) == want[:left]
        assert output.outputs[0].finish_reason == "length"


def test_seeded_request_under_chunked_prefill(ouroboros, long_prompts, vanilla, tools):
    """Stock vLLM 0.32 ends here on the CPU; the expected tokens come from one without chunks."""
    some = long_prompts[:4]
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=16) for i in range(len(some))]
    llm = ouroboros(**CHUNKS)
    llm.reset_prefix_cache()
    expected = tools.tokens_of(vanilla(some, params))
    assert tools.tokens_of(tools.generate(llm, some, params)) == expected


# -- preemption ------------------------------------------------------------------------------------


def test_preempted_requests(ouroboros, long_prompts, expected, tools):
    llm = ouroboros(**CROWDED)
    before = tools.metric(llm, "vllm:num_preemptions")
    with tools.Used(llm) as used:
        outputs = tools.generate(llm, long_prompts, GREEDY)
    assert tools.metric(llm, "vllm:num_preemptions") > before
    assert tools.tokens_of(outputs) == expected
    assert used["accepted_tokens"] > 0


def test_aborts_among_preempted_requests(ouroboros, long_prompts, expected, tools):
    llm = ouroboros(**CROWDED)
    before = tools.metric(llm, "vllm:num_preemptions")
    aborted = {1: 3, 4: 9, 7: 5, 8: 12}
    finished = run_with_aborts(llm, long_prompts, aborted)
    assert tools.metric(llm, "vllm:num_preemptions") > before
    for i, want in enumerate(expected):
        if i not in aborted:
            assert finished[i] == want
    assert tools.tokens_of(tools.generate(llm, long_prompts, GREEDY)) == expected


# -- priorities ------------------------------------------------------------------------------------


def test_priorities(ouroboros, long_prompts, expected, tools):
    """Urgent requests push the others aside when they come, and all get their own texts."""
    llm = ouroboros(**PRIORITY)
    engine = llm.llm_engine
    before = tools.metric(llm, "vllm:num_preemptions")
    patient, urgent = range(8), range(8, 12)

    def add(requests: range, priority: int) -> None:
        for i in requests:
            prompt = {"prompt_token_ids": long_prompts[i]}
            engine.add_request(f"p{i}", prompt, GREEDY, priority=priority)

    add(patient, 1)
    finished: dict[int, list[int]] = {}  # in the order of their ends
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id[1:])] = list(output.outputs[0].token_ids)
        step += 1
        if step == 6:
            assert not finished
            add(urgent, 0)
    assert [finished[i] for i in range(12)] == expected
    order = list(finished)
    assert max(order.index(i) for i in urgent) < 8
    assert tools.metric(llm, "vllm:num_preemptions") > before


def test_mixed_priorities(ouroboros, long_prompts, expected, tools):
    given = [{"prompt_token_ids": ids} for ids in long_prompts]
    priorities = [i % 3 for i in range(len(given))]
    outputs = ouroboros(**PRIORITY).generate(given, GREEDY, priority=priorities, use_tqdm=False)
    assert tools.tokens_of(outputs) == expected
