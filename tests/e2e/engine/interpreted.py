"""The CUDA path without a device: its runner, steps, graphs and kernels in an engine on the CPU.

Kernels run in Triton's interpreter. Only what needs a device is replaced: vLLM's attention for
rows without trees (by the oracle), and graphs: the draft model's by calling the function again,
the target's by running it on the padded rows and the static buffers that a graph would read.
Run as a program by `test_cuda_path.py`: for each line of JSON that it reads it prints one. Each
engine lives in a fork of this process, which has the imports.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch
import triton  # noqa: F401  (before vLLM looks for it)
import vllm.v1.worker.cpu.shm  # noqa: F401
from llvmlite.binding import ffi
from vllm import LLM, SamplingParams
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

import vllm_ouroboros
from vllm_ouroboros.draft import cuda_graphs as draft_graphs
from vllm_ouroboros.integration import compat
from vllm_ouroboros.integration.cpu_worker import OuroborosCPUWorker
from vllm_ouroboros.integration.cuda_runner import OuroborosCUDARunner
from vllm_ouroboros.integration.runner import TreeRunner
from vllm_ouroboros.kernels.reference import tree_attention
from vllm_ouroboros.trees.draft_tree import step_mask
from vllm_ouroboros.verify.cuda.attention import TreeRows, TreeTritonBuilder

sys.path.append(str(Path(__file__).parents[2] / "unit" / "helpers"))
from quick_interpreter import patch_once

CALLS = {"tree": 0, "graphs": 0, "padded": 0, "mixed": 0, "replays": 0, "walks": 0}
JOB_SECONDS = 600
draft_graphs.SIZES = 16, 96  # interpreted rows take long


class PlainImpl(CPUAttentionBackendImpl):
    """Attention by the oracle, over pages laid out as on CUDA devices."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sliding_window = (self.sliding_window - 1 if self.sliding_window > 0 else -1, 0)

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        keys, values = self.split_cache(kv_cache)
        real = slot_mapping >= 0
        slots = slot_mapping[real]
        page, place = slots // keys.shape[1], slots % keys.shape[1]
        keys[page, place], values[page, place] = key[: len(real)][real], value[: len(real)][real]

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *_) -> torch.Tensor:
        if metadata is None:
            return output.fill_(0)
        keys, values = self.split_cache(kv_cache)
        starts = metadata.query_start_loc
        lengths = starts.diff()
        parents = torch.cat([torch.arange(-1, int(n) - 1) for n in lengths]).int().numpy()
        rows = int(starts[-1])
        tree_attention(
            query[:rows], key[:rows], value[:rows], keys, values, metadata.block_table,
            metadata.seq_lens - lengths, starts,
            torch.from_numpy(step_mask(parents, starts.numpy())), self.scale,
            output.view(-1, self.num_heads, self.head_size)[:rows],
        )  # fmt: skip
        return output


class TreeImpl(TreeRows, PlainImpl):
    """The class under test, over the oracle instead of vLLM's kernels."""

    def _attend(self, *args) -> None:
        CALLS["tree"] += 1
        super()._attend(*args)


class Backend(CPUAttentionBackend):
    """Takes the place of ``CPU_ATTN``."""

    @staticmethod
    def get_impl_cls():
        return TreeImpl

    @staticmethod
    def get_builder_cls():
        return TreeTritonBuilder


def capture(forward):
    """A "graph" that calls the function again."""
    result = forward()

    def replay() -> None:
        CALLS["replays"] += 1
        result.copy_(forward())

    return replay, result


class Runner(OuroborosCUDARunner, CPUModelRunner):
    """The CUDA runner on vLLM's runner for the CPU."""

    make_timer = TreeRunner.make_timer
    _idle_target = TreeRunner._idle_target
    _idle_draft = TreeRunner._idle_draft

    def execute_model(self, *args, **kwargs):
        draft = self.drafter.draft
        if draft is not None and draft.graphs is None:
            self._graph_draft(capture)
        return super().execute_model(*args, **kwargs)

    def _check_and_update_cudagraph_mode(self, *args, **kwargs) -> None:
        settings = self.compilation_config
        settings.cudagraph_capture_sizes = [1, 2, 4, 8, 16, 24]
        settings.max_cudagraph_capture_size = 24
        self.cudagraph_dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE)

    def _attach_masks(self, metadata, num_reqs, graph_rows) -> None:
        rows = int(self.query_start_loc.np[num_reqs])
        CALLS["graphs"] += graph_rows is not None
        CALLS["padded"] += graph_rows is not None and graph_rows > rows
        CALLS["mixed"] += num_reqs < len(self.input_batch.req_ids)
        super()._attach_masks(metadata, num_reqs, graph_rows)

    def _sample(self, *args):
        CALLS["walks"] += self.trees is not None and any(self.trees.trees)
        return super()._sample(*args)


class Worker(OuroborosCPUWorker):
    """The CPU worker with that runner."""

    backends: ClassVar = {AttentionBackendEnum.CPU_ATTN: f"{__name__}.Backend"}

    def init_device(self) -> None:
        original, cpu_worker.CPUModelRunner = cpu_worker.CPUModelRunner, Runner
        try:
            super(OuroborosCPUWorker, self).init_device()
        finally:
            cpu_worker.CPUModelRunner = original


def spare_llvmlite() -> None:
    """Let vLLM look through all modules for kernels with numba loaded: `vars` of llvmlite's library
    must not be one of its functions.
    """
    wrapper = type(ffi.lib)
    look_up = wrapper.__getattr__

    def getattr_(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    wrapper.__getattr__ = getattr_


def in_one_chunk(call: Callable[[], None]) -> None:
    """Call it behind a frame of 70,000 variables, whose chunk of the stack has room for all others.

    CPython 3.11 has frames in chunks of 16 KiB, and a loop whose calls cross the end of one maps
    and unmaps the next one each time: half of the interpreter's time.
    """
    names = "".join(f"a{i} = " for i in range(70_000))
    exec(f"def wide(call):\n    return call()\n    {names}0", found := {})
    found["wide"](call)


def run(job: dict, answers: Connection) -> None:
    """Send {tokens, stats, calls} of a job {engine, prompts, params}, what was called among it."""
    llm = LLM(**job["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    params = [SamplingParams(**one) for one in job["params"]]
    tokens = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]
    answers.send({"tokens": tokens, "stats": vllm_ouroboros.stats(llm), "calls": CALLS})


def main() -> None:
    """A fork for each job; the answer to one that fails is {}."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    spare_llvmlite()
    patch_once()
    sys.modules["interpreted"] = sys.modules["__main__"]
    compat.WORKERS["cpu"] = f"{__name__}.Worker"
    forks = multiprocessing.get_context("fork")
    for line in sys.stdin:
        answers, sending = forks.Pipe(duplex=False)
        call = partial(run, json.loads(line), sending)
        child = forks.Process(target=in_one_chunk, args=(call,))
        child.start()
        sending.close()
        answer = {}
        with contextlib.suppress(EOFError):
            if answers.poll(JOB_SECONDS):
                answer = answers.recv()
        child.kill()
        print(json.dumps(answer), file=output, flush=True)


if __name__ == "__main__":
    main()
