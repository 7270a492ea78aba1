"""Engine processes that begin with vLLM imported, which takes seconds where each does it anew.

vLLM spawns its processes on the CPU. Here they are forks of one process that has the imports and
does nothing else, and one that waits for another sleeps, where vLLM's would keep a core busy that
other tests want. Scripts can be such forks too (`forked_scripts.py`). Programs that the tests start
as a user would (`test_soak.py`, the commands, the examples) spawn and spin as ever. `conftest.py`
has this folder on the path.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from multiprocessing import context, forkserver, resource_tracker
from pathlib import Path
from unittest import mock

WAIT_SECONDS = 2e-4
"""Between two looks whether another process has sent something."""
IMPORTED = [
    __name__,
    "vllm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm_ouroboros.integration.cpu_worker",
    "warm_heap",
]


class Process(context.ForkServerProcess):
    """A fork that takes over the environment and the group of the process that starts it."""

    def start(self) -> None:
        self.environment, self.group = dict(os.environ), os.getpgrp()
        # OpenMP reads its variables when it is loaded, and no rank of a test has more than a core.
        own = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        with mock.patch.dict(os.environ, own):
            forkserver._forkserver.ensure_running()
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        with contextlib.suppress(OSError):  # of another session, or ended
            os.setpgid(0, self.group)
        # It asks the server that it came from, and does not start one of its own.
        forkserver._forkserver.ensure_running = resource_tracker.ensure_running
        if cores := os.environ.get("OMP_PLACES"):
            os.sched_setaffinity(0, {int(core) for core in cores.strip("{}").split(",")})
        from prometheus_client import values
        from vllm.distributed.device_communicators import shm_broadcast

        values.ValueClass = values.get_value_class()  # files if several processes serve
        shm_broadcast.sched_yield = lambda: time.sleep(WAIT_SECONDS)
        look_at_models_in_this_process()
        for log in (logging.getLogger("vllm"), *logging.getLogger("vllm").handlers):
            log.setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
        super().run()


class Context(context.ForkServerContext):
    """What ``multiprocessing.get_context("spawn")`` returns, here and in the forks."""

    _name = "spawn"
    Process = Process


def look_at_models_in_this_process() -> None:
    """vLLM imports a class of models that this machine has not seen yet in a process of its own,
    lest CUDA be initialized: it takes seconds for each class.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


context._concrete_contexts["spawn"] = Context()
forkserver.set_forkserver_preload(IMPORTED)
