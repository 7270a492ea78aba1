"""Whole engines on the GPU: the shipped pair with and without Ouroboros, tokens and speed compared.

    python scripts/gpu/gpu_engine.py --out build/gpu/engine.jsonl

Engines are vanilla vLLM, Ouroboros with the draft model ("draft"), the same with trees of the size
that the policy chooses ("adaptive"), with the draft head ("head") and from the phrase pool alone
("pool"); in float32 and bfloat16, eager, with full CUDA graphs (no compilation) and as vLLM would
run them ("default": compiled, piecewise and full graphs). `--first` takes the most telling ones.
Each runs in a process of its own. Some start at a time, and generate one after another once all of
them stand, so that none is timed while another works.

A row for each engine: `tokens_per_s` at batch 1 and 8, `speedup` over vanilla in the same type and
mode, how many outputs are `equal` to vanilla's, `near_ties` and `different`, and the counters of
`vllm_ouroboros.stats`. An output counts as a near-tie if the first token that differs is one of
vanilla's five best there and less than NEAR below its best. In float32 every output must be equal;
in bfloat16 a forward of many rows rounds otherwise than one of a single row, and near-ties pass.
The exit status is 1 if an output was wrong or an engine failed, 77 without vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from gpu_compare import compare, stdlib_prompts
from gpu_info import one_line, origin, require_cuda

NEAR = {"float32": 0.0, "bfloat16": 0.25}  # differences of log-probabilities
MODES = {
    "eager": {"enforce_eager": True},
    "full graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "default": {},
}
NODES, BATCH, ONE_BY_ONE = 26, 8, 4
START_S, GENERATE_S = 120, 45  # for the engines that start together; for each to generate
NOT_INSTALLED = 77


@dataclass(frozen=True)
class Job:
    """One engine."""

    engine: str  # "vanilla", "draft", "adaptive", "head" or "pool"
    dtype: str
    mode: str


FIRST = [  # vanilla before what is compared with it, what matters most first
    *(Job(e, "float32", "full graphs") for e in ("vanilla", "draft", "adaptive")),
    *(Job(e, "float32", "eager") for e in ("vanilla", "draft")),
]
JOBS = [
    *FIRST,
    *(Job(e, "float32", "full graphs") for e in ("head", "pool")),
    *(Job(e, "bfloat16", m) for m in ("full graphs", "eager") for e in ("vanilla", "draft")),
    *(Job(e, d, "default") for d in NEAR for e in ("vanilla", "adaptive", "head")),
]


def child(folder: Path) -> None:
    """One engine: says in a file when it stands, generates when told to, leaves its result."""
    import vllm_ouroboros

    given = json.loads((folder / "job.json").read_text())
    job = Job(**given["job"])
    pair = Path(vllm_ouroboros.__file__).parent / "assets" / "tiny-code"
    extra: dict = {}
    if job.engine != "vanilla":
        # trees of a fixed size, so that the small target's cheap forwards do not argue against them
        options: dict = {"adaptive": job.engine == "adaptive"}
        if job.engine != "pool":
            options["draft_model"] = str(pair / ("head" if job.engine == "head" else "draft"))
        extra = {
            "speculative_config": {
                "model": "vllm_ouroboros.OuroborosProposer",
                "num_speculative_tokens": NODES,
            },
            "additional_config": {"ouroboros": options},
        }
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(pair / "target"), dtype=job.dtype, max_model_len=512, max_num_seqs=BATCH,
        gpu_memory_utilization=0.05, kv_cache_memory_bytes=2**29, enable_prefix_caching=False,
        disable_log_stats=True, **MODES[job.mode], **extra,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in given["prompts"]]
    params = SamplingParams(temperature=0.0, max_tokens=given["max_tokens"])

    def timed(batches: list[list[dict]]) -> tuple[list[list[int]], float]:
        if extra:
            vllm_ouroboros.reset_pool(llm)
        start = time.perf_counter()
        done = [out for batch in batches for out in llm.generate(batch, params, use_tqdm=False)]
        seconds = time.perf_counter() - start
        return [list(out.outputs[0].token_ids) for out in done], seconds

    timed([prompts[:BATCH]])  # compiles
    (folder / "ready").touch()
    sys.stdin.readline()
    single, single_s = timed([[prompt] for prompt in prompts[:ONE_BY_ONE]])
    before = vllm_ouroboros.stats(llm) if extra else {}
    together, together_s = timed([prompts])
    after = vllm_ouroboros.stats(llm) if extra else {}
    result = {
        "single": single,
        "single_s": single_s,
        "together": together,
        "together_s": together_s,
        "stats": {key: after[key] - before[key] for key in after},
        "best": None,
    }
    if not extra:  # what vanilla would have chosen instead
        with_best = SamplingParams(temperature=0.0, max_tokens=given["max_tokens"], logprobs=5)
        outputs = llm.generate(prompts, with_best, use_tqdm=False)
        result["best"] = [
            [{str(token): value.logprob for token, value in place.items()}
             for place in out.outputs[0].logprobs]
            for out in outputs
        ]  # fmt: skip
        result["repeat"] = [list(out.outputs[0].token_ids) for out in outputs]
    (folder / "partial").write_text(json.dumps(result))
    (folder / "partial").rename(folder / "result.json")
    llm.llm_engine.engine_core.shutdown(timeout=10)


class Engine:
    """A child and its files."""

    def __init__(self, job: Job, prompts: list[list[int]], max_tokens: int, root: Path) -> None:
        self.job = job
        self.folder = root / f"{job.engine} {job.dtype} {job.mode}".replace(" ", "-")
        self.folder.mkdir()
        given = {"job": asdict(job), "prompts": prompts, "max_tokens": max_tokens}
        (self.folder / "job.json").write_text(json.dumps(given))
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "2",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it may compile at first use
        }
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child", str(self.folder)], stdin=subprocess.PIPE,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
            )  # fmt: skip

    def wait_for(self, name: str, until: float) -> bool:
        """Whether the child wrote a file before the time is up."""
        path = self.folder / name
        while not path.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                return path.exists()
            time.sleep(0.1)
        return True

    def generate(self, until: float) -> dict:
        """The child's result, or {"error"}."""
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
            if self.wait_for("result.json", until):
                return json.loads((self.folder / "result.json").read_text())
        except (OSError, ValueError):
            pass
        return {"error": self.why("generate")}

    def why(self, what: str) -> str:
        """Why the child did not get so far."""
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error" in line or "error:" in line]
        ended = self.process.poll()
        state = f"exit status {ended}" if ended is not None else "out of time"
        found = errors[0] if errors else lines[-1] if lines else "no output"
        return f"{what}: {state}: {found.strip()[-400:]}"

    def end(self) -> None:
        """End the child's whole process group."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if (self.folder / "result.json").exists():
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run_wave(engines: list[Engine], until: float) -> dict[Job, dict]:
    """Results of engines that start together and generate one after another."""
    results: dict[Job, dict] = {}
    try:
        start_by = min(until, time.monotonic() + START_S)
        standing = [engine for engine in engines if engine.wait_for("ready", start_by)]
        for engine in engines:
            if engine in standing:
                by = min(until, time.monotonic() + GENERATE_S)
                results[engine.job] = engine.generate(by)
            else:
                results[engine.job] = {"error": engine.why("start")}
            engine.end()
    finally:
        for engine in engines:
            if engine.process.poll() is None:
                engine.end()
    return results


def row_of(job: Job, result: dict, vanilla: dict | None) -> dict:
    """What an engine did, beside vanilla in the same type and mode."""
    row: dict = asdict(job)
    if "skipped" in result:
        return {**row, **result}
    if "error" in result:
        return {**row, "error": result["error"], "correct": False}
    speed = {
        "1": sum(map(len, result["single"])) / result["single_s"],
        str(BATCH): sum(map(len, result["together"])) / result["together_s"],
    }
    row["tokens_per_s"] = {batch: round(value, 1) for batch, value in speed.items()}
    row["outputs"] = len(result["together"])
    if job.engine == "vanilla":
        same = sum(a == b for a, b in zip(result["together"], result["repeat"], strict=True))
        return {**row, "equal_when_repeated": same}
    row["stats"] = result["stats"]
    if vanilla is None or "best" not in vanilla:
        return {**row, "error": "no vanilla outputs to compare with", "correct": False}
    row["speedup"] = {
        "1": round(speed["1"] * vanilla["single_s"] / sum(map(len, vanilla["single"])), 3),
        str(BATCH): round(
            speed[str(BATCH)] * vanilla["together_s"] / sum(map(len, vanilla["together"])), 3
        ),
    }
    single = compare(result["single"], vanilla["single"], vanilla["best"], NEAR[job.dtype])
    together = compare(result["together"], vanilla["together"], vanilla["best"], NEAR[job.dtype])
    correct = not single["different"] and not together["different"]
    if job.dtype == "float32":
        correct &= not single["near_ties"] and not together["near_ties"]
    return {**row, **together, "one_by_one": single, "correct": correct}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu/engine.jsonl"))
    parser.add_argument("--seconds", type=float, default=600, help="start nothing after these")
    parser.add_argument("--parallel", type=int, default=max(2, min(7, (os.cpu_count() or 2) // 2)))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--first", action="store_true", help="the most telling engines alone")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child)
        return
    require_cuda()
    if find_spec("vllm") is None:
        print("vLLM is not installed")
        sys.exit(NOT_INSTALLED)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines are ended
    until = time.monotonic() + args.seconds
    about = origin()
    prompts = stdlib_prompts(args.prompts)
    results: dict[Job, dict] = {}
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root, args.out.open("w") as file:
        left = list(FIRST if args.first else JOBS)
        longest = 0.0
        while left:
            wave, left = left[: args.parallel], left[args.parallel :]
            began = time.monotonic()
            if began + 0.8 * longest > until:
                done = {job: {"skipped": "out of time"} for job in wave}
            else:
                try:
                    engines = [Engine(job, prompts, args.max_tokens, Path(root)) for job in wave]
                    done = run_wave(engines, until)
                except Exception as error:
                    done = {job: {"error": one_line(error)} for job in wave}
                longest = max(longest, time.monotonic() - began)
            results |= done
            for job in wave:
                vanilla = results.get(Job("vanilla", job.dtype, job.mode))
                row = row_of(job, done[job], vanilla)
                rows.append(row)
                print(json.dumps(row), flush=True)
                file.write(json.dumps({**row, **about}) + "\n")
                file.flush()
    wrong = [row for row in rows if row.get("correct") is False]
    summary = {
        "engines": len(rows),
        "wrong or failed": len(wrong),
        "skipped": sum("skipped" in row for row in rows),
        "outputs that differ": sum(row.get("different", 0) for row in rows),
        "speedup": {
            f"{row['engine']}, {row['dtype']}, {row['mode']}": row["speedup"]
            for row in rows
            if "speedup" in row
        },
    }
    print(json.dumps({"judgments": summary}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
