"""Engine processes that begin with vLLM imported, which takes seconds where each does it anew.

vLLM spawns its processes on the CPU. Here they are forks of one process that has the imports and
does nothing else. `conftest.py` has this folder on the path. Servers and programs that the tests
start as a user would are spawned as ever.
"""

from __future__ import annotations

import os
from multiprocessing import context, forkserver, resource_tracker
from pathlib import Path

import torch

IMPORTED = [
    __name__,
    "vllm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm_ouroboros.integration.cpu_worker",
]


class Process(context.ForkServerProcess):
    """A fork that takes over the environment of the process that starts it."""

    def start(self) -> None:
        self.environment = dict(os.environ)
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.pop("PYTHONPATH")
            os.environ.update({"PYTHONPATH": path} if path else {})
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        # It asks the server that it came from, and does not start one of its own.
        forkserver._forkserver.ensure_running = resource_tracker.ensure_running
        forkserver.ensure_running = resource_tracker.ensure_running
        # OpenMP read its own variables when it was loaded.
        if cores := os.environ.get("OMP_PLACES"):
            os.sched_setaffinity(0, {int(core) for core in cores.strip("{}").split(",")})
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        super().run()


class Context(context.ForkServerContext):
    """What ``multiprocessing.get_context("spawn")`` returns, here and in the forks."""

    _name = "spawn"
    Process = Process


context._concrete_contexts["spawn"] = Context()
forkserver.set_forkserver_preload(IMPORTED)
