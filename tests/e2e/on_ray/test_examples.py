"""The programs of examples/, on a Ray cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import httpx
import pytest
from vllm import SamplingParams

from .ray_programs import ENGINE, EXAMPLES, START_SECONDS, serving_on_ray

NEW_TOKENS = 256  # what batch_generate.py asks for


@pytest.fixture(scope="module")
def expected(texts, tokenizer, vanilla) -> list[str]:
    """What vanilla vLLM answers to the first prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    outputs = vanilla([tokenizer.encode(text) for text in texts[:3]], params)
    vanilla.engines.close()
    return [output.outputs[0].text for output in outputs]


def test_batch_generate(cluster, texts, expected, tmp_path) -> None:
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


def test_serve_ray(cluster, texts, expected, tmp_path) -> None:
    body = {"model": "tiny", "prompt": texts[0], "temperature": 0, "max_tokens": NEW_TOKENS}
    pool = tmp_path / "pool.safetensors"
    more = "--ouroboros-config", json.dumps({"pool_path": str(pool)})
    with serving_on_ray(tmp_path, *more) as address:
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected[0]
        until = time.monotonic() + 60
        while not pool.exists():  # it is written a second after the last request
            assert time.monotonic() < until, "nothing was learned: Ouroboros is off"
            time.sleep(0.2)
