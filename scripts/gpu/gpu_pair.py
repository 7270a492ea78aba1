"""Tokens/s of a pair with the cost of 8 B and 1 B parameters, beside vanilla and vLLM's own ways.

    python scripts/gpu/gpu_pair.py --out build/gpu/pair.jsonl

Inflates the shipped pair (scripts/inflate: random weights that say the same, 17 GB), then runs
`vllm-ouroboros bench` at each batch size and prints what came out: the rows are bench's own, so
a run that is cut short keeps those of the batch sizes it finished. Acceptance is the shipped
pair's, which is no measure of a real model's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_compare import stdlib_texts
from gpu_info import require_cuda

ROOT = Path(__file__).resolve().parents[2]


def bench(folder: Path, batch: int, out: Path, methods: str, tokens: int) -> list[str]:
    """The command that measures one batch size with the models and prompts of a folder."""
    prompts = 6 if batch == 1 else 2 * batch
    return [
        sys.executable, "-m", "vllm_ouroboros.cli.main", "bench",
        "--model", str(folder / "target"), "--draft-model", str(folder / "draft"),
        "--prompts", str(folder / "prompts.jsonl"), "--limit", str(prompts),
        "--methods", methods, "--draft-tokens", "3", "--batch", str(batch),
        "--max-tokens", str(tokens), "--rounds", "1", "--alive", "2", "--plain", "--out", str(out),
    ]  # fmt: skip


def speeds(out: Path) -> dict[str, dict[str, float]]:
    """Tokens/s over vanilla's, by batch size and method, of the rows that are there."""
    found: dict[str, dict[str, float]] = {}
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    runs = [row for row in rows if row.get("kind") == "run"]
    for row in runs:
        vanilla = [
            one["tokens_per_second"]
            for one in runs
            if one["method"] == "vanilla" and one["batch"] == row["batch"]
        ]
        name = " ".join(filter(None, (row["method"], row["setting"])))
        if vanilla:
            ratio = row["tokens_per_second"] / vanilla[0]
            found.setdefault(f"batch {row['batch']}", {})[name] = round(ratio, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu/pair.jsonl"))
    parser.add_argument("--preset", default="8b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--methods", default="draft_model,ouroboros-cold")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--any-device", action="store_true", help="run without CUDA as well")
    args = parser.parse_args()
    if not args.any_device:
        require_cuda()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.unlink(missing_ok=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        inflate = ROOT / "scripts" / "inflate" / "inflate.py"
        subprocess.run(
            [sys.executable, str(inflate), "--preset", args.preset, "--out", folder], check=True
        )
        prompts = [json.dumps({"prompt": text}) for text in stdlib_texts()]
        (Path(folder) / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
        for batch in args.batches:
            part = args.out.with_suffix(f".{batch}.jsonl")
            command = bench(Path(folder), batch, part, args.methods, args.tokens)
            wrong += subprocess.run(command).returncode == 1
            if part.exists():
                with args.out.open("a") as all_rows:
                    all_rows.write(part.read_text())
                part.unlink()
            print(json.dumps({"judgments": speeds(args.out)}), flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
