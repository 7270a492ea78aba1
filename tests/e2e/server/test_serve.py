"""``vllm serve`` with the flags of the README, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from vllm import SamplingParams

from ..servers import serving

NEW_TOKENS = 48


@pytest.fixture(scope="module")
def server(pair, tmp_path_factory) -> Iterator[str]:
    """Base address of a server with Ouroboros on."""
    with serving(pair, tmp_path_factory.mktemp("serve")) as address:
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


def accepted(server: str) -> float:
    """vLLM's own count of accepted draft tokens."""
    total = 0.0
    for line in httpx.get(f"{server}/metrics", timeout=30).text.splitlines():
        if line.startswith("vllm:spec_decode_num_accepted_tokens_total"):
            total += float(line.rsplit(" ", 1)[1])
    return total


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
