"""Saves of a pool that a thread writes while the engine goes on."""

from __future__ import annotations

import threading

import safetensors.numpy

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_file import SAVE_INTERVAL_S

from ..helpers.pool_files import loaded, make, small_pool


class Gate:
    """Holds every write until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.opened, write = threading.Event(), safetensors.numpy.save

        def save(*args):
            assert self.opened.wait(60)
            return write(*args)

        monkeypatch.setattr(safetensors.numpy, "save", save)


def test_a_background_save_writes_what_was_there_when_it_was_called(path, monkeypatch) -> None:
    gate, file, pool = Gate(monkeypatch), make(path), small_pool()
    assert file.save_in_background(pool)
    for array in (pool.arrays.tokens, pool.arrays.lengths, pool.arrays.stamps):
        array.fill(1)
    pool.clear()
    gate.opened.set()
    assert not file.close(pool)  # insertions are the same, so that is the thread's file
    assert loaded(path).lookup(7) == [(1, 2, 3)]


def test_background_saves_do_not_pile_up(path, monkeypatch) -> None:
    gate, file, pool = Gate(monkeypatch), make(path), small_pool()
    assert file.save_in_background(pool)
    pool.insert(7, [4], PhraseSource.PROMPT)
    assert not file.save_in_background(pool)
    assert not path.exists()
    gate.opened.set()
    assert file.close(pool)
    assert loaded(path).lookup(7) == [(4,), (1, 2, 3)]
    pool.insert(7, [5], PhraseSource.PROMPT)
    assert file.save_in_background(pool)  # the next one starts again
    assert not file.close(pool)
    assert loaded(path).lookup(7) == [(5,), (4,), (1, 2, 3)]


def test_a_save_comes_after_the_one_in_the_background(path, monkeypatch) -> None:
    gate, file, pool = Gate(monkeypatch), make(path), small_pool()
    assert file.save_in_background(pool)
    pool.insert(7, [4], PhraseSource.PROMPT)
    threading.Timer(0.05, gate.opened.set).start()
    assert file.save(pool)
    assert loaded(path).lookup(7) == [(4,), (1, 2, 3)]


def test_a_fresh_start_forgets_what_a_save_in_the_background_reads(path, monkeypatch) -> None:
    file, pool, other = make(path), small_pool([1]), make(path)
    assert file.save(pool)
    assert other.save(small_pool([2]))
    gate = Gate(monkeypatch)
    pool.insert(7, [3], PhraseSource.PROMPT)
    assert file.save_in_background(pool)
    pool.clear()
    threading.Timer(0.05, gate.opened.set).start()
    file.start_over()
    assert file.take_in(pool) == 0
    pool.insert(7, [4], PhraseSource.PROMPT)
    assert file.save(pool)
    assert loaded(path).lookup(7) == [(4,)]


def test_without_a_thread_the_save_is_put_off(path, log, monkeypatch) -> None:
    def start(_):
        raise RuntimeError("can't start new thread")

    file, pool = make(path), small_pool()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert not file.save_in_background(pool)
    [warning] = log.warnings
    assert "can't start new thread" in warning
    assert file.close(pool)


def test_saves_are_due_at_intervals(path) -> None:
    now = 1000.0
    file, pool = make(path, clock=lambda: now), PhrasePool(64, 3, 4)
    file.load(pool)
    assert not file.due()
    now += SAVE_INTERVAL_S - 1
    assert not file.due()
    now += 1
    assert file.due()
    assert not file.save_in_background(pool)  # unchanged, but it was looked at
    assert not file.due()
    pool.insert(7, [4], PhraseSource.PROMPT)
    now += SAVE_INTERVAL_S
    assert file.due()
    assert file.save_in_background(pool)
    assert not file.due()
    assert not file.close(pool)
    assert path.exists()
