"""A checked benchmark: which methods run, on what, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_ouroboros.cli.bench.engine import EngineSpec
from vllm_ouroboros.cli.bench.methods import Method
from vllm_ouroboros.cli.bench.rows import Cell, Load

MIN_BATCHED_TOKENS = 2048
SERVER_SEATS = 32  # requests that a server runs at a time, at least


@dataclass(frozen=True)
class Plan:
    """A checked benchmark; lengths in tokens, ``timeout`` in seconds."""

    model: str
    draft_model: str | None
    methods: tuple[Method, ...]
    prompts: tuple[str, ...]
    others: tuple[str, ...]
    loads: tuple[Load, ...]
    rounds: int
    max_tokens: int
    max_model_len: int
    dtype: str
    enforce_eager: bool
    alive: int
    timeout: float
    out: Path
    ignore_eos: bool = False

    def engine(self, method: Method, *, server: bool = False) -> EngineSpec:
        """What a method's engine is started with: the same for all but the method itself."""
        seats = max(load.batch or 1 for load in self.loads)
        seats = max(seats, SERVER_SEATS) if server else seats
        rows = max(m.rows for m in self.methods)
        return EngineSpec(
            model=self.model,
            dtype=self.dtype,
            speculative=method.speculative,
            ouroboros=method.ouroboros,
            max_model_len=self.max_model_len,
            max_num_seqs=seats,
            max_num_batched_tokens=max(MIN_BATCHED_TOKENS, seats * rows),
            enforce_eager=self.enforce_eager,
        )

    def fill(self, cell: Cell) -> tuple[str, ...]:
        """The prompts that fill the pool of a cell's engine before a run is timed."""
        if cell.method.pool == "seen":
            return self.prompts[: cell.load.prompts]
        return self.others if cell.method.pool == "warm" else ()


def visits(methods: Sequence[Method], rounds: int) -> Iterator[tuple[int, Method]]:
    """Round and method, in the order of the runs: each round starts one method later."""
    for number in range(rounds):
        first = number % max(1, len(methods))
        for method in [*methods[first:], *methods[:first]]:
            yield number, method
