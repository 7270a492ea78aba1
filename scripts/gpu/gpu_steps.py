"""Checks and benchmarks that need a GPU, in stages; run it by scripts/gpu/check.sh.

Writes `summary.json`, `log.txt` and the steps' own files into the output folder, and the summary
anew after every step: a run that is cut short tells what it found. A step that fails or runs too
long is reported, and the rest goes on. The exit status is 1 if a step failed. Benchmarks check what
they time: they fail if an output was wrong or ours did not run, but neither because they ran out of
time nor for what the times are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from gpu_info import origin, require_cuda

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "kernels"
STAGES = {1: 235, 2: 295, 3: 355}
"""Seconds of each stage."""
LEAST_S = 10  # no step is started for less
NOT_INSTALLED = 77  # exit status of a step that lacks a package
SMALL = (  # a few launches of each kernel: they run many times slower under the sanitizer
    "test_padded_requests or test_buffers or test_a_window_spares or test_a_walk_that_crosses or "
    "test_rows_of_one_depth or test_alignment or test_requests_with_and_without or 33-2"
)


@dataclass
class Step:
    """One command."""

    stage: int
    name: str
    command: list[str]
    limit_s: float
    benchmark: bool = False  # then running out of time is no failure of correctness
    missing: str = ""  # what it needs and is not there
    environment: dict[str, str] = field(default_factory=dict)


def pytest(*arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider",
        *arguments,
    ]  # fmt: skip


def missing(*packages: str) -> str:
    absent = [name for name in packages if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def steps(out: Path) -> list[Step]:
    """Of each stage, in the order of what tells most: the time may run out."""

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve().parent / name), *arguments]

    tools = missing("pytest", "hypothesis", "numba")
    engine = missing("vllm", "tokenizers")
    # most of the time goes into compiling, which several processes do faster
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    sanitizer = shutil.which("compute-sanitizer")
    sane = tools or ("" if sanitizer else "not installed: compute-sanitizer")
    checked = [
        sanitizer or "compute-sanitizer", "--target-processes", "application-only",
        "--error-exitcode", "99",
    ]  # fmt: skip
    # the allocator's own blocks would hide what is read or written beyond a tensor
    plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONSAFEPATH": "1"}
    return [
        Step(1, "versions", script("gpu_info.py"), 20),
        Step(1, "engines, eager and full graphs", script(
            "gpu_engine.py", "--first", "--out", str(out / "engine.jsonl"), "--seconds", "110"),
            125, missing=engine),
        Step(1, "kernels against their oracles", pytest(*workers, str(TESTS)), 120,
             missing=tools, environment={"PYTHONSAFEPATH": "1"}),
        Step(2, "profile of a step", script("gpu_profile.py", "--out", str(out / "profile.json")),
             45, True, engine),
        Step(2, "tune", script("tune_tree_attention.py", "--short", "--seconds", "25", "--table",
             str(out / "tuned.json")), 40, True),
        Step(2, "tree attention's speed", script(
            "bench_tree_attention.py", "--quick", "--seconds", "30", "--out",
            str(out / "attention.jsonl"), "--plot", str(out / "attention.png")), 45, True),
        Step(2, "8 B pair", script("gpu_pair.py", "--out", str(out / "pair.jsonl")), 200, True,
             engine),
        Step(3, "engines", script(
            "gpu_engine.py", "--out", str(out / "engines.jsonl"), "--seconds", "175"), 190,
            missing=engine),
        Step(3, "memcheck", [*checked, "--tool", "memcheck", *pytest(str(TESTS), "-k", SMALL)],
             90, missing=sane, environment=plain),
        # it sees shared memory only; what the kernel moves in global memory, its tests compare
        Step(3, "racecheck of kv_compact", [*checked, "--tool", "racecheck", *pytest(
             str(TESTS / "test_kv_compact.py"), "-k", "alignment or targets")], 70, missing=sane,
             environment=plain),
    ]  # fmt: skip


def run(step: Step, seconds: float, log) -> dict:
    """What came of a step."""
    row: dict = {"stage": step.stage, "step": step.name, "benchmark": step.benchmark}
    if step.missing:
        return {**row, "status": "skipped", "why": step.missing}
    limit = min(step.limit_s, seconds)
    if limit < LEAST_S:
        return {**row, "status": "skipped", "why": "out of time"}
    print(f"== {step.name}: {' '.join(step.command)}", file=log, flush=True)
    began = time.monotonic()
    lines: list[str] = []
    start = log.tell()
    try:
        process = subprocess.Popen(
            step.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**os.environ, **step.environment}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return {**row, "status": "failed", "exit_status": None, "last_lines": [str(error)]}
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        end(process)
    log.seek(0, os.SEEK_END)
    with Path(log.name).open(errors="replace") as written:
        written.seek(start)
        lines = [line for line in written.read().splitlines() if line.strip()]
    row |= {"seconds": round(time.monotonic() - began, 1), "limit_s": round(limit, 1)}
    row["command"] = " ".join(step.command)
    result = judgments(lines)
    if result is not None:
        row["result"] = result
    if status == 0:
        return {**row, "status": "passed", "last_line": lines[-1] if lines else ""}
    if status == NOT_INSTALLED:
        return {**row, "status": "skipped", "why": lines[-1] if lines else "not installed"}
    row["status"] = "timed out" if status is None else "failed"
    return {**row, "exit_status": status, "last_lines": [line[:300] for line in lines[-15:]]}


def end(process: subprocess.Popen) -> None:
    """End a step and what it left running; it may clean up first."""
    for how, seconds in ((signal.SIGTERM, 8), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(seconds)


def judgments(lines: list[str]) -> dict | None:
    """The last line of the form {"judgments": {...}}."""
    for line in reversed(lines):
        if line.startswith('{"judgments"'):
            return json.loads(line)["judgments"]
    return None


def failures(rows: list[dict]) -> list[str]:
    """Names of the steps that say something is wrong."""
    return [
        row["step"]
        for row in rows
        if row["status"] == "failed" or (row["status"] == "timed out" and not row["benchmark"])
    ]


def told(row: dict) -> list[str]:
    """A few lines about a step, for people."""
    shown = row.get("why") or row.get("last_line") or "".join(row.get("last_lines", [])[-1:])
    lines = [f"{row['status']:>9}  {row['step']}: {row.get('seconds', 0):.0f} s"]
    if "result" not in row or row["status"] != "passed":
        lines[0] += f"  {shown[:160]}"
    for key, value in [*row.get("result", {}).items()][:8]:
        lines.append(f"{'':>11}{key}: {json.dumps(value)[:150]}")
    return lines


def run_stages(wanted: list[Step], budgets: dict[int, float], out: Path, about: dict) -> list[dict]:
    """What came of some steps; the summary is written anew after each."""
    rows: list[dict] = []
    with (out / "log.txt").open("w") as log:
        for stage in sorted({step.stage for step in wanted}):
            until = time.monotonic() + budgets[stage]
            for step in wanted:
                if step.stage != stage:
                    continue
                rows.append(run(step, until - time.monotonic(), log))
                print("\n".join(told(rows[-1])), flush=True)
                summary = {**about, "failed": failures(rows), "steps": rows}
                (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return rows


def stage_of(text: str) -> int:
    """A stage's number."""
    if text not in map(str, STAGES):
        raise argparse.ArgumentTypeError(f"{text!r} is no stage: {', '.join(map(str, STAGES))}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("stages", nargs="*", type=stage_of, metavar="STAGE", help="Default: all.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    args = parser.parse_args()
    require_cuda()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step in hand is ended
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = args.stages or [*STAGES]
    wanted = [step for step in steps(out) if step.stage in stages]
    failed = failures(run_stages(wanted, STAGES, out, origin()))
    print(f"{out / 'summary.json'}: {'FAILED: ' + ', '.join(failed) if failed else 'correct'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
