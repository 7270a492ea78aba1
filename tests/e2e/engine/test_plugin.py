"""Installed but not selected, the plugin changes nothing in vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SNAPSHOT = """
import json, os, sys
os.environ["VLLM_PLUGINS"] = ""  # vLLM itself loads no plugin here
import vllm.entrypoints.llm, vllm.engine.arg_utils, vllm.platforms
import vllm.v1.engine.core, vllm.v1.worker.cpu_worker, vllm.v1.worker.gpu_model_runner
import vllm.v1.core.sched.scheduler, vllm.v1.sample.rejection_sampler
import vllm.v1.attention.backends.cpu_attn, vllm.v1.attention.backends.registry
from vllm.platforms import current_platform
platform = type(current_platform)

def snapshot():
    seen = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("vllm.") or module is None:
            continue
        for attribute, value in list(vars(module).items()):
            seen[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                for member, inner in list(vars(value).items()):
                    seen[name, value.__qualname__, member] = inner
    return seen

def changed(before, after):
    # the objects are kept alive, so identity means identity
    return sorted(".".join(key) for key, value in before.items() if after.get(key) is not value)

from vllm_ouroboros.integration.plugin import register
from vllm_ouroboros.integration import patches
before = snapshot()
register()
once = snapshot()
register()
twice = snapshot()
print(json.dumps({
    "changed": [c for c in changed(before, once)],
    "changed again": changed(once, twice),
    "listed": sorted(
        f"{p.owner().__module__}.{p.owner().__qualname__}.{p.name}" for p in patches.PATCHES
    ),
    "torch models": [m for m in sys.modules if m.startswith("vllm_ouroboros.integration.runner")],
}))
"""

CONFIG = """
import json, os, sys
from vllm.engine.arg_utils import EngineArgs  # loads no plugin yet

for plugins in ("none", "ouroboros"):
    if child := os.fork():
        sys.exit(1) if os.waitpid(child, 0)[1] else None
        continue
    os.environ["VLLM_PLUGINS"] = plugins
    engine = EngineArgs(model=sys.argv[1], dtype="float32", max_model_len=512)
    config = engine.create_engine_config()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    print(json.dumps({
        "worker": config.parallel_config.worker_cls,
        "scheduler": str(config.scheduler_config.get_scheduler_cls()),
        "asynchronous": config.scheduler_config.async_scheduling,
        "backend": AttentionBackendEnum.CPU_ATTN.get_path(),
        "additional": config.additional_config,
        "hash": config.compute_hash(),
        "loaded": "vllm_ouroboros.integration.patches" in sys.modules,
    }), flush=True)
    os._exit(0)
"""


def run(script: str, *arguments: str) -> list[dict]:
    """What a script printed, a line each."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_register_replaces_the_listed_symbols_only():
    [found] = run(SNAPSHOT)
    assert found["changed again"] == []
    assert found["listed"]
    assert set(found["changed"]) <= set(found["listed"])
    # what an engine is made of is loaded by those who select it
    assert found["torch models"] == []


def test_unselected_engine_has_the_same_configuration(pair):
    without, beside = run(CONFIG, str(pair / "target"))
    assert beside.pop("loaded")
    assert not without.pop("loaded")
    assert beside == without


@pytest.mark.parametrize("flag", ["--speculative-model", "--spec-model"])
def test_command_line(pair, flag):
    """The flags of the plugin reach the configuration, next to vLLM's own spellings."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_ouroboros.integration.plugin import register

    register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = json.dumps({"draft_model": str(pair / "draft"), "draft_tokens": 5})
    arguments = parser.parse_args(
        [
            *("--model", str(pair / "target"), flag, "vllm_ouroboros.OuroborosProposer"),
            *("--spec-tokens", "12", "--ouroboros-config", options),
            *("--additional-config", '{"ouroboros": {"num_suffixes": 1}, "other": 2}'),
            *("--max-model-len", "512", "--dtype", "float32"),
        ]
    )
    config = EngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.speculative_config.num_speculative_tokens == 12
    assert config.additional_config == {
        "ouroboros": {"draft_model": str(pair / "draft"), "draft_tokens": 5, "num_suffixes": 1},
        "other": 2,
    }
    assert (
        config.parallel_config.worker_cls
        == "vllm_ouroboros.integration.cpu_worker.OuroborosCPUWorker"
    )
