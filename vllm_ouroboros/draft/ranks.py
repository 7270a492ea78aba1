"""The ranks of a tensor-parallel engine: the first one decides, the others do as it says.

Nothing that a decision rests on (clocks, measured costs, pools, the order of sets) need be the same
on two ranks then. What they have in common is what vLLM gives them: the logits of the target, which
every rank has whole, and the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

logger = init_logger(f"vllm.{__name__}")

_DONE, _FAILED = "done", "failed"


class FirstRankFailed(RuntimeError):
    """What a rank that follows says when the first one has failed."""


class Ranks:
    """The ranks as one of them sees them.

    Args:
        group: of vLLM's; None: a rank that is alone.
    """

    def __init__(self, group: GroupCoordinator | None = None) -> None:
        self._group = group if group is not None and group.world_size > 1 else None
        self._step = 0  # of `deciding` and `follow`, the same on all ranks
        self.parted = False
        """Whether this rank failed where the others went on: they wait for it for ever."""

    @classmethod
    def of_engine(cls) -> Ranks:
        """The tensor-parallel ranks of this process's engine."""
        from vllm.distributed import get_tp_group

        return cls(get_tp_group())

    @property
    def follows(self) -> bool:
        """Whether another rank decides."""
        return self._group is not None and self._group.rank_in_group > 0

    @property
    def leads(self) -> bool:
        """Whether other ranks wait for what this one decides."""
        return self._group is not None and self._group.rank_in_group == 0

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """A block of the first rank that gives orders; if it fails, so do the others."""
        self._step += 1
        try:
            yield
        except BaseException as error:
            self.tell(_FAILED, repr(error))
            raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks run at the same time."""
        try:
            yield
        except Exception:
            self.parted = self._group is not None
            raise

    def tell(self, order: str, *what: Any) -> None:
        """Give the other ranks an order; they are in `follow`."""
        if self._group is not None:
            self._group.broadcast_object((self._step, order, what))

    def end(self, *what: Any) -> None:
        """Let the other ranks return from `follow`, with a result."""
        self.tell(_DONE, *what)

    def follow(self, orders: Mapping[str, Callable[..., object]]) -> tuple[Any, ...]:
        """Do as the first rank says until it ends that.

        Args:
            orders: what to call, by order.

        Returns:
            What it said at the end.

        Raises:
            FirstRankFailed: it failed.
            SystemExit: this rank failed, see `ending_engine`.
        """
        with self.ending_engine():
            return self._follow(orders)

    @contextmanager
    def ending_engine(self) -> Iterator[None]:
        """A block after whose failure a rank that follows must not go on.

        vLLM drops errors of ranks that answer nobody, and this one would be a step behind the
        first; so its process ends, which vLLM takes for the end of the engine.

        Raises:
            SystemExit: this rank follows, and failed.
        """
        try:
            yield
        except FirstRankFailed:
            raise
        except Exception as error:
            if not self.follows:
                raise
            logger.exception("Tensor-parallel rank %d failed and ends the engine", self.rank)
            raise SystemExit(1) from error

    @property
    def rank(self) -> int:
        """Of this process, in its group."""
        return self._group.rank_in_group if self._group is not None else 0

    def _follow(self, orders: Mapping[str, Callable[..., object]]) -> tuple[Any, ...]:
        assert self._group is not None
        self._step += 1
        while True:
            step, order, what = self._group.broadcast_object()
            if step != self._step:
                raise RuntimeError(
                    f"tensor-parallel rank {self.rank} is in step {self._step} of drafting and "
                    f"rank 0 in step {step}: an earlier step failed on one of them, see its error"
                )
            if order == _DONE:
                return what
            if order == _FAILED:
                raise FirstRankFailed(f"tensor-parallel rank 0 failed while it drafted: {what[0]}")
            orders[order](*what)
