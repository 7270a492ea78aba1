"""``vllm serve`` with the flags of the README, over HTTP."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from vllm import SamplingParams

from ..servers import serving

NEW_TOKENS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Has the server's log."""
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def server(pair, folder) -> Iterator[str]:
    """Base address of a server with Ouroboros on."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("VLLM_LOG_STATS_INTERVAL", "1")
        context.setenv("VLLM_LOGGING_LEVEL", "INFO")
        with serving(pair, folder, "--per-request-spec-decode-metrics", "detailed") as address:
            yield address


@pytest.fixture(scope="module")
def expected(texts, tokenizer, vanilla) -> list[str]:
    """Vanilla completions of the first 8 texts, tokenized as the server does it."""
    ids = [tokenizer.encode(text) for text in texts[:8]]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    return [output.outputs[0].text for output in vanilla(ids, params)]


def body(prompt, **more) -> dict:
    return {
        "model": "tiny",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": NEW_TOKENS,
        **more,
    }


def read_metrics(server: str) -> dict[str, float]:
    """Values on ``/metrics``, summed over vLLM's labels; of ours with a label also by its value."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{server}/metrics", timeout=30).text.splitlines():
        if line.startswith(("vllm:", "ouroboros_")):
            name, _, labels = line.rsplit(" ", 1)[0].partition("{")
            own = re.findall(r'(?:drafted|origin|source|phase|kind|le)="([^"]*)"', labels)
            for key in {name, " ".join([name, *own])}:
                found[key] = found.get(key, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def accepted(server: str) -> float:
    """vLLM's own count of accepted draft tokens."""
    return read_metrics(server)["vllm:spec_decode_num_accepted_tokens_total"]


def test_completion(server, texts, expected):
    before = accepted(server)
    answer = httpx.post(f"{server}/v1/completions", json=body(texts[0]), timeout=120)
    answer.raise_for_status()
    assert answer.json()["choices"][0]["text"] == expected[0]
    assert accepted(server) > before


def test_concurrent_completions(server, texts, expected):
    def complete(prompt: str) -> str:
        answer = httpx.post(f"{server}/v1/completions", json=body(prompt), timeout=240)
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(complete, texts[:8])) == expected


def stream(server: str, prompt: str, leave_after: int | None = None) -> str:
    """Text of a streamed completion; ``leave_after`` drops the connection after so many pieces."""
    pieces: list[str] = []
    request = body(prompt, stream=True)
    with httpx.stream("POST", f"{server}/v1/completions", json=request, timeout=120) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            pieces.append(json.loads(line[6:])["choices"][0]["text"])
            if leave_after is not None and len(pieces) >= leave_after:
                break
    return "".join(pieces)


def test_streaming(server, texts, expected):
    assert stream(server, texts[1]) == expected[1]


def test_a_client_that_leaves(server, texts, expected):
    """An aborted stream does not disturb what comes next to it and after it."""
    with ThreadPoolExecutor(4) as threads:
        staying = threads.submit(stream, server, texts[2])
        leaving = [threads.submit(stream, server, text, 2) for text in texts[3:6]]
        assert staying.result() == expected[2]
        for i, future in enumerate(leaving, start=3):
            assert expected[i].startswith(future.result())
    assert stream(server, texts[3]) == expected[3]


def test_bad_request_leaves_the_server_up(server, texts, expected):
    answer = httpx.post(
        f"{server}/v1/completions", json=body(texts[0], logit_bias={"99999": 1.0}), timeout=60
    )
    assert answer.status_code == 400
    assert "logit_bias" in answer.text
    assert stream(server, texts[4]) == expected[4]


@pytest.mark.parametrize(
    ("xargs", "named"),
    [
        ({"ouroboros": '{"speculat": false}'}, "ouroboros.speculat: unknown key"),
        ({"ouroboros": '{"learn": "no"}'}, "ouroboros.learn = 'no'"),
        ({"ouroboros": "{"}, "no JSON"),
        ({"ouroboros": 3}, "pass a JSON object"),
    ],
    ids=str,
)
def test_wrong_options_of_a_request(xargs, named, server, texts):
    answer = httpx.post(
        f"{server}/v1/completions", json=body(texts[0], vllm_xargs=xargs), timeout=60
    )
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


def test_options_of_a_request(server, texts, expected):
    """What is predicted is right: after the prompt's step two more are enough for 48 tokens."""
    for options in ({"speculate": False}, {"learn": False, "prediction": expected[5]}):
        xargs = {"ouroboros": json.dumps(options)}
        answer = httpx.post(
            f"{server}/v1/completions", json=body(texts[5], vllm_xargs=xargs), timeout=120
        )
        answer.raise_for_status()
        assert answer.json()["choices"][0]["text"] == expected[5]
        figures = answer.json()["metrics"]["speculative_decoding"]
        assert (figures is None or figures["num_spec_steps"] == 0) == ("speculate" in options)


def test_figures_of_a_request(server, texts, expected):
    """Of the steps that verified a tree: their accepted tokens, and one of the target's own."""
    before = read_metrics(server)
    answer = httpx.post(f"{server}/v1/completions", json=body(texts[6]), timeout=120)
    after = read_metrics(server)
    used = {name: value - before.get(name, 0.0) for name, value in after.items()}
    figures = answer.json()["metrics"]["speculative_decoding"]
    steps, accepted = figures["per_step_drafted"], figures["per_step_accepted"]
    assert len(steps) == figures["num_spec_steps"] == sum(figures["acceptance_histogram"])
    assert sum(steps) == figures["num_draft_tokens"]
    assert sum(accepted) == figures["num_accepted_draft_tokens"] > 0
    assert all(0 <= a <= nodes <= 26 for a, nodes in zip(accepted, steps, strict=True))
    assert len(steps) == used["ouroboros_accepted_length_count"]
    assert sum(steps) == used["ouroboros_verified_nodes_total"]
    assert sum(accepted) == used["ouroboros_accepted_tokens_total"]
    tokens = answer.json()["usage"]["completion_tokens"]
    assert tokens + 26 >= sum(accepted) + len(steps) + 1, "and the one behind the prompt"


def test_metrics(server, texts, folder):
    before, begin = read_metrics(server), time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        for answer in threads.map(
            lambda text: httpx.post(f"{server}/v1/completions", json=body(text), timeout=240),
            texts[8:24],
        ):
            answer.raise_for_status()
    after, passed = read_metrics(server), time.monotonic() - begin
    used = {name: value - before.get(name, 0.0) for name, value in after.items()}
    accepted = used["ouroboros_accepted_tokens_total"]
    assert accepted == used["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert used["ouroboros_verified_nodes_total"] == used["vllm:spec_decode_num_draft_tokens_total"]
    drafts = used["vllm:spec_decode_num_drafts_total"]
    assert used["ouroboros_accepted_length_count"] == drafts
    assert used["ouroboros_accepted_length_sum"] == accepted
    assert used["ouroboros_steps_total"] - used["ouroboros_steps_total no"] == drafts
    # vLLM cuts a text at max_tokens behind the step that brought it there
    emitted = used["ouroboros_emitted_tokens_total"]
    assert 0 <= emitted - used["vllm:generation_tokens_total"] <= 26 * 16
    assert emitted - used["ouroboros_emitted_tokens_total target"] == accepted
    assert used["ouroboros_target_forwards_total"] > 0
    assert used["ouroboros_pool_insertions_total history"] > 0
    assert 0 < used["ouroboros_pool_hits_total"] < used["ouroboros_pool_lookups_total"]
    seconds = {
        name.split()[1]: value
        for name, value in used.items()
        if name.startswith("ouroboros_phase_seconds_total ")
    }
    assert seconds["target"] > seconds["learn"] > 0
    assert sum(seconds.values()) < passed, "no second belongs to two phases"
    assert after["ouroboros_pool_phrases"] > 0
    assert after["ouroboros_pool_bytes"] > after["ouroboros_request_state_bytes"] > 0
    assert after["ouroboros_faults_total"] == after["ouroboros_paused"] == 0
    until = time.monotonic() + 20
    while not re.search(r"Engine 000: Ouroboros: [1-9]\.\d\d tokens a step", log(folder)):
        assert time.monotonic() < until, "no line of the log sums it up"
        time.sleep(0.2)


def log(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")
