"""A checked benchmark: which methods run, on what, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_ouroboros.cli.bench.engine import EngineSpec, Prompt
from vllm_ouroboros.cli.bench.methods import Method
from vllm_ouroboros.cli.bench.rows import Cell, Load

MIN_BATCHED_TOKENS = 2048
SERVER_SEATS = 32  # requests that a server runs at a time, at least


@dataclass(frozen=True)
class Plan:
    """A checked benchmark; lengths in tokens, ``timeout`` in seconds.

    Attributes:
        prompts: that are measured.
        others: that fill a warm pool.
        tasks: of each prompt, what kind of task it is; empty for plain prompts.
        later: of each prompt, what the user says after the answer, turn by turn; see `conversed`.
    """

    model: str
    draft_model: str | None
    methods: tuple[Method, ...]
    prompts: tuple[Prompt, ...]
    others: tuple[Prompt, ...]
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
    prefix_caching: bool = False
    tasks: tuple[str, ...] = ()
    later: tuple[tuple[str, ...], ...] = ()
    head: str | None = None
    tensor_parallel_size: int = 1

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
            prefix_caching=self.prefix_caching,
            tensor_parallel_size=self.tensor_parallel_size,
        )

    def conversed(self, answer: Callable[[tuple[Prompt, ...]], list[str]]) -> Plan:
        """The plan with a prompt for each turn: a later one holds the answers to those before.

        Args:
            answer: texts that follow some prompts. The same for all methods, whose prompts are then
                the same as well.
        """
        grown: list[list[Prompt]] = [[prompt] for prompt in self.prompts]
        for turn in range(max(map(len, self.later), default=0)):
            going = [i for i, later in enumerate(self.later) if len(later) > turn]
            texts = answer(tuple(grown[i][-1] for i in going))
            for i, text in zip(going, texts, strict=True):
                said = grown[i][-1]
                assert not isinstance(said, str)
                more = ("assistant", text), ("user", self.later[i][turn])
                grown[i].append((*said, *more))
        tasks = [t for t, prompts in zip(self.tasks, grown, strict=True) for _ in prompts]
        flat = tuple(prompt for prompts in grown for prompt in prompts)
        return replace(self, prompts=flat, tasks=tuple(tasks), later=())

    def fill(self, cell: Cell) -> tuple[Prompt, ...]:
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
