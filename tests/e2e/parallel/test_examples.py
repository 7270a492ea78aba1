"""The programs of examples/, each on a Ray cluster of its own on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from vllm import SamplingParams

from ..servers import free_port, stop

EXAMPLES = Path(__file__).parents[3] / "examples"
ENGINE = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "block_size": 32,
          "kv_cache_memory_bytes": 2**27, "enforce_eager": True}  # fmt: skip
NEW_TOKENS = 256  # what batch_generate.py asks for
START_SECONDS = 400


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Of a cluster on a machine whose cores other tests use."""
    with pytest.MonkeyPatch.context() as context:
        context.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # `kv_cache_memory_bytes` counts
        context.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        context.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def expected(texts, tokenizer, vanilla) -> list[str]:
    """What vanilla vLLM answers to the first prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    outputs = vanilla([tokenizer.encode(text) for text in texts[:3]], params)
    vanilla.engines.close()
    return [output.outputs[0].text for output in outputs]


def test_batch_generate(texts, expected, tmp_path) -> None:
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    given = [{"id": str(i), "prompt": text} for i, text in enumerate(texts[:3])]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in given))
    command = [
        *(sys.executable, "-P", str(EXAMPLES / "batch_generate.py"), str(rows), str(answers)),
        *("--engine-args", json.dumps(ENGINE)),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "3 of 3 rows, 0 errors" in done.stdout
    found = {row["id"]: row["text"] for row in map(json.loads, answers.open())}
    assert found == {str(i): text for i, text in enumerate(expected)}


def test_serve_ray(texts, expected, tmp_path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [
        *(sys.executable, "-P", str(EXAMPLES / "serve_ray.py"), "--name", "tiny"),
        *("--port", str(port), "--engine-args", json.dumps(ENGINE)),
    ]
    with log.open("wb") as written:
        server = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}/v1/completions"
    body = {"model": "tiny", "prompt": texts[0], "temperature": 0, "max_tokens": NEW_TOKENS}
    try:
        until, answer = time.monotonic() + START_SECONDS, None
        while answer is None or answer.status_code != 200:
            ended = server.poll() is not None or time.monotonic() > until
            assert not ended, log.read_text(errors="replace")[-4000:]
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(url, json=body, timeout=120)
            time.sleep(1)
        assert answer.json()["choices"][0]["text"] == expected[0]
    finally:
        os.killpg(server.pid, signal.SIGINT)  # it takes its deployment down
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(90)
        stop(server)
