"""When and how a pool is written: failures, crashes, files of others."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys

import pytest

from vllm_ouroboros.phrases import shared_file
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool

from ..helpers.pool_files import HASH, VOCAB, beside, container, loaded, make, small_pool


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
from vllm_ouroboros.phrases.pool_format import PoolFormat
os.fsync = lambda _: os._exit(9)
pool = PhrasePool(64, 3, 4)
pool.insert(7, [9, 9], 0)
PoolFile(sys.argv[1], PoolFormat(int(sys.argv[2]), sys.argv[3])).save(pool)
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
