"""Tokens per target forward, beside the reference implementation on the same prompts and settings.

    python scripts/bench/bench_reference.py --reference-python REF/bin/python \
        --prompts humaneval=humaneval.jsonl functions=functions.jsonl

REF is the environment described in `reference_counts.py`. Prompt rows are {"id", "prompt"};
each prompt loses its last line break and gets the beginning-of-sequence token, and both engines
read the same token ids. Writes three files to --out (default: benchmarks/):

    reference.md     the tables
    reference.json   the same figures, versions, hardware, commit, commands
    reference.jsonl  one row per prompt set, engine, pool and prompt

Raw rows with token ids stay in --work; with --reuse, runs that are complete there for the same
model files, prompts and settings are not repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vllm_ouroboros.cli.inputs import PAIR

ROOT = Path(__file__).resolve().parents[2]
RUNS = (
    ("ourodec", "cold"),
    ("ourodec", "carried"),
    ("vllm-ouroboros", "cold"),
    ("vllm-ouroboros", "carried"),
    ("vllm", ""),
)

SETTINGS = {
    "max_new_tokens": 128,
    "max_model_len": 1024,
    "draft_tokens": 8,  # gamma
    "num_suffixes": 3,  # K
    "phrase_len": 6,  # beta
    "window_size": 10,  # W
    "guess_set_size": 10,  # G
    "limit": 0,  # prompts of a set; 0 means all
}

DETAIL_LEFT_OUT = ("token_ids", "loops", "counters")
SHOWN = ("draft_model", "pool_scope")
"""Settings of a run that differ between machines, or stand in the tables."""

NOTES = """\
How to read this:

- *tokens per target forward* counts decoding alone: the tokens and the target forwards after the
  forward that read the prompt, pooled over prompts (sum of tokens / sum of forwards). That first
  forward differs by design: ourodec drafts before it and verifies in it, vLLM computes the prompt
  and one token. *with the prompt's forward* includes it and all its tokens on both sides.
- Tokens are those that the request returned, end-of-sequence token included, cut at the limit; a
  last forward that overshoots counts as a whole, on both sides.
- *draft forwards per token* counts every forward of the draft model, the prompt's included.
- *cold* empties the phrase pool before each prompt; *carried* keeps it over all prompts of a set,
  in the order of the file (ourodec: one cache object; vllm-ouroboros: `pool_scope: "global"`).
- A prompt *loops* when the target's own output has a 4-gram of tokens more than 8 times. Any method
  that copies phrases flies through such text, so these prompts stand apart.
- *equal to vanilla*: outputs that equal plain greedy decoding by vLLM, token for token.
"""


@dataclass(frozen=True)
class Summary:
    """Sums over prompts."""

    prompts: int
    tokens: int
    decode_tokens: int
    decode_forwards: int
    target_forwards: int
    draft_forwards: int
    equal: int

    @classmethod
    def of(cls, rows: list[dict], vanilla: dict[str, list[int]]) -> Summary:
        return cls(
            prompts=len(rows),
            tokens=sum(r["new_tokens"] for r in rows),
            decode_tokens=sum(r["new_tokens"] - r["first_forward_tokens"] for r in rows),
            decode_forwards=sum(r["target_forwards"] - 1 for r in rows),
            target_forwards=sum(r["target_forwards"] for r in rows),
            draft_forwards=sum(r["draft_forwards"] for r in rows),
            equal=sum(r["token_ids"] == vanilla[r["id"]] for r in rows),
        )

    def figures(self) -> dict[str, float]:
        return {
            "prompts": self.prompts,
            "tokens": self.tokens,
            "tokens_per_target_forward": self.decode_tokens / max(1, self.decode_forwards),
            "tokens_per_target_forward_with_prompt": self.tokens / max(1, self.target_forwards),
            "draft_forwards_per_token": self.draft_forwards / max(1, self.tokens),
            "equal_to_vanilla": self.equal,
        }


def fail(message: str) -> None:
    sys.exit(f"bench_reference: {message}")


def prompt_ids(path: Path, target: Path, limit: int) -> list[dict]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(target))
    rows = []
    for line in path.read_text().splitlines():
        if not line.strip():
            continue
        row = json.loads(line)
        ids = tokenizer.encode(row["prompt"].rstrip("\n"), add_special_tokens=False)
        rows.append({"id": row["id"], "prompt_token_ids": [tokenizer.bos_token_id, *ids]})
    return rows[: limit or None]


def fingerprint(paths: list[Path], extra: str) -> str:
    digest = hashlib.sha256(extra.encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_rows(path: Path) -> tuple[dict, list[dict]]:
    first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    return first["meta"], rows


def shown_command(args) -> str:
    """The command that repeats this run, without this machine's folders."""
    words = ["python", "scripts/bench/bench_reference.py", "--reference-python", "REF/bin/python"]
    words += ["--prompts", *(f"{name}={Path(file).name}" for name, file in split(args.prompts))]
    for name in ("target", "draft"):
        if getattr(args, name) != (PAIR / name).resolve():
            words += [f"--{name}", getattr(args, name).name]
    for name, default in SETTINGS.items():
        if getattr(args, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return shlex.join(words)


def split(items: list[str]) -> list[tuple[str, str]]:
    pairs = [item.partition("=")[::2] for item in items]
    for item, (_, file) in zip(items, pairs, strict=True):
        if not file:
            fail(f"--prompts {item}: want NAME=FILE")
    return pairs


def measure(args, name: str, engine: str, pool: str, ids: Path, count: int) -> Path:
    """Run one engine over one prompt set; the path of its rows."""
    settings = []
    for key in SETTINGS:
        if key not in ("max_model_len", "limit"):
            settings += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    command = ["--target", str(args.target), "--draft", str(args.draft), "--prompts", str(ids)]
    scripts = Path(__file__).resolve().parent
    if engine == "ourodec":
        command = [
            args.reference_python,
            "-W",
            "ignore",
            str(scripts / "reference_counts.py"),
            *command,
        ]
        command += ["--pool", pool, *settings]
    else:
        command = [sys.executable, str(scripts / "bench_forwards.py"), *command]
        command += ["--dtype", "float32", "--max-model-len", str(args.max_model_len), *settings]
        if engine == "vllm":
            command += ["--engine", "vanilla"]
        else:
            command += ["--pool", pool]
    weights = [
        p / f for p in (args.target, args.draft) for f in ("config.json", "model.safetensors")
    ]
    code = sorted((ROOT / "vllm_ouroboros").rglob("*.py")) if engine == "vllm-ouroboros" else []
    key = fingerprint([*weights, *code, ids], " ".join([engine, pool, *settings]))
    out = args.work / f"{name}.{engine}{'.' + pool if pool else ''}.{key}.jsonl"
    if args.reuse and out.exists() and len(out.read_text().splitlines()) == count + 1:
        return out
    print(f"{name}: {engine} {pool}", file=sys.stderr, flush=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([*command, "--out", str(out)], env=environment, cwd=args.work)
    if done.returncode:
        fail(f"exit status {done.returncode} from: {shlex.join(command)}")
    return out


def table(lines: list[dict]) -> str:
    head = (
        "| prompts | pool | engine | prompts (tokens) | tokens per target forward "
        "| with the prompt's forward | draft forwards per token | equal to vanilla |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| {r['set']} | {r['pool']} | {r['engine']} | {r['prompts']} ({r['tokens']}) "
        f"| **{r['tokens_per_target_forward']:.2f}** "
        f"| {r['tokens_per_target_forward_with_prompt']:.2f} "
        f"| {r['draft_forwards_per_token']:.2f} | {r['equal_to_vanilla']} of {r['prompts']} |\n"
        for r in lines
        if r["prompts"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--reference-python", required=True, help="interpreter with ourodec")
    parser.add_argument("--prompts", required=True, nargs="+", metavar="NAME=FILE")
    parser.add_argument("--target", type=Path, default=PAIR / "target")
    parser.add_argument("--draft", type=Path, default=PAIR / "draft")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "reference")
    parser.add_argument("--reuse", action="store_true", help="keep complete runs found in --work")
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument(
        "--engines", nargs="+", choices=sorted({engine for engine, _ in RUNS} - {"vllm"}),
        default=["ourodec", "vllm-ouroboros"],
    )  # fmt: skip
    args = parser.parse_args()
    if args.window_size != args.guess_set_size:
        fail("the reference needs --window-size equal to --guess-set-size")
    args.target, args.draft = args.target.resolve(), args.draft.resolve()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    metas: dict[str, dict] = {}
    plain: list[dict] = []
    looping: list[dict] = []
    detail: list[dict] = []
    files: dict[str, str] = {}
    for name, file in split(args.prompts):
        rows = prompt_ids(Path(file), args.target, args.limit)
        files[name] = f"{Path(file).name}, {len(rows)} prompts, {fingerprint([Path(file)], '')}"
        ids = args.work / f"{name}.ids.jsonl"
        ids.write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = {
            (engine, pool): measure(args, name, engine, pool, ids, len(rows))
            for engine, pool in RUNS
            if engine == "vllm" or engine in args.engines
        }
        vanilla_rows = read_rows(results["vllm", ""])[1]
        vanilla = {row["id"]: row["token_ids"] for row in vanilla_rows}
        loops = {row["id"] for row in vanilla_rows if row["loops"]}
        for pool in ("cold", "carried"):
            for engine in args.engines:
                meta, found = read_rows(results[engine, pool])
                metas[engine] = meta
                for row in found:
                    equal = row["token_ids"] == vanilla[row["id"]]
                    detail.append(
                        {
                            "set": name,
                            "engine": engine,
                            "pool": pool,
                            **{k: v for k, v in row.items() if k not in DETAIL_LEFT_OUT},
                            "loops": row["id"] in loops,
                            "equal_to_vanilla": equal,
                        }
                    )
                label = {"set": name, "pool": pool, "engine": engine}
                for lines, wanted in ((plain, False), (looping, True)):
                    part = [r for r in found if (r["id"] in loops) == wanted]
                    lines.append({**label, **Summary.of(part, vanilla).figures()})
        metas["vllm"] = read_rows(results["vllm", ""])[0]

    command = shown_command(args)
    machine = metas["vllm"]
    commit = metas.get("vllm-ouroboros", machine)["commit"]
    settings = (
        f"greedy, {args.max_new_tokens} new tokens, float32, batch 1, "
        f"γ = {args.draft_tokens}, K = {args.num_suffixes}, β = {args.phrase_len}, "
        f"W = {args.window_size}, G = {args.guess_set_size}, node budget "
        f"{args.draft_tokens + args.num_suffixes * args.phrase_len}"
    )
    versions = "; ".join(
        f"{engine}: " + ", ".join(f"{k} {v}" for k, v in metas[engine]["versions"].items())
        for engine in args.engines
    )
    weights = fingerprint([p / "model.safetensors" for p in (args.target, args.draft)], "")
    text = (
        "# Tokens per target forward, beside the reference implementation\n\n"
        f"Settings: {settings}.\n\n{NOTES}\n## Prompts that do not loop\n\n{table(plain)}\n"
        f"## Prompts that loop\n\n{table(looping)}\n"
        "## How it was made\n\n"
        f"- Command: `{command}`\n- Commit: {commit}\n- Hardware: {machine['hardware']}\n"
        f"- Versions: {versions}\n- Weights (sha256 of both files, 16 digits): {weights}\n"
        f"- Prompt files (name, size, sha256): {'; '.join(files.values())}\n"
        "- Rows per prompt: [reference.jsonl](reference.jsonl); figures: "
        "[reference.json](reference.json)\n"
    )
    (args.out / "reference.md").write_text(text)
    (args.out / "reference.json").write_text(
        json.dumps(
            {
                "command": command,
                "commit": commit,
                "hardware": machine["hardware"],
                "weights": weights,
                "prompts": files,
                "runs": {
                    engine: {
                        "versions": meta["versions"],
                        "settings": {k: v for k, v in meta["settings"].items() if k not in SHOWN},
                    }
                    for engine, meta in metas.items()
                },
                "not_looping": plain,
                "looping": looping,
            },
            indent=1,
        )
        + "\n"
    )
    (args.out / "reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in detail))
    print(text)


if __name__ == "__main__":
    main()
