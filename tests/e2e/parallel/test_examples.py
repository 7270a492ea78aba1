"""The programs of examples/, each on a small Ray cluster of its own. `RAY=1` runs them, alone."""

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
START_SECONDS = 400
pytestmark = pytest.mark.skipif("RAY" not in os.environ, reason="RAY=1 runs them, alone")


@pytest.fixture
def environment(monkeypatch) -> None:
    """Of a local cluster on a machine whose cores other tests use."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # `kv_cache_memory_bytes` counts
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def test_batch_generate(environment, texts, tmp_path) -> None:
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    given = [{"id": str(i), "prompt": text} for i, text in enumerate(texts[:3])]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in given))
    command = [sys.executable, "-P", str(EXAMPLES / "batch_generate.py"), str(rows), str(answers)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "3 of 3 rows, 0 errors" in done.stdout
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(row["id"] for row in found) == ["0", "1", "2"]
    assert all(row["text"] and row["error"] is None for row in found)


def test_serve_ray(environment, texts, tokenizer, vanilla, tmp_path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=32)
    [output] = vanilla([tokenizer.encode(texts[0])], params)
    port = free_port()
    command = [
        *(sys.executable, "-P", str(EXAMPLES / "serve_ray.py"), "--name", "tiny"),
        *("--port", str(port), "--engine-args", json.dumps(ENGINE)),
    ]
    log = tmp_path / "log"
    with log.open("wb") as written:
        server = subprocess.Popen(
            command, stdout=written, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True
        )
    body = {"model": "tiny", "prompt": texts[0], "temperature": 0, "max_tokens": 32}
    try:
        until, answer = time.monotonic() + START_SECONDS, None
        while answer is None or answer.status_code != 200:
            ended = server.poll() is not None or time.monotonic() > until
            assert not ended, log.read_text(errors="replace")[-4000:]
            with contextlib.suppress(httpx.TransportError):
                url = f"http://127.0.0.1:{port}/v1/completions"
                answer = httpx.post(url, json=body, timeout=120)
            time.sleep(1)
        assert answer.json()["choices"][0]["text"] == output.outputs[0].text
    finally:
        os.killpg(server.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(90)
        stop(server)
