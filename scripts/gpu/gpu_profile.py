"""What a step of an engine costs the host and the device: launches, copies, waits, phases.

    python scripts/gpu/gpu_profile.py --out build/gpu/profile.json

The shipped pair in this process, with full CUDA graphs: what the host does in a step does not
depend on the size of a model. For each batch size: milliseconds of a step and of its phases
(`StepClock`), and, from torch's profiler, how often a step launches kernels and graphs, copies and
waits, and which calls and kernels take longest.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_compare import stdlib_prompts
from gpu_info import origin, require_cuda

CALLS = {
    "launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "graphs": ("cudaGraphLaunch",),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy"),
    "waits": ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"),
}
"""Calls of the CUDA runtime, by what is counted."""
LONGEST = 12


def counts(names: Iterable[tuple[str, int]], steps: int) -> dict[str, float]:
    """How often a step makes each kind of call, from pairs of a call's name and its count."""
    found: Counter[str] = Counter()
    for name, count in names:
        for kind, calls in CALLS.items():
            found[kind] += count if name in calls else 0
    return {kind: round(found[kind] / steps, 1) for kind in CALLS}


def engine(mode: str) -> Any:
    """The shipped pair with trees of a fixed size."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    import vllm_ouroboros

    pair = Path(vllm_ouroboros.__file__).parent / "assets" / "tiny-code"
    graphs: dict[str, Any] = {"compilation_config": {"mode": 0, "cudagraph_mode": mode}}
    return LLM(
        model=str(pair / "target"), max_model_len=512, max_num_seqs=32,
        kv_cache_memory_bytes=2**29, gpu_memory_utilization=0.05, enable_prefix_caching=False,
        enforce_eager=mode == "NONE", **({} if mode == "NONE" else graphs),
        speculative_config={
            "model": "vllm_ouroboros.OuroborosProposer", "num_speculative_tokens": 26,
        },
        additional_config={
            "ouroboros": {"draft_model": str(pair / "draft"), "adaptive": False}
        },
    )  # fmt: skip


def measure(llm: Any, batch: int, tokens: int) -> dict[str, Any]:
    """A batch of requests, twice: timed, then under the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    import vllm_ouroboros

    prompts = [{"prompt_token_ids": ids} for ids in stdlib_prompts(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def generate() -> tuple[float, int]:
        vllm_ouroboros.reset_pool(llm)
        before = vllm_ouroboros.stats(llm)["target_forwards"]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, vllm_ouroboros.stats(llm)["target_forwards"] - before

    generate()
    seconds, steps = generate()
    times = llm.collective_rpc("ouroboros_step_times")[0][-steps:]
    phases = {name for one in times for name in one} - {"batch"}  # that is no time
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        _, profiled = generate()
    events = list(profiler.key_averages())
    by_host = sorted(events, key=lambda e: -e.self_cpu_time_total)[:LONGEST]
    row: dict[str, Any] = {
        "batch": batch,
        "steps": steps,
        "ms_per_step": round(1000 * seconds / steps, 2),
        "phases_ms": {
            name: round(1000 * sum(one.get(name, 0.0) for one in times) / len(times), 3)
            for name in sorted(phases)
        },
        **counts(((e.key, e.count) for e in events), profiled),
        "host_us_per_step": {
            e.key[:60]: round(e.self_cpu_time_total / profiled, 1) for e in by_host
        },
    }
    if cuda:
        by_device = sorted(events, key=lambda e: -e.self_device_time_total)[:LONGEST]
        row["device_us_per_step"] = {
            e.key[:60]: round(e.self_device_time_total / profiled, 1) for e in by_device
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu/profile.json"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--mode", default="FULL_DECODE_ONLY", help="of CUDA graphs; NONE: eager")
    parser.add_argument("--any-device", action="store_true", help="run without CUDA as well")
    args = parser.parse_args()
    if not args.any_device:
        require_cuda()
    llm = engine(args.mode)
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for batch in args.batches:
        rows.append(measure(llm, batch, args.tokens))
        about = {} if args.any_device else origin()
        args.out.write_text(json.dumps({**about, "mode": args.mode, "rows": rows}, indent=1) + "\n")
    told = ("ms_per_step", *CALLS)
    shown = {f"batch {row['batch']}": {key: row[key] for key in told} for row in rows}
    print(json.dumps({"judgments": shown}))


if __name__ == "__main__":
    main()
