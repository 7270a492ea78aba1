"""Which blocks hold draft KV, when requests share some as a cached prefix."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_ouroboros.draft.kv_cache import CatchUp, DraftCache

SIZE = 4


class Batch:
    """A runner's batch of rows with these blocks, and a draft cache on it."""

    def __init__(self, *blocks: list[int], max_rows: int = 64) -> None:
        self.state = SimpleNamespace(cached=np.zeros(len(blocks), np.int32))
        self.forwards: list[tuple] = []
        draft = SimpleNamespace(kv_cache_gid=0, max_len=100)
        drafting = SimpleNamespace(state=self.state)
        self.cache = DraftCache(draft, drafting, max_rows, lambda *args: self.forwards.append(args))
        self.cache.allocate(2001)
        self.put(*blocks)

    def put(self, *blocks: list[int]) -> None:
        ids = np.full((len(blocks), max(map(len, blocks)) + 2), 99, np.int32)
        for row, its in enumerate(blocks):
            ids[row, : len(its)] = its
        table = SimpleNamespace(
            block_size=SIZE,
            num_blocks_per_row=np.array([len(its) for its in blocks], np.int32),
            block_table=SimpleNamespace(np=ids),
        )
        batch = SimpleNamespace(block_table=[table], req_ids=[str(r) for r in range(len(blocks))])
        self.runner = SimpleNamespace(input_batch=batch)

    def wrote(self, *ranges: tuple[int, int]) -> None:
        """The target wrote these positions of each row."""
        self.runner.input_batch.num_computed_tokens_cpu = np.array([start for start, _ in ranges])
        self.runner.scheduled_tokens = {str(r): e - s for r, (s, e) in enumerate(ranges)}
        self.cache.invalidate(self.runner)

    def read(self, row: int, cached: int, known: int) -> None:
        """The draft model knows so many tokens of a row, of which ``known`` are text."""
        self.state.cached[row] = cached
        self.cache.mark_complete(self.runner, [CatchUp(row, row, known)])

    def prefix(self, row: int, computed: int) -> int:
        return self.cache.prefix(self.runner, row, computed)


@pytest.mark.parametrize(
    "cached, known, expected",
    [(12, 13, 12), (11, 12, 8), (3, 12, 0), (0, 9, 0), (14, 8, 8)],
)
def test_a_second_request_knows_what_the_first_one_read(cached, known, expected) -> None:
    """Whole blocks count, and of a chain beyond the text nothing."""
    batch = Batch([5, 6, 7, 8])
    batch.wrote((0, 13))
    assert batch.prefix(0, 12) == 0
    batch.read(0, cached, known)
    batch.put([5, 6, 7, 9])  # another request, whose first three blocks vLLM had cached
    assert batch.prefix(0, 12) == expected


def test_a_prefix_that_ends_inside_a_block() -> None:
    batch = Batch([5, 6])
    batch.read(0, 8, 9)
    assert [batch.prefix(0, n) for n in (1, 4, 5, 7, 8)] == [1, 4, 5, 7, 8]


def test_a_block_that_is_written_again_is_unknown() -> None:
    batch = Batch([5, 6, 7])
    batch.read(0, 12, 13)
    batch.put([7, 6, 2000])  # 7 has gone to another request, 6 is shared by accident of the test
    batch.wrote((0, 3))
    assert batch.prefix(0, 12) == 0
    batch.put([5, 6, 7])
    assert batch.prefix(0, 12) == 8


def test_texts_are_read_in_forwards_of_bounded_size() -> None:
    batch = Batch([1, 2, 3, 4, 5, 6], [7, 8], [9], max_rows=8)
    batch.state.cached[:] = 3, 0, 2
    text = np.arange(3 * 40, dtype=np.int32).reshape(3, 40)
    behind = [CatchUp(0, 0, 14), CatchUp(1, 1, 9), CatchUp(2, 2, 4)]  # the second one has 8 places
    batch.cache.catch_up(batch.runner, behind, text, 2)
    assert batch.state.cached.tolist() == [14, 8, 2]
    seen: list[tuple[int, int]] = []
    for _, forward, tree in batch.forwards:
        slots, rows, tokens, positions, writes, starts, contexts, asked, paths = forward
        assert tree is None and paths is None and not len(asked)
        assert slots.tolist() == rows.tolist()  # here they are the same
        assert len(tokens) <= 8
        assert positions is writes
        for row, first, last, context in zip(rows, starts[:-1], starts[1:], contexts, strict=True):
            assert positions[first] == context
            seen += [(int(row), int(p)) for p in positions[first:last]]
            assert tokens[first:last].tolist() == text[row, positions[first:last]].tolist()
    assert seen == [(0, p) for p in range(3, 14)] + [(1, p) for p in range(8)]
