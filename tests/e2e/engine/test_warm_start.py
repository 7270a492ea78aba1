"""The phrase pool outlives the engine."""

from __future__ import annotations

import time

import psutil
import pytest
from vllm import LLM, SamplingParams

import vllm_ouroboros
from vllm_ouroboros.policy.forward_costs import read_costs

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


@pytest.fixture
def engine(tools, pair):
    """Start an engine with a pool file; at most one at a time."""
    engines = tools.Engines()

    def start(path, **options) -> LLM:
        engines.close()
        return engines.get(
            **{**tools.BASE, "max_num_seqs": 1},
            speculative_config={"model": tools.PROPOSER, "num_speculative_tokens": 26},
            additional_config={"ouroboros": {"pool_path": str(path), **options}},
        )

    yield start
    engines.close()


def test_a_second_engine_starts_warm(engine, prompts, vanilla, tools, tmp_path):
    path, some = tmp_path / "pool.safetensors", prompts[:8]
    expected = tools.tokens_of(vanilla(some, GREEDY))
    llm = engine(path, adaptive=False)
    assert vllm_ouroboros.stats(llm)["pool_phrases"] == 0
    with tools.Used(llm) as cold:
        assert tools.tokens_of(tools.generate(llm, some, GREEDY, one_by_one=True)) == expected
    held = vllm_ouroboros.stats(llm)["pool_phrases"]
    llm = engine(path, adaptive=False)  # ends the first, which saves
    assert vllm_ouroboros.stats(llm)["pool_phrases"] == held > 0
    with tools.Used(llm) as warm:
        assert tools.tokens_of(tools.generate(llm, some, GREEDY, one_by_one=True)) == expected
    assert warm["accepted_tokens"] > cold["accepted_tokens"]


def test_an_idle_engine_has_saved_before_it_is_killed(engine, prompts, tools, tmp_path):
    path = tmp_path / "pool.safetensors"
    llm = engine(path)
    tools.generate(llm, prompts[:2], GREEDY)
    held = vllm_ouroboros.stats(llm)["pool_phrases"]
    files = [path, tmp_path / "pool.safetensors.costs.json"]
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    [process] = llm.llm_engine.engine_core.resources.engine_manager.processes
    core = psutil.Process(process.pid)
    siblings = core.parent().children()  # its worker is one: both are forks of the same process
    [worker] = [one for one in siblings if one.create_time() > core.create_time()]
    worker.kill()
    process.kill()
    process.join(60)
    assert vllm_ouroboros.stats(engine(path))["pool_phrases"] == held > 0


def test_a_file_that_is_not_ours_stays(engine, prompts, tools, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a pool")
    llm = engine(path)
    assert vllm_ouroboros.stats(llm)["pool_phrases"] == 0
    tools.generate(llm, prompts[:2], GREEDY)
    engine(tmp_path / "other")  # ends the first
    assert path.read_text() == "not a pool"
    costs = read_costs(tmp_path / "notes.txt.costs.json")
    assert costs["target"]["1"] > 0
