"""Two tensor-parallel ranks as Ray actors.

`RAY=1` in the environment runs them, with nothing beside them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm import SamplingParams

from .. import known_costs
from ..parallel.test_tensor_parallel import ENGINES
from .conftest import NEW_TOKENS

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
import json, os, signal, sys, threading
import cloudpickle, ray
import known_costs
cloudpickle.register_pickle_by_value(known_costs)

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
        if engine["speculative_config"]:
            llm.collective_rpc(known_costs.dear_target)  # so that it drafts
        for batch in job["batches"]:
            parts = [given[i : i + batch] for i in range(0, len(given), batch)]
            outputs = [o for part in parts for o in llm.generate(part, params, use_tqdm=False)]
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            stats = vllm_ouroboros.stats(llm) if engine["speculative_config"] else {}
            print(json.dumps({"tokens": tokens, "stats": stats}), flush=True)
        seeded = [SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=job["max_tokens"])
                  for i in range(job["seeds"])]
        outputs = llm.generate(given[: job["seeds"]], seeded, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"tokens": tokens, "seeded": True}), flush=True)
    follower = llm.collective_rpc(pid)[1]
    threading.Timer(1, os.kill, [follower, signal.SIGKILL]).start()  # in the middle of a step
    try:
        llm.generate(given, params, use_tqdm=False)
    except EngineDeadError as error:
        print("dead")
"""
pytestmark = pytest.mark.skipif("RAY" not in os.environ, reason="RAY=1 runs them, alone")


def test_ranks_on_ray(cluster, pair, asked, vanilla, tools, tmp_path) -> None:
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
    params = [
        SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=NEW_TOKENS)
        for i in range(12)
    ]
    drawn = tools.tokens_of(vanilla([one.ids for one in asked[:12]], params))
    vanilla.engines.close()
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
        "seeds": 12,
    }
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    helpers = Path(known_costs.__file__).parent
    environ = {"PYTHONPATH": f"{tmp_path}:{helpers}", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    run = subprocess.run(
        [sys.executable, "-P", str(script)], cwd=tmp_path, input=json.dumps(job), text=True,
        capture_output=True, timeout=400 * len(job["engines"]), env={**os.environ, **environ},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    *told, dead = [line for line in run.stdout.splitlines() if line.startswith(("{", "dead"))]
    found = [json.loads(line) for line in told]
    runs = [one for one in found if "seeded" not in one]
    assert len(found) - len(runs) == len(job["engines"])
    assert len(runs) == len(job["engines"]) * len(job["batches"])
    expected = runs[0]["tokens"] if whole else [one.tokens for one in asked]
    assert all(one["tokens"] == expected for one in runs)
    assert all(one["tokens"] == drawn for one in found if "seeded" in one)
    for one in runs:
        if stats := one["stats"]:  # not vanilla's
            assert stats["accepted_tokens"] > stats["emitted_tokens"] // 10
    assert dead == "dead"
    assert "RayWorkerProc rank=[1] died unexpectedly" in run.stdout + run.stderr
