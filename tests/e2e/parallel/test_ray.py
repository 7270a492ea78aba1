"""Engines on a Ray cluster: batches of Ray Data, Ray Serve, and vLLM's Ray executor.

Run with `RAY=1` in the environment and nothing beside them: eight processes want two cores, and
Ray gives up on what does not answer in time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from openai import APIStatusError, OpenAI
from vllm import SamplingParams

from ..ray_programs import ENGINE, ray_cluster, serving_on_ray
from .test_tensor_parallel import ENGINES

PLATFORM = '''
"""vLLM's CPU platform for its Ray executor, which refuses a platform that Ray has no name for."""

def register():
    return "ray_cpu.RayCpuPlatform"

def __getattr__(name):  # vllm.platforms is not there yet when this module is loaded
    if name != "RayCpuPlatform":
        raise AttributeError(name)
    from vllm.platforms.cpu import CpuPlatform
    found = type(name, (CpuPlatform,), {"ray_device_key": "GPU", "__module__": __name__})
    return globals().setdefault(name, found)
'''
RANKS = """
import json, os, signal, sys
import ray

def pid(worker):
    return os.getpid()

if __name__ == "__main__":
    job = json.load(sys.stdin)
    path = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    ray.init(address=os.environ["RAY_ADDRESS"], runtime_env={"env_vars": path})
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.exceptions import EngineDeadError
    import vllm_ouroboros

    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
    given = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    llm = None
    for engine in job["engines"]:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown(timeout=20)
        llm = LLM(**engine)
        for batch in job["batches"]:
            parts = [given[i : i + batch] for i in range(0, len(given), batch)]
            outputs = [o for part in parts for o in llm.generate(part, params, use_tqdm=False)]
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            stats = vllm_ouroboros.stats(llm) if engine["speculative_config"] else {}
            print(json.dumps({"tokens": tokens, "stats": stats}), flush=True)
    os.kill(llm.collective_rpc(pid)[1], signal.SIGKILL)
    try:
        llm.generate(given, params, use_tqdm=False)
    except EngineDeadError as error:
        print("dead")
"""
pytestmark = pytest.mark.skipif("RAY" not in os.environ, reason="RAY=1 runs them, alone")
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[None]:
    """A cluster whose GPUs are none, but what vLLM's Ray executor gives to ranks."""
    serve = {
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    }
    with ray_cluster(tmp_path_factory.mktemp("cluster"), cpus=8, gpus=2, **serve):
        yield


class Asked(NamedTuple):
    """A prompt, and what vanilla vLLM answers."""

    prompt: str
    ids: list[int]
    tokens: list[int]
    text: str


@pytest.fixture(scope="module")
def asked(texts, tokenizer, vanilla) -> list[Asked]:
    """Prompts with the answers of one rank without speculation."""
    ids = [tokenizer.encode(text) for text in texts]
    outputs = vanilla(ids, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS))
    vanilla.engines.close()
    answers = [output.outputs[0] for output in outputs]
    return [
        Asked(text, tokens, list(answer.token_ids), answer.text)
        for text, tokens, answer in zip(texts, ids, answers, strict=True)
    ]


def processes(title: str) -> list[psutil.Process]:
    """Processes of the cluster with such a title."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if title in " ".join(process.info["cmdline"] or [])
    ]


def below(process: psutil.Process) -> list[psutil.Process]:
    """Its children and theirs."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title_of(process: psutil.Process) -> str:
    """What stands in its command line."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def wait_until(found: Callable[[], object], process: subprocess.Popen, log: Path, what: str):
    """What is found at last, while a process runs."""
    until = time.monotonic() + 240
    while not (result := found()):
        ended = process.poll() is not None
        if ended or time.monotonic() > until:
            pytest.fail(f"{what}: {log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
    return result


def test_every_row_comes_out_once(cluster, asked, tmp_path) -> None:
    """Of two engines one is killed in the middle; bad rows cost themselves alone."""
    rows, out, log = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl", tmp_path / "log"
    good = [{"id": f"row {i}", "prompt": text} for i, (text, *_) in enumerate(asked)]
    bad = ["no JSON", json.dumps({"id": "long", "prompt": "x = 1\n" * 1000})]
    rows.write_text("".join(f"{line}\n" for line in [*map(json.dumps, good), *bad]))
    command = [
        *(sys.executable, "-P", "-m", "vllm_ouroboros.cli.main", "batch", str(rows), "--verbose"),
        *("--out", str(out), "--replicas", "2", "--batch-size", "2", "--plain"),
        *("--ouroboros-config", '{"adaptive": false}', "--engine-args", json.dumps(ENGINE)),
        *("--sampling-params", json.dumps({"max_tokens": NEW_TOKENS})),
    ]
    with log.open("wb") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def answers() -> list[dict]:
        return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    def both_answer() -> list[psutil.Process]:
        engines = processes("vLLMEngineStageUDF")
        return engines if len(engines) == 2 and answers() else []

    try:
        killed, _ = wait_until(both_answer, job, log, "no two engines")
        engine = below(killed)
        assert len(answers()) < len(asked)
        killed.kill()
        assert job.wait(400) == 1, log.read_text(errors="replace")[-4000:]  # bad rows
    finally:
        job.kill()
    psutil.wait_procs(engine, 30)
    assert not any(process.is_running() for process in engine), "an engine outlived its replica"
    found = answers()
    assert Counter(row["id"] for row in found) == Counter(
        [*(row["id"] for row in good), "rows.jsonl:61", "long"]
    )
    answered = {row["id"]: row["text"] for row in found if row["error"] is None}
    assert [answered[row["id"]] for row in good] == [one.text for one in asked]
    errors = {row["id"]: row["error"] for row in found if row["error"] is not None}
    assert errors.keys() == {"rows.jsonl:61", "long"}
    assert errors["rows.jsonl:61"].startswith("JSONDecodeError")
    assert "maximum context length" in errors["long"]


def test_serving_scales_without_loss(cluster, asked, tmp_path) -> None:
    """From one replica to two under load; then the engine of one dies."""
    some = [one.prompt for one in asked[:24]]
    expected = [one.text for one in asked[:24]]

    def replicas() -> list[psutil.Process]:
        return [
            one
            for one in processes("ReplicaServer:tiny")
            if any("VLLM::Worker" in title_of(child) for child in below(one))
        ]

    more = (
        *("--address", os.environ["RAY_ADDRESS"], "--ouroboros-config", '{"adaptive": false}'),
        *("--replicas", "1-2", "--requests", "2", "--delay", "1"),
    )
    with serving_on_ray(tmp_path, *more) as address, ThreadPoolExecutor(8) as threads:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)

        def ask(text: str) -> str:
            answer = client.completions.create(
                model="tiny", prompt=text, temperature=0, max_tokens=NEW_TOKENS
            )
            return answer.choices[0].text

        until, both = time.monotonic() + 240, 0
        while both < 2 and time.monotonic() < until:  # two rounds with both replicas
            assert [*threads.map(ask, some)] == expected
            both += len(replicas()) == 2
        assert both == 2, "no second replica"
        # what runs in a replica whose engine dies is lost, and nothing else
        [engine] = [one for one in below(replicas()[0]) if "VLLM::Worker" in title_of(one)]
        asked_for = count()

        def attempt(i: int) -> str | Exception:
            if next(asked_for) == 16:
                engine.kill()
            try:
                return ask(some[i])
            except APIStatusError as error:
                return error

        order = [*range(24)] * 3
        found = [*threads.map(attempt, order)]
    lost = [one for one in found if not isinstance(one, str)]
    assert len(lost) <= 8, f"{len(lost)} requests failed, of 8 at a time"
    assert all(one in (expected[i], *lost) for i, one in zip(order, found, strict=True))


def test_ranks_on_ray(cluster, pair, asked, tools, tmp_path) -> None:
    """Two ranks as Ray actors, and what is said when one of them dies.

    `ALL_ENGINES=1` in the environment compares all ways to draft with two ranks of vanilla.
    """
    (tmp_path / "ray_cpu.py").write_text(PLATFORM)
    known = tmp_path / "ray_cpu-0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu\nVersion: 0\n")
    entry = "[vllm.platform_plugins]\nray_cpu = ray_cpu:register\n"
    (known / "entry_points.txt").write_text(entry)
    two = {
        **tools.BASE,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "ray",
        "speculative_config": None,
    }
    engines = []
    for options, share in ENGINES.values():
        own = {"draft_model": str(pair / "head")} if options.get("draft_model") == "head" else {}
        engines.append(
            two
            | {
                "speculative_config": {
                    "model": tools.PROPOSER,
                    "num_speculative_tokens": 26,
                    "draft_tensor_parallel_size": share,
                },
                "additional_config": {
                    "ouroboros": {"draft_model": str(pair / "draft"), **options, **own}
                },
            }
        )
    whole = "ALL_ENGINES" in os.environ
    job = {
        "engines": [two, *engines] if whole else engines[:1],
        "prompts": [one.ids for one in asked],
        "batches": [8, 1] if whole else [60],
        "max_tokens": NEW_TOKENS,
    }
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environ = {"PYTHONPATH": str(tmp_path), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    run = subprocess.run(
        [sys.executable, "-P", str(script)], cwd=tmp_path, input=json.dumps(job), text=True,
        capture_output=True, timeout=400 * len(job["engines"]), env={**os.environ, **environ},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    *told, dead = [line for line in run.stdout.splitlines() if line.startswith(("{", "dead"))]
    runs = [json.loads(line) for line in told]
    assert len(runs) == len(job["engines"]) * len(job["batches"])
    expected = runs[0]["tokens"] if whole else [one.tokens for one in asked]
    assert all(one["tokens"] == expected for one in runs)
    stats = runs[len(job["batches"]) if whole else 0]["stats"]
    assert stats["accepted_from_draft"] > stats["emitted_tokens"] // 10
    assert dead == "dead"
    assert "RayWorkerProc rank=[1] died unexpectedly" in run.stdout + run.stderr
