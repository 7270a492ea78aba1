"""All checks and benchmarks that need a GPU, one after another; run it by scripts/gpu/gpu_check.sh.

Writes `summary.json`, `log.txt` and the steps' own files into the output folder. A step that fails
or runs too long is reported there, and the rest goes on. The exit status is 1 if a step failed.
Benchmarks check what they time: they fail if an output was wrong or ours did not run, but neither
because they ran out of time nor for what the times are.
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
LEAST_S = 15  # no step is started for less
NOT_INSTALLED = 77  # exit status of a step that lacks a package
SMALL = (  # a few launches of each kernel: they run many times slower under the sanitizer
    "test_padded_requests or test_buffers or test_a_window_spares or test_a_walk_that_crosses or "
    "test_rows_of_one_depth or test_alignment or test_requests_with_and_without or 33-2"
)


@dataclass
class Step:
    """One command."""

    name: str
    command: list[str]
    limit_s: float
    benchmark: bool  # then running out of time is no failure of correctness
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
    """In the order of what matters most: the time may run out."""
    script = [sys.executable, str(Path(__file__).resolve().parent)]
    tools = missing("pytest", "hypothesis", "numba")
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
        Step("kernels against their oracles", pytest(*workers, str(TESTS)),
             170 if workers else 250, False, tools, {"PYTHONSAFEPATH": "1"}),
        Step("engines", [script[0], f"{script[1]}/gpu_engine.py", "--out",
             str(out / "engine.jsonl"), "--seconds", "175"], 190, False,
             missing("vllm", "tokenizers")),
        Step("tune", [script[0], f"{script[1]}/tune_tree_attention.py", "--short", "--seconds",
             "40", "--table", str(out / "tuned.json")], 60, True),
        Step("tree attention's speed", [script[0], f"{script[1]}/bench_tree_attention.py",
             "--quick", "--seconds", "50", "--out", str(out / "attention.jsonl"), "--plot",
             str(out / "attention.png")], 75, True),
        Step("memcheck", [*checked, "--tool", "memcheck", *pytest(str(TESTS), "-k", SMALL)], 60,
             False, sane, plain),
        # it sees shared memory only; what the kernel moves in global memory, its tests compare
        Step("racecheck of kv_compact", [*checked, "--tool", "racecheck", *pytest(
             str(TESTS / "test_kv_compact.py"), "-k", "alignment or targets")], 45, False, sane,
             plain),
    ]  # fmt: skip


def run(step: Step, seconds: float, log) -> dict:
    """What came of a step."""
    row: dict = {"step": step.name, "benchmark": step.benchmark}
    if step.missing:
        return {**row, "status": "skipped", "why": step.missing}
    limit = min(step.limit_s, seconds)
    if limit < LEAST_S:
        return {**row, "status": "skipped", "why": "out of time"}
    print(f"== {step.name}: {' '.join(step.command)}", file=log, flush=True)
    began = time.monotonic()
    lines: list[str] = []
    start = log.tell()
    process = subprocess.Popen(
        step.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
        env={**os.environ, **step.environment}, start_new_session=True,
    )  # fmt: skip
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--seconds", type=float, default=470, help="of all steps together")
    args = parser.parse_args()
    require_cuda()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step in hand is ended
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.seconds
    rows: list[dict] = []
    about = origin()
    with (args.out / "log.txt").open("w") as log:
        for step in steps(args.out):
            row = run(step, until - time.monotonic(), log)
            rows.append(row)
            shown = (
                row.get("why") or row.get("last_line") or "".join(row.get("last_lines", [])[-1:])
            )
            print(f"{row['status']:>9}  {step.name}: {shown[:200]}", flush=True)
            failed = [
                one["step"]
                for one in rows
                if one["status"] == "failed"
                or (one["status"] == "timed out" and not one["benchmark"])
            ]
            summary = {**about, "correct": not failed, "failed": failed, "steps": rows}
            (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{args.out / 'summary.json'}: {'correct' if not failed else 'FAILED'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
