"""Time and bandwidth of tree attention beside a copy, vLLM's attention, FlashAttention and torch.

    python scripts/gpu/bench_tree_attention.py --out build/gpu/attention.jsonl \
        --plot build/gpu/a.png

One JSON row for each cell (model, context, batch, nodes) and kernel: `us`, `gb_s` (the bytes that
must move, once, by that time) and `of_copy` (by the bandwidth of a device-to-device copy, bytes
read and written, measured at start). Rows of other kernels have `ratio`, our time by theirs. What
was not measured has `skipped` or `error` instead. Kernels:

- tree attention: ours, by the tree's mask, over the paged cache;
- vllm triton, flash attention: causal, as many queries, over the same cache;
- torch sdpa, flex_attention: the same mask, over K/V gathered beforehand, which is not timed.
  Ours is compared with sdpa's output; `max_error` is the greatest difference.

Times are medians of CUDA events around the replay of a CUDA graph (`timing` "graph"; "events" where
a call cannot be captured), with the L2 cache overwritten before each: what the host does is not in
them. The share of the copy's bandwidth means little where many rows make a cell bound by compute.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from itertools import product
from pathlib import Path

import torch
from gpu_info import one_line, origin, require_cuda
from gpu_inputs import DTYPES, MODELS, TOLERANCE, Cell, Inputs
from gpu_rivals import RIVALS, SAME_MASK, Missing, ours
from gpu_timing import Timer

from vllm_ouroboros.kernels import tuned
from vllm_ouroboros.kernels.launch import gpu_of

OURS, VLLM = "tree attention", "vllm triton, causal"
SHARE, RATIO = 0.85, 1.15  # aims: of the copy's bandwidth; of vLLM's time
QUICK = [
    Cell(model, context, batch, nodes)
    for context, batch, nodes, model in [
        *product((8192, 32768), (8,), (27,), ("llama-8b", "qwen2.5-32b", "llama-70b-tp8")),
        *product((512, 8192), (1, 64), (27,), ("llama-8b", "llama-70b-tp8")),
        (8192, 8, 64, "llama-8b"),
        (8192, 1, 256, "llama-8b"),
    ]
]


class Bench:
    """Writes a row for each measurement, at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.until = time.monotonic() + args.seconds
        self.table = tuned.read(args.table)
        self.timer = Timer(args.repeats)
        self.copy_gb_s = self.timer.copy_bandwidth()
        self.about = {
            "copy_gb_s": round(self.copy_gb_s, 1),
            "timing_floor_us": round(self.timer.floor(), 2),
            **origin(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        self.file = args.out.open("w")
        self.rows: list[dict] = []

    def row(self, cell: Cell, kernel: str, **values) -> None:
        row = {**cell.names(), "kernel": kernel, **values}
        print(json.dumps(row), flush=True)
        self.rows.append(row)
        self.file.write(json.dumps({**row, **self.about}) + "\n")
        self.file.flush()

    def cell(self, cell: Cell, rivals: list[str]) -> None:
        """Measure ours and the rivals; a failure is a row, the rest goes on."""
        if time.monotonic() > self.until:
            for kernel in (OURS, *rivals):
                self.row(cell, kernel, skipped="out of time")
            return
        free = torch.cuda.mem_get_info()[0]
        # the cache, a copy of its pages while it is made, queries and outputs
        needed = 2 * cell.cache_bytes() + cell.bytes_moved() + 2**29
        if needed > free:
            why = f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free"
            for kernel in (OURS, *rivals):
                self.row(cell, kernel, skipped=why)
            return
        try:
            given = Inputs(cell)
            shape, gpu = cell.shape(), gpu_of(given.out.device)
            config = tuned.nearest(self.table, gpu.name, shape)
            where = "launch_config" if config is None else "table"
            if config is None:
                config = tuned.default_config(gpu, shape)
            call = ours(given, config)
            timing = self.timer(call.run)
        except Exception as error:
            for kernel in (OURS, *rivals):
                self.row(cell, kernel, error=one_line(error))
            return
        result, own = given.out.clone(), timing.us
        used = {"config": config._asdict(), "config_from": where}
        self.row(cell, OURS, **self.speed(cell, timing), **used)
        for kernel in rivals:
            try:
                rival = RIVALS[kernel](given)
                timing = self.timer(rival.run)
                values = {**self.speed(cell, timing), "ratio": round(own / timing.us, 3)}
                if kernel in SAME_MASK:
                    error = (rival.rows(rival.run()).float() - result.float()).abs().max().item()
                    values["max_error"] = float(f"{error:.3g}")
                    values["agrees"] = error <= 2 * TOLERANCE[DTYPES[cell.dtype]]
                self.row(cell, kernel, **values)
            except Missing as error:
                self.row(cell, kernel, skipped=str(error))
            except Exception as error:
                self.row(cell, kernel, error=one_line(error))
            rival = None
            gc.collect()
            torch.cuda.empty_cache()

    def speed(self, cell: Cell, timing) -> dict:
        gb_s = cell.bytes_moved() / timing.us / 1000
        return {
            "us": round(timing.us, 2),
            "gb_s": round(gb_s, 1),
            "of_copy": round(gb_s / self.copy_gb_s, 3),
            "timing": timing.how,
        }

    def flex_last(self, cells: list[Cell]) -> None:
        """Flex compiles for each shape, which takes long: after everything else."""
        kernel = list(RIVALS)[-1]
        known = {
            tuple(row[key] for key in ("model", "context", "batch", "nodes")): row["us"]
            for row in self.rows
            if row["kernel"] == OURS and "us" in row
        }
        for cell in cells:
            own = known.get((cell.model, cell.context, cell.batch, cell.nodes))
            if own is None or time.monotonic() > self.until:
                self.row(cell, kernel, skipped="ours was not timed" if own is None else
                         "out of time")  # fmt: skip
                continue
            try:
                given = Inputs(cell, seed=0)
                timing = self.timer(RIVALS[kernel](given).run)
                ratio = round(own / timing.us, 3)
                self.row(cell, kernel, **self.speed(cell, timing), ratio=ratio)
            except Missing as error:
                self.row(cell, kernel, skipped=str(error))
            except Exception as error:
                self.row(cell, kernel, error=one_line(error))
            given = None
            gc.collect()
            torch.cuda.empty_cache()


def judgments(rows: list[dict]) -> dict:
    """The aims and what came out; None where nothing was measured."""
    long = [
        row["of_copy"]
        for row in rows
        if row["kernel"] == OURS and "of_copy" in row and row["context"] >= 8192
        and row["batch"] == 8
    ]  # fmt: skip
    ratios = [row["ratio"] for row in rows if row["kernel"] == VLLM and "ratio" in row]
    return {
        f"share of cells at {SHARE} of copy bandwidth or above, context >= 8192, batch 8": (
            round(sum(share >= SHARE for share in long) / len(long), 3) if long else None
        ),
        "cells of that share": len(long),
        "least share of copy bandwidth among them": min(long, default=None),
        f"greatest ratio to vLLM's causal kernel (aim: {RATIO} at most)": max(ratios, default=None),
        "cells with that ratio": len(ratios),
        "outputs that differ from torch's": sum(row.get("agrees") is False for row in rows),
        "errors": sum("error" in row for row in rows),
        "our errors": sum("error" in row and row["kernel"] == OURS for row in rows),
        "skipped": sum("skipped" in row for row in rows),
    }


def plot(rows: list[dict], path: Path, gpu: str) -> None:
    """Share of the copy's bandwidth by context, a panel for each batch and number of nodes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if "of_copy" in row]
    panels = sorted({(row["model"], row["batch"], row["nodes"]) for row in timed})
    columns = min(4, max(len(panels), 1))
    lines = max(-(-len(panels) // columns), 1)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, sharey=True
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        own = [row for row in timed if (row["model"], row["batch"], row["nodes"]) == panel]
        for kernel in dict.fromkeys(row["kernel"] for row in own):
            points = sorted((r["context"], r["of_copy"]) for r in own if r["kernel"] == kernel)
            axis.plot(*zip(*points, strict=True), marker="o", label=kernel)
        axis.axhline(SHARE, color="grey", linestyle=":")
        contexts = sorted({row["context"] for row in own})
        axis.set(xscale="log", title="{}, batch {}, {} nodes".format(*panel))
        axis.set_xticks(contexts, labels=map(str, contexts))
        axis.minorticks_off()
        axis.set_xlabel("context, tokens")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of copy bandwidth")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    if panels:
        axes.flat[0].legend(fontsize=6)
    figure.suptitle(gpu)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu/attention.jsonl"))
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help=f"{len(QUICK)} cells only")
    parser.add_argument("--table", type=Path, default=tuned.TABLE, help="tuned configurations")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8192, 16384, 32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--nodes", nargs="+", type=int, default=[8, 27, 64, 256])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e9, help="skip cells after these")
    args = parser.parse_args()
    require_cuda()
    cells = QUICK
    if not args.quick:
        every = product(args.models, args.contexts, args.batches, args.nodes)
        cells = [Cell(*sizes, args.dtype) for sizes in every]
    bench = Bench(args)
    quickly = [kernel for kernel in RIVALS if "flex" not in kernel]
    for cell in cells:
        bench.cell(cell, quickly)
        gc.collect()
        torch.cuda.empty_cache()
    bench.flex_last(cells)
    bench.file.close()
    if args.plot is not None:
        try:
            plot(bench.rows, args.plot, bench.about["gpu"])
        except ImportError as error:
            print(f"no plot: {error}", file=sys.stderr)
    result = judgments(bench.rows)
    for name, value in result.items():
        print(f"{name}: {value}")
    print(json.dumps({"judgments": result}))
    sys.exit(bool(result["our errors"] or result["outputs that differ from torch's"]))


if __name__ == "__main__":
    main()
