"""What metrics cost a step: in the worker, the scheduler and the front end, and between them.

    python scripts/bench/bench_metrics.py --out benchmarks/metrics.jsonl

No engine: the plugin's own code on the numbers of a busy one, for some sizes of a batch. The least
of forty passes, in which all take turns; microseconds a step. Adds a row to --out.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_ouroboros.cli.provenance import commit, hardware, versions
from vllm_ouroboros.integration.stat_logger import Carrier, OuroborosStatLogger, attach
from vllm_ouroboros.metrics.counters import Counters
from vllm_ouroboros.metrics.exported import PHASES, Exported
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.drafting import Drafting

STEPS, PASSES = 500, 40
MODEL = SimpleNamespace(model_config=SimpleNamespace(served_model_name="bench"))
Work = Callable[[], Any]


class Numbers:
    """A step's numbers, from the worker to the front end."""

    def __init__(self, batch: int) -> None:
        self.batch, self.counters, self.clock = batch, Counters(), StepClock()
        self.clock.totals = dict.fromkeys(PHASES, 1.0)
        drafting = Drafting(
            PhrasePool(262144, 10, 6), max_requests=32, budget=26, draft_tokens=8, num_suffixes=3,
            window_size=10, max_len=2048,
        )  # fmt: skip
        self.exported = Exported(self.counters, self.clock, drafting, lambda: False)
        self.output: Any = SimpleNamespace()
        self.carrier, self.logger = Carrier(), OuroborosStatLogger(MODEL, [0])
        self.encoder, self.decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)

    def count(self) -> None:
        for _ in range(self.batch):
            self.counters.count_tree([1] * 8 + [2] * 10, [1, 1, 2], 2.5)
            self.counters.steps += 1
            self.counters.emitted_tokens += 4
        for phase in PHASES:
            self.clock.totals[phase] += 1e-3
        attach(self.output, self.exported.read())

    def schedule(self) -> SchedulerStats:
        self.count()
        self.carrier.take(self.output)
        stats = SchedulerStats()
        self.carrier.give(stats)
        return stats

    def send(self) -> SchedulerStats:
        sent = self.encoder.encode(EngineCoreOutputs(scheduler_stats=self.schedule()))
        return self.decoder.decode(sent).scheduler_stats

    def show(self) -> None:
        self.logger.record(self.send(), None)


def microseconds(works: Sequence[Work]) -> list[float]:
    passes = [[timeit.timeit(work, number=STEPS) for work in works] for _ in range(PASSES)]
    return [min(seconds) / STEPS * 1e6 for seconds in zip(*passes, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="file that gets a row")
    args = parser.parse_args()
    row: dict[str, Any] = {"commit": commit(), "hardware": hardware(), "versions": versions()}
    row["microseconds"] = {}
    for batch in (1, 8, 32):
        step = Numbers(batch)
        worker, scheduled, sent, shown = microseconds(
            [step.count, step.schedule, step.send, step.show]
        )
        row["microseconds"][batch] = {
            "worker": round(worker, 1),
            "scheduler": round(scheduled - worker, 1),
            "sent and received": round(sent - scheduled, 1),
            "front end": round(shown - sent, 1),
        }
        print(batch, row["microseconds"][batch])
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
