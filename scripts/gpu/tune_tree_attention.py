"""Measure launch configurations of tree attention on this GPU and write the best to the table.

    python scripts/gpu/tune_tree_attention.py              # into kernels/tuned.json
    python scripts/gpu/tune_tree_attention.py --short --table build/gpu/tuned.json

For each shape the search starts from `launch_config` and changes one field at a time, over and over
until no change is faster. A candidate is timed only if its output agrees with the float64 oracle.
Times are medians of CUDA events around a graph's replay, the L2 cache overwritten between repeats
(`gpu_timing`). Entries of the table for other GPUs or shapes stay. The exit status is 1 if a
candidate's output was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

import torch
from gpu_info import one_line, origin, require_cuda
from gpu_inputs import DTYPES, TOLERANCE, Cell, Inputs
from gpu_timing import Timer

from vllm_ouroboros.kernels import reference, tuned
from vllm_ouroboros.kernels.launch import LaunchConfig, gpu_of
from vllm_ouroboros.kernels.tree_attention import scratch, tree_attention

CHOICES = {  # in the order of what they usually gain
    "num_splits": (1, 2, 4, 8, 16, 32),
    "block_n": (16, 32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4),
    "block_m": (16, 32, 64, 128),
}
SHORT = [Cell("llama-8b", 8192, 8, 27), Cell("llama-8b", 2048, 1, 27)]
FULL = [
    Cell(model, context, batch, nodes)
    for model, context, batch, nodes in product(
        ("llama-8b", "qwen2.5-32b", "llama-70b-tp8"), (1024, 4096, 16384), (1, 4, 16, 64), (27,)
    )
] + [Cell("llama-8b", context, 1, 256) for context in (1024, 4096, 16384)]


class Tuner:
    """Search for one cell; `wrong` holds candidates whose output was not the oracle's."""

    def __init__(self, cell: Cell, timer: Timer, until: float) -> None:
        self.cell, self.timer, self.until = cell, timer, until
        self.inputs = Inputs(cell)
        self.expected = self._oracle()
        heads, _, dim = cell.heads
        most = max(CHOICES["num_splits"])
        self.buffers = scratch(cell.batch * cell.nodes, heads, dim, most, self.inputs.q.device)
        self.times: dict[LaunchConfig, float] = {}
        self.wrong: list[str] = []
        self.failed: list[str] = []

    def _oracle(self) -> torch.Tensor:
        """Expected output in float64, a request at a time: the context may be long."""
        given = self.inputs
        expected = torch.empty(given.q.shape, dtype=torch.float64, device=given.q.device)
        nodes = self.cell.nodes
        for r in range(self.cell.batch):
            rows = slice(r * nodes, (r + 1) * nodes)
            own = given.table[r].long()
            reference.tree_attention(
                given.q[rows].double(), given.k_new[rows].double(), given.v_new[rows].double(),
                given.keys[own].double(), given.values[own].double(),
                torch.arange(len(own), dtype=torch.int32, device=given.q.device)[None],
                given.contexts[r : r + 1], given.starts[:2], given.mask[rows], given.scale,
                expected[rows],
            )  # fmt: skip
        return expected

    def call(self, config: LaunchConfig) -> None:
        given = self.inputs
        tree_attention(
            given.q, given.k_new, given.v_new, given.keys, given.values, given.table,
            given.contexts, given.starts, given.mask, given.scale, given.out,
            max_query_len=self.cell.nodes, max_context_len=self.cell.context, config=config,
            buffers=self.buffers,
        )  # fmt: skip

    def time(self, config: LaunchConfig) -> float:
        """Microseconds; infinite for what does not run or is wrong."""
        if config in self.times:
            return self.times[config]
        self.times[config] = float("inf")
        try:
            self.inputs.out.fill_(float("nan"))
            self.call(config)
            error = (self.inputs.out.double() - self.expected).abs()
            allowed = TOLERANCE[DTYPES[self.cell.dtype]] * (1 + self.expected.abs())
            if not bool((error <= allowed).all()):
                self.wrong.append(f"{config}: error {error.max().item():.2g}")
                return self.times[config]
            self.times[config] = self.timer(lambda: self.call(config)).us
        except Exception as error:
            self.failed.append(f"{config}: {one_line(error)}")
        return self.times[config]

    def search(self) -> LaunchConfig:
        """Best configuration found before the time is up."""
        shape = self.cell.shape()
        best = tuned.default_config(gpu_of(self.inputs.out.device), shape)
        self.default_us = self.time(best)
        improved = True
        while improved:
            improved = False
            for field, values in CHOICES.items():
                for value in values:
                    candidate = best._replace(**{field: value})
                    if candidate.block_m < shape.group or time.monotonic() > self.until:
                        continue
                    if self.time(candidate) < 0.99 * self.time(best):
                        best, improved = candidate, True
        return best


def write(path: Path, entries: list[dict]) -> None:
    """Replace the entries of the same GPU and shape, keep the others."""
    old: list[dict] = []
    if path.exists():
        tuned.read(path)  # refuses what is malformed
        old = json.loads(path.read_text())["entries"]
    new = {(entry["gpu"], *entry["shape"].values()) for entry in entries}
    kept = [entry for entry in old if (entry["gpu"], *entry["shape"].values()) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"entries": kept + entries}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", type=Path, default=tuned.TABLE)
    parser.add_argument("--short", action="store_true", help="two shapes only")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop searching after these")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    require_cuda()
    cells = SHORT if args.short else FULL
    began = time.monotonic()
    timer = Timer(args.repeats)
    about = origin()
    entries, wrong = [], []
    for i, cell in enumerate(cells):
        share = args.seconds * (i + 1) / len(cells)
        try:
            tuner = Tuner(cell, timer, began + share)
            best = tuner.search()
        except Exception as error:
            print(json.dumps({**cell.names(), "error": one_line(error)}), flush=True)
            continue
        wrong += tuner.wrong
        result = {
            "us": round(tuner.times[best], 2),
            "default_us": round(tuner.default_us, 2),
            "candidates": len(tuner.times),
            "wrong": tuner.wrong,
            "failed": tuner.failed,
        }
        print(json.dumps({**cell.names(), **best._asdict(), **result}), flush=True)
        if tuner.times[best] < float("inf"):
            entry = {
                "gpu": about["gpu"],
                "shape": cell.shape()._asdict(),
                "config": best._asdict(),
                "measured": {
                    "us": result["us"],
                    "default_us": result["default_us"],
                    "versions": about["versions"],
                    "commit": about["commit"],
                    "time": about["time"],
                },
            }
            entries.append(entry)
        del tuner
        torch.cuda.empty_cache()
    if entries:
        write(args.table, entries)
    print(f"{len(entries)} of {len(cells)} shapes tuned, {len(wrong)} wrong outputs", flush=True)
    sys.exit(bool(wrong) or not entries)


if __name__ == "__main__":
    main()
