"""What a pool's file holds, and that nothing else is ever read."""

from __future__ import annotations

import json
import os
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.config import OuroborosConfig
from vllm_ouroboros.phrases import file_rows, pool_format
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import FIRST_HASH, key_of
from vllm_ouroboros.phrases.eviction import WAYS
from vllm_ouroboros.phrases.file_rows import MAX_WIDTH
from vllm_ouroboros.phrases.insertion import insert_text
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_format import FORMAT, tokenizer_hash

from ..helpers.phrase_oracle import times
from ..helpers.pool_files import (
    METADATA,
    VOCAB,
    container,
    cut,
    loaded,
    make,
    ordered,
    small_pool,
    tensors,
)

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
        "times": [1, 1],
        "tokens": [[1, 2, 3, 0], [9, 0, 0, 0]],
    }


def test_a_plugin_that_is_not_installed_has_no_version(path, monkeypatch) -> None:
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(pool_format.metadata, "version", version)
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


def sparse(path: Path, data: bytes, size: int) -> None:
    """A file that begins with data and takes no place on the disk."""
    path.write_bytes(data)
    os.truncate(path, size)


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
    "huge": (lambda path: sparse(path, container(), 2**33), "8589934592 bytes, more than any pool"),
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
    "much width": (
        as_bytes(container(tensors(tokens=np.zeros((2, MAX_WIDTH + 1), np.int32)))),
        "phrases of more than 32 tokens",
    ),
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
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [path.name]
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


def test_phrases_may_be_as_long_as_an_engine_allows() -> None:
    OuroborosConfig(phrase_len=MAX_WIDTH)
    with pytest.raises(ValueError):
        OuroborosConfig(phrase_len=MAX_WIDTH + 1)
    file_rows.check(tensors(tokens=np.zeros((2, MAX_WIDTH), np.int32)), VOCAB)


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
    insert_text(pool.arrays, 0, text, 0, len(text), int(PhraseSource.HISTORY), 1, 2)
    insert_text(pool.arrays, 3, text, 0, len(text), int(PhraseSource.HISTORY), 1, 2)
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


def test_how_often_phrases_were_seen_comes_back(path) -> None:
    pool = small_pool([1, 2], [9], [1, 2], [1], [4])
    pool.insert(8, [5], PhraseSource.WINDOW)
    assert make(path).save(pool)
    again = loaded(path)
    assert times(again) == times(pool) == {(0, 7): [1, 3, 1], (0, 8): [0]}


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


def test_the_hash_is_of_the_pairs_whatever_their_order() -> None:
    vocab = {"a": 0, "b": 1, "\udcff\0\n": 2, "é": 3}
    assert tokenizer_hash(vocab) == tokenizer_hash(dict(reversed(vocab.items())))
    assert len(tokenizer_hash(vocab)) == 64
    int(tokenizer_hash(vocab), 16)
    others = [{}, {"a": 1, "b": 0}, {"a": 0}, {"a": 0, "b": 1, "c": 2}, {'a", 0], ["b': 1}]
    assert len({tokenizer_hash(v) for v in [vocab, {"a": 0, "b": 1}, *others]}) == 7
    assert tokenizer_hash({"a": np.int64(1)}) == tokenizer_hash({"a": 1})
