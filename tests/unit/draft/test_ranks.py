"""The first rank decides, the others do as it says."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest

from vllm_ouroboros.draft.ranks import FirstRankFailed, Ranks


class Group:
    """A rank's view of two ranks that share a queue."""

    world_size = 2

    def __init__(self, rank: int, queue: deque) -> None:
        self.rank_in_group, self.queue = rank, queue

    def broadcast_object(self, sent=None):
        if self.rank_in_group == 0:
            self.queue.append(sent)
            return sent
        return self.queue.popleft()


def pair() -> tuple[Ranks, Ranks]:
    queue: deque = deque()
    first, second = (Ranks(Group(rank, queue)) for rank in (0, 1))
    assert (first.leads, first.follows, second.leads, second.follows) == (True, False, False, True)
    return first, second


def test_orders_are_done_in_turn_until_the_end() -> None:
    first, second = pair()
    done: list[tuple] = []
    with first.deciding():
        first.tell("one", 1)
        first.tell("two", 2, "b")
        first.end("trees", 3)
    orders = {name: lambda *what, name=name: done.append((name, *what)) for name in ("one", "two")}
    assert second.follow(orders) == ("trees", 3)
    assert done == [("one", 1), ("two", 2, "b")]


def test_a_rank_that_fails_ends_the_others() -> None:
    first, second = pair()
    with pytest.raises(ValueError, match="a bad tree"), first.deciding():
        raise ValueError("a bad tree")
    with pytest.raises(FirstRankFailed, match=r"rank 0 failed while it drafted.*a bad tree"):
        second.follow({})


def test_orders_of_a_step_that_a_rank_left_are_not_taken_for_anothers(caplog) -> None:
    first, second = pair()
    with first.deciding():
        first.tell("one")
        first.end("trees of step 1")
    with pytest.raises(SystemExit):  # whatever fails in the middle of it
        second.follow({})
    assert "rank 1 failed and ends the engine" in caplog.text
    assert "KeyError: 'one'" in caplog.text
    with first.deciding():
        first.end("trees of step 2")
    with pytest.raises(SystemExit):
        second.follow({})
    assert "rank 1 is in step 2 of drafting and rank 0 in step 1" in caplog.text


def test_only_a_rank_that_follows_ends_its_process(caplog) -> None:
    """The error of the first one is vLLM's to tell."""
    first, second = pair()
    with pytest.raises(SystemExit), second.ending_engine():
        raise MemoryError("no room for logits")
    assert "no room for logits" in caplog.text
    for error, ranks in ((MemoryError, first), (OSError, Ranks()), (FirstRankFailed, second)):
        with pytest.raises(error), ranks.ending_engine():
            raise error


@pytest.mark.parametrize("group", [None, SimpleNamespace(world_size=1)])
def test_a_rank_alone_tells_nobody(group) -> None:
    ranks = Ranks(group)
    assert not ranks.leads
    assert not ranks.follows
    ranks.tell("forward")
    ranks.end()
