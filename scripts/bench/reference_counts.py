"""Forwards that the reference implementation of Ouroboros (PyPI `ourodec`) needs per prompt.

Runs inside an environment of its own, since `ourodec` needs an old transformers:

    python3.11 -m venv REF
    REF/bin/pip install torch==2.13.0 transformers==4.36.2 'numpy<2' safetensors
    REF/bin/pip install --no-deps ourodec==0.1.0
    REF/bin/python scripts/bench/reference_counts.py --target DIR --draft DIR \
        --prompts ids.jsonl --pool cold --out rows.jsonl

Input rows are {"id", "prompt_token_ids"} (`bench_reference.py` makes them: the old tokenizers
library cannot read new tokenizer files). The first output row is {"meta": {...}}, each further
one is

    {"id", "prompt_tokens", "new_tokens", "target_forwards", "draft_forwards",
     "first_forward_tokens", "token_ids", "ended", "loops"}

- `target_forwards` are calls of the target's `forward_with_guess`. The first of them reads the
  prompt and verifies the first draft; `first_forward_tokens` is what it committed, so that
  (new_tokens - first_forward_tokens) / (target_forwards - 1) counts decode forwards alone.
- `draft_forwards` are calls of the draft's `jforward_multilevel`, the prompt's own included.
- `new_tokens` and `token_ids` stop at the first end-of-sequence token, which counts, or at the
  limit.
- `ended` is "eos", "length", or "early": the implementation stopped before the limit without an
  end-of-sequence token (its loop takes an end position from a suffix that it did not accept).
- `loops`: any 4-gram of tokens occurs more than 8 times in the output.

Names: gamma is `gamma`, K is `topk`, beta is `lookahead_level - 1`, W is `window_size`, G is
`guess_set_size`; the implementation demands W = G.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch

LOOP_NGRAM, LOOP_COUNT = 4, 8


def loops(tokens: list[int]) -> bool:
    """Whether any token 4-gram occurs more than 8 times."""
    grams = Counter(zip(*(tokens[i:] for i in range(LOOP_NGRAM)), strict=False))
    return bool(grams) and max(grams.values()) > LOOP_COUNT


def load_model(path: str):
    from ouroboros.models.modeling_llama import LlamaForCausalLM
    from transformers import LlamaConfig

    raw = json.loads((Path(path) / "config.json").read_text())
    if raw.get("model_type") != "llama":
        sys.exit(f"{path}: model_type is {raw.get('model_type')!r}; the reference runs llama only")
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
        sys.exit(f"{path}: scaled RoPE is not read by this script")
    if (
        raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
        * raw["num_attention_heads"]
        != raw["hidden_size"]
    ):
        sys.exit(f"{path}: the reference needs heads x head_dim = hidden_size")
    config = LlamaConfig.from_pretrained(path)
    # transformers 4.36 does not know `rope_parameters`.
    config.rope_theta = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
    model = LlamaForCausalLM.from_pretrained(path, config=config, torch_dtype=torch.float32)
    return model.eval()


class Counters:
    """Counts forwards and notes the committed length before each verification."""

    def __init__(self, target, draft) -> None:
        self.target = self.draft = 0
        self.prefix_lengths: list[int] = []
        target_forward = target.forward_with_guess
        draft_forward = draft.jforward_multilevel

        def counted_target(*args, **kwargs):
            self.target += 1
            return target_forward(*args, **kwargs)

        def counted_draft(*args, **kwargs):
            self.draft += 1
            return draft_forward(*args, **kwargs)

        target.forward_with_guess = counted_target
        draft.jforward_multilevel = counted_draft

        from ouroboros import kv_cache_model

        lade = kv_cache_model.KVCacheModelLade
        generate = lade.generate
        layers = draft.config.num_hidden_layers

        def noted_generate(cache, prefix, ngram_cache, gamma):
            self.prefix_lengths.append(prefix.shape[1])
            return generate(cache, prefix, ngram_cache, gamma)

        def rollback(cache, end_pos):
            # The published method is written for a draft of 32 layers.
            kept = cache.ctx["past_key_values"]
            assert len(kept) == layers
            cache.ctx["past_key_values"] = [(k[:, :, :end_pos], v[:, :, :end_pos]) for k, v in kept]

        lade.generate = noted_generate
        lade.rollback = rollback

    def reset(self) -> None:
        self.target = self.draft = 0
        self.prefix_lengths = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--prompts", required=True, help='JSON lines {"id", "prompt_token_ids"}')
    parser.add_argument("--out", required=True)
    parser.add_argument("--pool", choices=("cold", "carried"), default="cold")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--draft-tokens", type=int, default=8, help="gamma")
    parser.add_argument("--num-suffixes", type=int, default=3, help="K")
    parser.add_argument("--phrase-len", type=int, default=6, help="beta")
    parser.add_argument("--window-size", type=int, default=10, help="W")
    parser.add_argument("--guess-set-size", type=int, default=10, help="G")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--limit", type=int, default=0, help="first prompts only; 0 means all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    import transformers
    from ouroboros import ouroboros
    from ouroboros.cache_engine import CacheEngine

    transformers.logging.set_verbosity_error()
    target, draft = load_model(args.target), load_model(args.draft)
    if target.config.vocab_size != draft.config.vocab_size:
        sys.exit("target and draft vocabularies differ")
    eos = target.config.eos_token_id
    counters = Counters(target, draft)
    level = args.phrase_len + 1
    rows = [json.loads(line) for line in Path(args.prompts).read_text().splitlines() if line]
    rows = rows[: args.limit or None]
    shared_pool = CacheEngine(level, args.guess_set_size)

    versions = {
        name: metadata.version(name) for name in ("ourodec", "torch", "transformers", "numpy")
    }
    meta = {
        "engine": "ourodec",
        "versions": {**versions, "python": platform.python_version()},
        "pool": args.pool,
        "settings": {
            "max_len": args.max_new_tokens,
            "gamma": args.draft_tokens,
            "topk": args.num_suffixes,
            "lookahead_level": level,
            "window_size": args.window_size,
            "guess_set_size": args.guess_set_size,
            "eos_token_id": eos,
            "dtype": "float32",
        },
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    started = time.perf_counter()
    with Path(args.out).open("w") as out:
        print(json.dumps({"meta": meta}), file=out)
        for row in rows:
            ids = row["prompt_token_ids"]
            counters.reset()
            pool = shared_pool if args.pool == "carried" else None
            result = ouroboros(
                torch.tensor([ids]),
                draft,
                target,
                ngram_cache=pool,
                max_len=args.max_new_tokens,
                gamma=args.draft_tokens,
                window_size=args.window_size,
                guess_set_size=args.guess_set_size,
                lookahead_level=level,
                eos_token_id=eos,
                topk=args.num_suffixes,
            )
            tokens = result[0, len(ids) :].tolist()[: args.max_new_tokens]
            ended = "length" if len(tokens) == args.max_new_tokens else "early"
            if eos in tokens:
                tokens, ended = tokens[: tokens.index(eos) + 1], "eos"
            lengths = counters.prefix_lengths[1:] or [len(ids) + len(tokens)]
            record = {
                "id": row["id"],
                "prompt_tokens": len(ids),
                "new_tokens": len(tokens),
                "target_forwards": counters.target,
                "draft_forwards": counters.draft,
                "first_forward_tokens": min(lengths[0] - len(ids), len(tokens)),
                "token_ids": tokens,
                "ended": ended,
                "loops": loops(tokens),
            }
            print(json.dumps(record), file=out, flush=True)
    print(f"{len(rows)} prompts, {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
