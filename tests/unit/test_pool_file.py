"""The file of a warm pool: what comes back, what is refused, and what is never overwritten."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros import pool_file
from vllm_ouroboros.phrases import (
    FIRST_HASH,
    WAYS,
    PhrasePool,
    PhraseSource,
    _first_slot,
    insert_text,
    key_of,
)
from vllm_ouroboros.pool_file import (
    FORMAT,
    FORMAT_VERSION,
    SAVE_INTERVAL_S,
    PoolFile,
    tokenizer_hash,
)

VOCAB = 31
HASH = tokenizer_hash({"a": 0, "b": 1})
METADATA = {
    "format": FORMAT,
    "format_version": str(FORMAT_VERSION),
    "plugin_version": "0",
    "vocab_size": str(VOCAB),
    "tokenizer_hash": HASH,
}


class Log(logging.Handler):
    """Records of the module's logger, whether or not vLLM has configured it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def warnings(self) -> list[str]:
        return [r.getMessage() for r in self.records if r.levelno >= logging.WARNING]


@pytest.fixture
def log():
    handler, level = Log(), pool_file.logger.level
    pool_file.logger.setLevel(logging.INFO)
    pool_file.logger.addHandler(handler)
    yield handler
    pool_file.logger.removeHandler(handler)
    pool_file.logger.setLevel(level)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "pool.safetensors"


def make(path, **changes) -> PoolFile:
    return PoolFile(path, **{"vocab_size": VOCAB, "tokenizer_hash": HASH, **changes})


def small_pool(*phrases: list[int]) -> PhrasePool:
    """A pool of one key, 7."""
    pool = PhrasePool(64, 3, 4)
    for phrase in phrases or ([1, 2, 3],):
        pool.insert(7, phrase, PhraseSource.PROMPT)
    return pool


def loaded(path, **changes) -> PhrasePool:
    pool = PhrasePool(64, 3, 4)
    make(path, **changes).load(pool)
    return pool


def ordered(pool: PhrasePool) -> list[tuple[int, list[tuple[tuple[int, ...], int]]]]:
    """Keys by time of use, each with its phrases and their sources."""
    a = pool.arrays
    slots = np.nonzero(a.keys >= 0)[0]
    return [
        (
            int(a.keys[slot]),
            [
                (tuple(a.tokens[slot, g, : a.lengths[slot, g]].tolist()), int(a.sources[slot, g]))
                for g in range(a.counts[slot])
            ],
        )
        for slot in slots[np.argsort(a.stamps[slots])]
    ]


def cut(keys, pool: PhrasePool):
    """What of `ordered` another pool must hold."""
    slots, guesses, beta = pool.arrays.tokens.shape
    sets: dict[int, list[int]] = {}
    for key, _ in keys:
        sets.setdefault(int(_first_slot(slots, key)), []).append(key)
    kept = {key for members in sets.values() for key in members[-WAYS:]}
    result = []
    for key, phrases in keys:
        if key in kept:
            unique: dict[tuple[int, ...], int] = {}
            for phrase, source in phrases:
                unique.setdefault(phrase[:beta], source)
            result.append((key, list(unique.items())[:guesses]))
    return result


def tensors(**changes) -> dict[str, np.ndarray]:
    """Two rows of a sound file, and what is changed in them."""
    return {
        "keys": np.array([3, 4], np.int32),
        "lengths": np.array([2, 1], np.int32),
        "sources": np.array([0, 3], np.int8),
        "tokens": np.array([[5, 6], [7, 0]], np.int32),
        **changes,
    }


def container(rows=None, **changes) -> bytes:
    return safetensors.numpy.save(tensors() if rows is None else rows, {**METADATA, **changes})


SIZES = st.tuples(st.sampled_from([1, 8, 24, 200]), st.integers(1, 4), st.integers(1, 6))
OPERATIONS = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12),
        st.sampled_from([None, *PhraseSource]),
        st.sampled_from([0, 0, 0, 1, 2**31 - 2]),
    ),
    max_size=30,
)


@given(old=SIZES, new=SIZES, operations=OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_what_was_saved_comes_back_cut_to_the_new_pool(old, new, operations) -> None:
    before, after = PhrasePool(*old), PhrasePool(*new)
    for text, source, scope in operations:
        if source is None:
            before.lookup(text[0], scope)
        elif source == PhraseSource.WINDOW:
            before.insert(text[0], text[1:], source, scope)
        else:
            before.insert_text(text, source, scope)
    shared = [entry for entry in ordered(before) if entry[0] < 2**32]
    after.insert(3, [4], PhraseSource.PROMPT)  # gone after loading
    counts = [a.tolist() for a in (after.arrays.inserted, after.arrays.hits)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pool.safetensors")
        assert make(path).save(before) == bool(shared)
        assert make(path).load(after) == len(after)
    assert ordered(after) == cut(shared, after)
    if old == new:
        assert ordered(after) == shared
    assert [a.tolist() for a in (after.arrays.inserted, after.arrays.hits)] == counts


def test_the_file_says_what_it_is(path) -> None:
    assert make(path).save(small_pool([1, 2, 3], [9]))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {**METADATA, "plugin_version": metadata.version("vllm-ouroboros")}
        rows = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
    assert rows == {
        "keys": [7, 7],
        "lengths": [3, 1],
        "sources": [0, 0],
        "tokens": [[1, 2, 3, 0], [9, 0, 0, 0]],
    }


def test_a_plugin_that_is_not_installed_has_no_version(path, monkeypatch) -> None:
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pool_file.metadata, "version", version)
    assert make(path).save(small_pool())
    assert loaded(path).lookup(7) == [(1, 2, 3)]


def test_no_file_is_no_problem(path, log) -> None:
    file, pool = make(path), PhrasePool(64, 3, 4)
    assert file.load(pool) == 0
    assert log.warnings == []
    assert [r.levelname for r in log.records] == ["INFO"]
    assert str(path) in log.records[0].getMessage()
    assert file.close(pool) is False
    assert not path.exists()


def as_bytes(data: bytes):
    return lambda path: path.write_bytes(data)


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


FOREIGN = {
    "empty": (as_bytes(b""), "truncated"),
    "noise": (as_bytes(np.random.default_rng(0).bytes(4096)), "not a phrase pool"),
    "text": (as_bytes(b"just some notes\n" * 9), "not a phrase pool"),
    "endless header": (as_bytes(header(b"{" * 100, 2**64 - 1)), "not a phrase pool"),
    "nested header": (as_bytes(header(b"[" * 500_000)), "not a phrase pool"),
    "no object": (as_bytes(header(b"3")), "not a phrase pool"),
    "odd metadata": (as_bytes(header(b'{"__metadata__": [1]}')), "not a phrase pool"),
    "only our name": (
        as_bytes(header(json.dumps({"__metadata__": {"format": FORMAT}}).encode())),
        "damaged",
    ),
    "a model": (
        as_bytes(safetensors.numpy.save({"w": np.zeros(9, np.float32)}, {"format": "pt"})),
        "not a phrase pool",
    ),
    "no metadata": (as_bytes(safetensors.numpy.save(tensors())), "not a phrase pool"),
    "tokenizer": (as_bytes(container(tokenizer_hash="0" * 64)), "another tokenizer hash"),
    "vocabulary": (as_bytes(container(vocab_size="32")), "another vocab size ('32'"),
    "older": (as_bytes(container(format_version="1")), "another format version ('1'"),
    "newer": (as_bytes(container(format_version="9")), "another format version ('9'"),
    "odd version": (as_bytes(container(format_version="x\ny")), r"('x\ny'"),
    "directory": (lambda path: path.mkdir(), "not a regular file"),
    "pipe": (lambda path: os.mkfifo(path), "not a regular file"),
    "loop": (lambda path: path.symlink_to(path), "unreadable"),
    "key too large": (
        as_bytes(container(tensors(keys=np.array([3, VOCAB], np.int32)))),
        "keys out of range",
    ),
    "token too large": (
        as_bytes(container(tensors(tokens=np.array([[5, 6], [7, VOCAB]], np.int32)))),
        "tokens out of range",
    ),
    "negative token": (
        as_bytes(container(tensors(tokens=np.array([[5, -6], [7, 0]], np.int32)))),
        "tokens out of range",
    ),
    "phrase too long": (
        as_bytes(container(tensors(lengths=np.array([3, 1], np.int32)))),
        "lengths out of range",
    ),
    "empty phrase": (
        as_bytes(container(tensors(lengths=np.array([2, 0], np.int32)))),
        "lengths out of range",
    ),
    "unknown source": (
        as_bytes(container(tensors(sources=np.array([0, 4], np.int8)))),
        "sources out of range",
    ),
    "wrong type": (as_bytes(container(tensors(keys=np.array([3, 4], np.int64)))), "damaged"),
    "short column": (as_bytes(container(tensors(keys=np.array([3], np.int32)))), "damaged"),
    "flat tokens": (as_bytes(container(tensors(tokens=np.array([5, 6], np.int32)))), "damaged"),
    "deep keys": (as_bytes(container(tensors(keys=np.zeros((2, 1), np.int32)))), "damaged"),
    "no width": (as_bytes(container(tensors(tokens=np.zeros((2, 0), np.int32)))), "damaged"),
    "more": (as_bytes(container(tensors(more=np.zeros(2, np.int32)))), "damaged"),
    "less": (as_bytes(container({"keys": np.zeros(2, np.int32)})), "damaged"),
    "longer": (as_bytes(container() + b"\0"), "damaged"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_ours_is_left_alone(path, log, name) -> None:
    write, message = FOREIGN[name]
    write(path)
    status = path.lstat()
    file, pool = make(path), small_pool()
    assert file.load(pool) == len(pool) == 0
    [warning] = log.warnings
    assert message in warning
    assert warning.startswith(f"pool_path {path} ")
    assert "move it away" in warning
    assert "\n" not in warning
    pool.insert(7, [1], PhraseSource.PROMPT)
    assert not file.save(pool)
    assert file.save_in_background(pool)  # only the thread looks at the file
    assert not file.close(pool)
    assert len(log.warnings) <= 2, "one at start, one for all saves"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    unchanged = path.lstat()
    assert (unchanged.st_ino, unchanged.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    # once it is moved away, phrases are saved
    path.rename(path.with_name("moved"))
    assert file.close(pool)
    assert loaded(path).lookup(7) == [(1,)]


def test_a_sound_file_is_none_of_those(path, log) -> None:
    path.write_bytes(container())
    pool = loaded(path)
    assert ordered(pool) == [(3, [((5, 6), 0)]), (4, [((7,), 3)])]
    assert log.warnings == []


def test_a_file_without_phrases_is_sound(path, log) -> None:
    nothing = {name: array[:0] for name, array in tensors().items()}
    path.write_bytes(container(nothing))
    file, pool = make(path), PhrasePool(64, 3, 4)
    assert file.load(pool) == 0
    pool.insert(7, [1], PhraseSource.PROMPT)
    assert file.close(pool)
    assert log.warnings == []


def test_a_truncated_file_is_left_alone_wherever_it_ends(path, log) -> None:
    assert make(path).save(small_pool([1, 2, 3], [9]))
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 7), 1, 7, 8, 9, len(whole) - 1}:
        path.write_bytes(whole[:length])
        log.records.clear()
        file, pool = make(path), small_pool()
        assert file.load(pool) == len(pool) == 0
        [warning] = log.warnings
        assert "truncated" in warning
        assert not file.save(small_pool([5]))
        assert path.read_bytes() == whole[:length]


@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    end=st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_no_corruption_gets_past_the_vocabulary(flips, end) -> None:
    data = bytearray(container())
    for place, value in flips:
        data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pool.safetensors")
        path.write_bytes(bytes(data[: len(data) - end] if end < 4 else data))
        pool = PhrasePool(64, 3, 4)
        assert make(path).load(pool) == len(pool)
    for key, phrases in ordered(pool):
        assert 0 <= key < VOCAB or FIRST_HASH <= key < 2**32
        for phrase, source in phrases:
            assert 1 <= len(phrase) <= 4
            assert all(0 <= token < VOCAB for token in phrase)
            assert source in list(PhraseSource)


def pair_key(before: int, token: int) -> int:
    return key_of(np.array([before, token], np.int32), 2, 1)


def test_phrases_that_two_tokens_lead_to_come_back(path, log) -> None:
    """With those of single tokens, in their order of use; they stand below zero in the file."""
    pool, text = PhrasePool(64, 3, 4), np.array([5, 6, 7, 5, 6, 9], np.int32)
    insert_text(pool.arrays, 0, text, 0, len(text), int(PhraseSource.HISTORY), 2)
    insert_text(pool.arrays, 3, text, 0, len(text), int(PhraseSource.HISTORY), 2)
    pool.insert(pair_key(8, 9), [1, 2], PhraseSource.WINDOW)
    pool.insert(pair_key(9, 8), [VOCAB], PhraseSource.PROMPT)  # is not saved
    assert make(path).save(pool)
    again = loaded(path)
    shared = [entry for entry in ordered(pool) if entry[0] < 2**32]
    assert ordered(again) == shared[:-1]
    assert again.lookup(pair_key(5, 6)) == [(9,), (7, 5, 6, 9)]
    assert again.lookup(pair_key(8, 9)) == [(1, 2)]
    assert again.lookup(pair_key(9, 8)) == []
    keys = safetensors.numpy.load_file(path)["keys"].tolist()
    assert {key & 0xFFFFFFFF for key in keys if key < 0} == {
        pair_key(*pair) for pair in ((5, 6), (6, 7), (7, 5), (8, 9))
    }
    assert log.warnings == []


def test_ids_outside_the_vocabulary_are_not_saved(path, log) -> None:
    pool = small_pool([1, VOCAB], [2], [3, -1])
    pool.insert(VOCAB, [1], PhraseSource.PROMPT)
    assert make(path).save(pool)
    assert ordered(loaded(path)) == [(7, [((2,), 0)])]
    assert log.warnings == []


def test_only_the_shared_scope_is_saved(path) -> None:
    """Not even in free places of slots that tenants used before."""
    pool, secret = PhrasePool(WAYS, 2, 4), 777_777
    for tenant in range(1, WAYS + 1):
        pool.insert(5, [secret] * 4, PhraseSource.PROMPT, scope=tenant)
        pool.insert(5, [1, secret, secret, secret], PhraseSource.PROMPT, scope=tenant)
    assert not make(path, vocab_size=10**6).save(pool)
    assert not path.exists()
    pool.insert(6, [2], PhraseSource.PROMPT)
    assert make(path, vocab_size=10**6).save(pool)
    assert ordered(loaded(path, vocab_size=10**6)) == [(6, [((2,), 0)])]
    assert secret.to_bytes(4, "little") not in path.read_bytes()


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
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == old
    assert file.close(pool)
    assert loaded(path).lookup(7) == [(1, 2, 3)]
    with monkeypatch.context() as patch:  # after a success the same trouble is news
        patch.setattr(target, fail)
        assert not file.save(pool)
    assert len(log.warnings) == 2


CRASH = """
import os, sys
from vllm_ouroboros.phrases import PhrasePool
from vllm_ouroboros.pool_file import PoolFile
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
    assert len(list(path.parent.iterdir())) == 2
    assert loaded(path).lookup(7) == [(1, 2, 3)]
    assert file.save(pool)
    assert list(path.parent.iterdir()) == [path]


def test_the_end_of_an_engine_does_not_wait_for_the_disk(path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waited"))
    assert make(path).close(small_pool())
    assert loaded(path).lookup(7) == [(1, 2, 3)]


def test_what_another_writer_is_at_is_not_swept(path) -> None:
    busy = path.with_name(f".{path.name}.abc{pool_file._TEMP_SUFFIX}")
    alike = path.with_name(f".{path.name}x.abc{pool_file._TEMP_SUFFIX}")  # of another pool
    for other in (busy, alike):
        other.write_text("")
    with busy.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert make(path).save(small_pool())
        assert busy.exists()
    assert make(path).save(small_pool())
    assert set(path.parent.iterdir()) == {path, alike}


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
    assert list(path.parent.iterdir()) == [path]
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
        assert loaded(path).lookup(7) == pools[turn % 2].lookup(7)
    assert log.warnings == []
    assert list(path.parent.iterdir()) == [path]


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


def test_the_hash_is_of_the_pairs_whatever_their_order() -> None:
    vocab = {"a": 0, "b": 1, "\udcff\0\n": 2, "é": 3}
    assert tokenizer_hash(vocab) == tokenizer_hash(dict(reversed(vocab.items())))
    assert len(tokenizer_hash(vocab)) == 64
    int(tokenizer_hash(vocab), 16)
    others = [{}, {"a": 1, "b": 0}, {"a": 0}, {"a": 0, "b": 1, "c": 2}, {'a", 0], ["b': 1}]
    assert len({tokenizer_hash(v) for v in [vocab, {"a": 0, "b": 1}, *others]}) == 7
    assert tokenizer_hash({"a": np.int64(1)}) == tokenizer_hash({"a": 1})
