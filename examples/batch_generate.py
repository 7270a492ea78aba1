"""Answer rows of files on a Ray cluster, Ouroboros on in every engine: what the command
``vllm-ouroboros batch`` does, as a program to start from.

    pip install 'vllm-ouroboros[ray]'
    python examples/batch_generate.py rows.jsonl answers.jsonl --model TARGET --replicas 1 4

Started again, it answers what has no answer yet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_ouroboros.cli.batch.engines import engine_arguments
from vllm_ouroboros.cli.batch.job import Job, Progress, connect, run
from vllm_ouroboros.cli.inputs import json_object


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("rows", type=Path, help='JSON lines or Parquet with "prompt" or "messages"')
    parser.add_argument("answers", type=Path, help="a .jsonl file or a .parquet folder")
    parser.add_argument("--model", help="target: folder or hub id; default: the shipped one")
    parser.add_argument("--draft-model", help="folder or hub id, or 'none' for phrases alone")
    parser.add_argument("--engine-args", default="{}", metavar="JSON", help="as of vllm.LLM")
    parser.add_argument("--replicas", type=int, nargs=2, default=(1, 1), metavar=("LEAST", "MOST"))
    parser.add_argument("--address", help="of a Ray cluster; default: a new local one")
    options = parser.parse_args()

    # engines of one model may learn from each other: {"pool_path": "/shared/pool.safetensors"}
    ouroboros: dict[str, object] = {}
    target, engine = engine_arguments(
        options.model, options.draft_model, ouroboros,
        json_object(options.engine_args, "--engine-args", '{"max_model_len": 512}'),
    )  # fmt: skip
    connect(options.address)
    job = Job(
        inputs=(options.rows,),
        out=options.answers,
        model=target,
        engine=engine,
        replicas=tuple(options.replicas),
        sampling={"temperature": 0.0, "max_tokens": 256},
    )

    def show(done: Progress) -> None:
        finished = done.before + done.answered + done.failed
        print(f"\r{finished} of {done.total} rows, {done.failed} errors", end="", flush=True)

    run(job, show)
    print()


if __name__ == "__main__":
    main()
