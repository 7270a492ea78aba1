"""Environment of every test: offline, quiet, a small KV cache on the CPU."""

from __future__ import annotations

import atexit
import gc
import os

import pytest
from hypothesis import settings

FIRST = (
    "test_adaptive.py",
    "test_compile.py",
    "test_inflate.py",
    "test_gpu_scripts.py",
    "test_wheel.py",
)
"""The loops of engines are compiled on a new machine. The first file does so for all: what runs
beside it needs none.
"""

for key, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(key, value)

# With pytest-xdist each process of tests has its engines on a core of its own: those that share
# cores wait for each other's threads.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))

# The same examples on every run: what fails here fails on any machine. Other examples are one
# option away, `--hypothesis-profile=explore`.
settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeat")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Some files come first."""
    items.sort(key=lambda i: FIRST.index(i.path.name) if i.path.name in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """The garbage collector leaves alone what is imported by now: to look at all of vLLM takes a
    second, at the end of each engine.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
