"""Two replicas behind one address: a pool each, and one file that both write."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from vllm import SamplingParams

from vllm_ouroboros.phrases.pool_file import PoolFile

from ..servers import serving

NEW_TOKENS = 32


@pytest.fixture(scope="module", autouse=True)
def _cores():
    """A core for each replica: vLLM binds them to NUMA nodes, of which there may be one."""
    with pytest.MonkeyPatch.context() as context:
        context.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield


def test_replicas_answer_as_vanilla_and_share_what_they_learned(
    pair, texts, tokenizer, vanilla, tmp_path
) -> None:
    some = texts[:16]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    ids = [tokenizer.encode(text) for text in some]
    expected = [output.outputs[0].text for output in vanilla(ids, params)]
    vanilla.engines.close()  # both cores are the replicas'
    path = tmp_path / "pool.safetensors"
    replicas = "--data-parallel-size", "2"
    with serving(pair, tmp_path, *replicas, pool_path=str(path), adaptive=False) as address:

        def ask(text: str) -> str:
            body = {"model": "tiny", "prompt": text, "temperature": 0, "max_tokens": NEW_TOKENS}
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200
            return answer.json()["choices"][0]["text"]

        with ThreadPoolExecutor(8) as threads:
            assert [*threads.map(ask, some)] == expected
        metrics = httpx.get(f"{address}/metrics", timeout=30).text
        until = time.monotonic() + 90
        while not all_in(path, ids):  # a replica saves when it has been idle for a second
            assert time.monotonic() < until, "a replica's phrases are not in the file"
            time.sleep(0.5)
    served = re.findall(
        r'vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (.*)', metrics
    )
    assert {engine for engine, count in served if float(count) > 0} == {"0", "1"}
    accepted = re.findall(
        r'vllm:spec_decode_num_accepted_tokens_total\{engine="(\d)".*\} (.*)', metrics
    )
    assert len(accepted) == 2
    assert all(float(count) > 0 for _, count in accepted)
    ours = re.findall(
        r'ouroboros_accepted_tokens_total\{engine="(\d)",.*,origin="\w+"\} (.*)', metrics
    )
    for engine, count in accepted:
        assert sum(float(n) for which, n in ours if which == engine) == float(count)
        for name, theirs in (
            ("verified_nodes_total", "spec_decode_num_draft_tokens_total"),
            ("accepted_length_count", "spec_decode_num_drafts_total"),
        ):  # fmt: skip
            found = re.findall(rf'ouroboros_{name}\{{engine="{engine}",.*\}} (.*)', metrics)
            known = re.findall(rf'vllm:{theirs}\{{engine="{engine}",.*\}} (.*)', metrics)
            assert [float(n) for n in found] == [float(n) for n in known]
            assert len(found) == 1
    for line in ("pool_phrases", "pool_bytes", "request_state_bytes"):
        shown = re.findall(rf'ouroboros_{line}\{{engine="(\d)",.*\}} (.*)', metrics)
        assert sorted(engine for engine, _ in shown) == ["0", "1"]
        assert all(float(n) > 0 for _, n in shown)


def all_in(path: Path, prompts: list[list[int]]) -> bool:
    """Whether a pool's file has phrases of each prompt."""
    if not path.exists():
        return False
    rows = PoolFile.at(path).rows()
    held = {
        tuple(row[:size].tolist())
        for row, size in zip(rows["tokens"], rows["lengths"], strict=True)
    }
    return all(
        any(tuple(ids[i : i + 6]) in held for i in range(1, len(ids) - 6)) for ids in prompts
    )
