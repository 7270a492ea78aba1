"""When and how a pool is written: failures, crashes, other writers, threads."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.numpy

from vllm_ouroboros.phrases import pool_file, shared_file
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_file import SAVE_INTERVAL_S

from ..helpers.pool_files import HASH, VOCAB, container, loaded, make, small_pool


def beside(path: Path) -> list[Path]:
    """What a file's folder holds, but for its lock."""
    return [one for one in path.parent.iterdir() if one.suffix != ".lock"]


def test_a_missing_directory_is_said_at_start(path, log) -> None:
    path = path.parent / "missing" / path.name
    file, pool = make(path), PhrasePool(64, 3, 4)
    assert file.load(pool) == 0
    [warning] = log.warnings
    assert f"there is no directory {path.parent}" in warning
    pool.insert(7, [1], PhraseSource.PROMPT)
    assert not file.save(pool)
    path.parent.mkdir()
    assert file.close(pool)
    assert loaded(path).lookup(7) == [(1,)]


def test_a_file_in_place_of_the_directory_is_said_at_start(path, log) -> None:
    path.write_text("")
    pool = small_pool()
    assert make(path / "pool").load(pool) == len(pool) == 0
    assert len(log.warnings) == 1


def test_a_directory_that_cannot_be_written_is_said_at_start(path, log, monkeypatch) -> None:
    make(path).save(small_pool())
    monkeypatch.setattr(os, "access", lambda *_: False)
    file, pool = make(path), PhrasePool(64, 3, 4)
    assert file.load(pool) == 1  # a pool to read only still warms
    [warning] = log.warnings
    assert f"no permission to write in {path.parent}" in warning


@pytest.mark.parametrize(
    "target, code",
    [
        ("pathlib.Path.replace", errno.EROFS),
        ("os.fsync", errno.ENOSPC),
        ("tempfile.NamedTemporaryFile", errno.EACCES),
    ],
)
def test_a_failed_write_is_a_warning_and_leaves_nothing(
    path, log, monkeypatch, target, code
) -> None:
    make(path).save(small_pool([1]))
    old, file, pool = path.read_bytes(), make(path), small_pool()

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        assert [file.save(pool), file.save(pool)] == [False, False]
    [warning] = log.warnings
    assert os.strerror(code) in warning
    assert str(path) in warning
    assert beside(path) == [path]
    assert path.read_bytes() == old
    assert file.close(pool)
    assert loaded(path).lookup(7) == [(1, 2, 3)]
    with monkeypatch.context() as patch:  # after a success the same trouble is news
        patch.setattr(target, fail)
        assert not file.save(pool)
    assert len(log.warnings) == 2


CRASH = """
import os, sys
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_file import PoolFile
os.fsync = lambda _: os._exit(9)
pool = PhrasePool(64, 3, 4)
pool.insert(7, [9, 9], 0)
PoolFile(sys.argv[1], vocab_size=int(sys.argv[2]), tokenizer_hash=sys.argv[3]).save(pool)
"""


def test_a_crash_while_writing_leaves_the_old_file(path) -> None:
    file, pool = make(path), small_pool()
    assert file.save(pool)
    old = path.read_bytes()
    command = [sys.executable, "-c", CRASH, str(path), str(VOCAB), HASH]
    child = subprocess.run(command, cwd=path.parent)
    assert child.returncode == 9
    assert path.read_bytes() == old
    assert len(beside(path)) == 2
    assert loaded(path).lookup(7) == [(1, 2, 3)]
    assert file.save(pool)
    assert beside(path) == [path]


def test_the_end_of_an_engine_does_not_wait_for_the_disk(path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waited"))
    assert make(path).close(small_pool())
    assert loaded(path).lookup(7) == [(1, 2, 3)]


def test_what_another_writer_is_at_is_not_swept(path) -> None:
    busy = path.with_name(f".{path.name}.abc{shared_file._TEMP_SUFFIX}")
    alike = path.with_name(f".{path.name}x.abc{shared_file._TEMP_SUFFIX}")  # of another pool
    for other in (busy, alike):
        other.write_text("")
    with busy.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert make(path).save(small_pool())
        assert busy.exists()
    assert make(path).save(small_pool())
    assert set(beside(path)) == {path, alike}


@pytest.mark.parametrize("late", [False, True])
def test_a_foreign_file_that_came_meanwhile_is_kept(path, log, monkeypatch, late) -> None:
    """Between load and save, or even while the new file is being written."""
    make(path).save(small_pool())
    file, pool = make(path), PhrasePool(64, 3, 4)
    assert file.load(pool) == 1
    pool.insert(8, [1], PhraseSource.PROMPT)
    foreign, fsync = container(tokenizer_hash="other"), os.fsync

    def intrude(fd) -> None:
        fsync(fd)
        path.write_bytes(foreign)

    if late:
        monkeypatch.setattr(os, "fsync", intrude)
    else:
        path.write_bytes(foreign)
    assert [file.save(pool), file.close(pool)] == [False, False]
    [warning] = log.warnings
    assert "another tokenizer hash ('other'" in warning
    assert beside(path) == [path]
    assert path.read_bytes() == foreign


def test_a_new_file_is_private_and_an_old_one_keeps_its_mode(path) -> None:
    file = make(path)
    file.save(small_pool())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    file.save(small_pool())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_links_and_the_home_directory_are_followed(path, monkeypatch) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    assert make(link).save(small_pool())
    assert link.is_symlink()
    monkeypatch.setenv("HOME", str(path.parent))
    assert loaded(f"~/{path.name}").lookup(7) == [(1, 2, 3)]


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
path, first = sys.argv[1], int(sys.argv[2])
file, pool = PoolFile(path, vocab_size=4096, tokenizer_hash="same"), PhrasePool(4096, 4, 4)
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


def test_nothing_is_written_when_nothing_changed(path) -> None:
    make(path).save(small_pool())
    status = path.stat()
    file, pool = make(path), PhrasePool(64, 3, 4)
    file.load(pool)
    pool.lookup(7)
    assert [file.save_in_background(pool), file.close(pool)] == [False, False]
    assert path.stat() == status
    pool.insert(7, [4], PhraseSource.PROMPT)
    assert [file.close(pool), file.close(pool)] == [True, False]
    assert loaded(path).lookup(7) == [(4,), (1, 2, 3)]


def test_an_emptied_pool_does_not_replace_a_warm_file(path, log) -> None:
    file, pool = make(path), small_pool()
    file.save(pool)
    old = path.read_bytes()
    pool.insert(7, [4], PhraseSource.PROMPT)
    pool.clear()
    assert not file.close(pool)
    assert path.read_bytes() == old
    assert log.warnings == []


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
