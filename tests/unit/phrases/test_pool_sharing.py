"""Engines that share the file of a pool."""

from __future__ import annotations

import fcntl
import subprocess
import sys

import safetensors.numpy

from vllm_ouroboros.phrases import pool_file
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool

from ..helpers.pool_files import VOCAB, beside, loaded, make, small_pool


def test_two_engines_may_share_a_file(path, log) -> None:
    files = make(path), make(path)
    pools = small_pool([1]), small_pool([2])
    for turn in range(4):
        assert files[turn % 2].save(pools[turn % 2])
        both = set(loaded(path).lookup(7))
        assert both == ({(1,), (2,)} if turn else {(1,)})
    assert [files[1].take_in(pools[1]), files[1].take_in(pools[1])] == [1, 0]
    assert pools[1].lookup(7) == [(1,), (2,)]
    assert pools[0].lookup(7) == [(1,)], "what it has not taken in"
    assert log.warnings == []
    assert beside(path) == [path]


def test_what_others_save_is_taken_in_though_nothing_was_inserted(path, monkeypatch) -> None:
    monkeypatch.setattr(pool_file, "ROWS_AT_ONCE", 8)
    mine, pool, other = make(path), small_pool([1]), make(path)
    mine.save(pool)
    assert not mine.save_in_background(pool)
    many = PhrasePool(2**14, 3, 4)
    for token in range(1, 6000):
        many.insert(token % VOCAB, [token % VOCAB], PhraseSource.PROMPT)
    other.save(many)
    assert mine.save_in_background(pool)
    mine._wait()
    while mine.take_in(pool):
        pass
    stamps, newest = (
        pool.arrays.stamps,
        pool.arrays.keys == many.arrays.keys[many.arrays.stamps.argmax()],
    )
    assert stamps[newest].tolist() == [stamps.max()], "what came last there came last here"
    assert pool.lookup(5) == many.lookup(5)


def test_what_is_left_to_take_in_outlives_the_next_save(path, monkeypatch) -> None:
    monkeypatch.setattr(pool_file, "ROWS_AT_ONCE", 1)
    mine, pool, other, theirs = make(path), small_pool([1]), make(path), small_pool([2])
    mine.save(pool)
    theirs.insert(8, [3], PhraseSource.PROMPT)
    other.save(theirs)
    mine.save(pool)
    assert mine.take_in(pool) == 2
    theirs.insert(9, [4], PhraseSource.PROMPT)
    other.save(theirs)
    mine.save(pool)
    while mine.take_in(pool):
        pass
    assert [len(pool.lookup(key)) for key in (7, 8, 9)] == [2, 1, 1]


def test_what_is_left_to_take_in_stays_in_the_file_of_a_full_pool(path, monkeypatch) -> None:
    monkeypatch.setattr(pool_file, "ROWS_AT_ONCE", 1)
    mine, pool = make(path), small_pool([1], [2], [3])  # as many as a key can have
    mine.save(pool)
    make(path).save(small_pool([4], [5], [6]))
    for _ in range(2):
        assert mine.save(pool)
        assert {(3,), (6,)} < set(loaded(path).lookup(7)), "what either used last"
    while mine.take_in(pool):
        pass
    assert (6,) in pool.lookup(7)


def test_an_engine_without_phrases_takes_in_those_of_others(path) -> None:
    mine, pool = make(path), PhrasePool(64, 3, 4)
    assert mine.load(pool) == 0
    assert make(path).save(small_pool())
    assert mine.save_in_background(pool)
    mine._wait()
    assert mine.take_in(pool) == 1
    assert pool.lookup(7) == [(1, 2, 3)]


def test_a_fresh_start_forgets_what_the_file_has(path) -> None:
    mine, pool = make(path), small_pool([1])
    mine.save(pool)
    pool.clear()
    pool.insert(7, [2], PhraseSource.PROMPT)
    mine.start_over()
    mine.save(pool)
    assert loaded(path).lookup(7) == [(2,)]
    pool.insert(7, [3], PhraseSource.PROMPT)
    mine.save(pool)
    assert loaded(path).lookup(7) == [(3,), (2,)]


def test_a_save_does_not_wait_for_ever_for_another_one(path, log, monkeypatch) -> None:
    monkeypatch.setattr(pool_file, "LOCK_TIMEOUT_S", 0.05)
    file, pool = make(path), small_pool()
    with (path.parent / f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not file.save(pool)
    assert "another process holds" in log.warnings[0]
    assert file.close(pool), "nothing is lost"
    assert loaded(path).lookup(7) == [(1, 2, 3)]


WRITER = """
import sys
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_file import PoolFile
from vllm_ouroboros.phrases.pool_format import PoolFormat
path, first = sys.argv[1], int(sys.argv[2])
file, pool = PoolFile(path, PoolFormat(4096, "same")), PhrasePool(4096, 4, 4)
file.load(pool)
for turn in range(12):
    for token in range(first + 100 * turn, first + 100 * turn + 100):
        pool.insert(token, [token, 7], PhraseSource.PROMPT)
    while not file.save(pool):  # another one may hold the lock for too long
        pass
"""


def test_engines_that_write_at_once_lose_nothing_of_each_other(path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(first)])
        for first in (0, 1200, 2400)
    ]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    rows = safetensors.numpy.load_file(path)
    assert sorted(rows["keys"].tolist()) == [*range(3600)]
    assert rows["tokens"][:, 0].tolist() == rows["keys"].tolist()
