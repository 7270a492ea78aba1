"""The file of a warm phrase pool: read at start, written now and then and at shutdown.

The file is safetensors: metadata that name the format and the tokenizer, and the rows of
`file_rows`. Engines may share it: a save writes the union of what the engine has and what the file
has (`merging.union`), and hands the engine what others learned. A lock file beside it lets one
engine write at a time; the system takes the lock from a process that dies.

Nothing here raises because of a file; what is wrong is logged, and decoding goes on without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.numpy

from vllm_ouroboros.phrases import file_rows
from vllm_ouroboros.phrases.merging import union, unknown
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.shared_file import locked, replace

FORMAT = "vllm-ouroboros phrase pool"
FORMAT_VERSION = 5
SAVE_INTERVAL_S = 300.0  # between two periodic saves
LOCK_TIMEOUT_S = 2.0  # that a save waits for another engine's
ROWS_AT_ONCE = 4096  # of others' phrases that a step takes in

_MAX_HEADER = 2**20  # bytes; ours takes less than one kB
_FIX = "move it away or set another pool_path"

# vLLM configures the loggers below "vllm" alone: elsewhere its format is not used and info is lost.
logger = logging.getLogger(f"vllm.{__name__}")


class _ForeignError(Exception):
    """A file to leave alone; the message goes on from the path and says what it is."""


def tokenizer_hash(vocab: Mapping[str, int]) -> str:
    """SHA-256 of a tokenizer's vocabulary (token to id), in hex; the order does not matter."""
    pairs = sorted((token, int(i)) for token, i in vocab.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


class PoolFile:
    """The file at one path, for one tokenizer.

    What stands at the path is overwritten only if it is a sound file of this format and of this
    tokenizer, whenever it came there. A new file is readable by its owner alone, for it holds
    pieces of users' texts; the mode of an existing one is kept. ``~`` and symbolic links are
    followed. All token ids are below ``vocab_size``; ``clock`` gives seconds.
    """

    def __init__(
        self, path: str | Path, *, vocab_size: int, tokenizer_hash: str, clock=time.monotonic
    ) -> None:
        # pathlib's own of these two raise, on an unknown user and on a loop of links
        self.path = Path(os.path.realpath(os.path.expanduser(path)))  # noqa: PTH111
        self.vocab_size = vocab_size
        self.tokenizer_hash = tokenizer_hash
        self.saves = self.failures = 0
        """How often it was written, and how often it could not be."""
        self._clock = clock
        self._next = clock() + SAVE_INTERVAL_S
        self._saved = 0  # insertions into the pool that the file knows of
        self._ours: tuple[int, ...] | None = None  # mark of the file last found sound
        self._told = ""  # the last warning, to give it once
        self._thread: threading.Thread | None = None
        self._merges = True
        self._news: dict[str, np.ndarray] | None = None  # phrases of others, not taken in yet

    @classmethod
    def at(cls, path: str | Path) -> PoolFile:
        """The file at a path, for whatever tokenizer it is.

        Raises:
            ValueError: there is no pool's file.
        """
        try:
            with Path(path).open("rb") as opened:
                found = _metadata_of(_header(opened))
            known = found["tokenizer_hash"]  # is shown: nothing that a terminal obeys
            if found["format"] == FORMAT and re.fullmatch("[0-9a-f]{64}", known):
                return cls(path, vocab_size=int(found["vocab_size"]), tokenizer_hash=known)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except (KeyError, ValueError):
            pass
        raise ValueError(f"{path}: is no phrase pool of vllm-ouroboros")

    def rows(self) -> dict[str, np.ndarray]:
        """What the file holds, as `file_rows` describes it.

        Raises:
            ValueError: it cannot be used.
        """
        try:
            return self._read() or {}
        except _ForeignError as error:
            raise ValueError(f"{self.path} {error}") from None

    def put(self, rows: Mapping[str, np.ndarray]) -> None:
        """Replace what the file holds.

        Raises:
            OSError: it cannot be written, or another process is at it.
            ValueError: what stands there is none of ours.
        """
        try:
            with locked(self.path, LOCK_TIMEOUT_S):
                self._refuse_foreign()
                self._put(dict(rows), flush=True)
        except _ForeignError as error:
            raise ValueError(str(error)) from None

    def _put(self, rows: dict[str, np.ndarray], *, flush: bool) -> None:
        data = safetensors.numpy.save(rows, self._metadata())
        # checked at the end, too: a foreign file may have come meanwhile
        self._ours = _mark(replace(self.path, data, self._refuse_foreign, flush=flush))

    def load(self, pool: PhrasePool) -> int:
        """Make the file's phrases the contents of ``pool``; returns how many it then holds.

        They are cut to its β, G and capacity, and those used last are kept; its counts of
        insertions and lookups stay as they are. Without a usable file it is empty.
        """
        pool.clear()
        self._saved = _insertions(pool)
        try:
            tensors = self._read()
        except _ForeignError as error:
            self._warn(f"{error}: starting with no phrases, and the file stays as it is", _FIX)
            return 0
        if tensors is not None:
            file_rows.fill(pool, tensors)
        logger.info("pool_path %s: starting with %d phrases", self.path, len(pool))
        if not os.access(folder := self.path.parent, os.W_OK | os.X_OK):
            why = "no permission to write in" if folder.is_dir() else "there is no directory"
            self._warn(f"cannot be saved: {why} {folder}", "mend that or set another pool_path")
        return len(pool)

    def save(self, pool: PhrasePool, *, flush: bool = True) -> bool:
        """Write the shared phrases; returns whether the file now has them.

        A pool without any is not written: there is nothing to win and a warm file to lose.
        `flush` waits until the disk has the new file before it takes the place of the old one.
        """
        self._wait()
        return self._write(*self._work(pool), flush=flush)

    def due(self) -> bool:
        """Whether it is time for a periodic save."""
        return self._clock() >= self._next

    def save_in_background(self, pool: PhrasePool) -> bool:
        """Copy the shared phrases now and write them in a thread; returns whether it was started.

        It is not if nothing was inserted since the last save and nobody else wrote the file, or if
        the last one is still at work. Either way the next save is due `SAVE_INTERVAL_S` from now.
        """
        self._next = self._clock() + SAVE_INTERVAL_S
        if self._thread and self._thread.is_alive():
            return False
        if _insertions(pool) == self._saved and not self._changed():
            return False
        thread = threading.Thread(target=self._write, args=self._work(pool), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._warn(f"was not written ({error})", "raise the limit of threads")
            return False
        self._thread = thread
        return True

    def take_in(self, pool: PhrasePool) -> int:
        """Put some phrases that others wrote into the pool; returns how many were left to do."""
        news = self._news
        if news is None:
            return 0
        left = len(news["keys"])
        file_rows.fill(pool, {name: rows[:ROWS_AT_ONCE] for name, rows in news.items()})
        rest = {name: rows[ROWS_AT_ONCE:] for name, rows in news.items()}
        self._news = rest if left > ROWS_AT_ONCE else None
        return left

    def start_over(self) -> None:
        """Let the next save forget what the file has, that of others included."""
        self._merges, self._news = False, None

    def close(self, pool: PhrasePool) -> bool:
        """Wait for a running write, then save what changed; returns whether that was written.

        Without a flush: vLLM kills an engine that takes longer than five seconds to end, and a
        busy disk may take that long. The operating system completes the write.
        """
        self._wait()
        return _insertions(pool) != self._saved and self.save(pool, flush=False)

    def _work(self, pool: PhrasePool) -> tuple[tuple[np.ndarray, ...], int, tuple[int, int]]:
        """Arguments of `_write`: the shared phrases, insertions, and the pool's keys and G."""
        arrays = pool.arrays
        return file_rows.snapshot(arrays), _insertions(pool), arrays.lengths.shape

    def _changed(self) -> bool:
        """Whether another engine wrote the file since this one read or wrote it."""
        with suppress(OSError):
            return _mark(self.path.stat()) != self._ours
        return False

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()

    def _warn(self, what: str, fix: str) -> None:
        """Log a warning, unless it was the last one."""
        message = f"pool_path {self.path} {what}; {fix}"
        if message != self._told:
            self._told = message
            logger.warning("%s", message)

    def _read(self) -> dict[str, np.ndarray] | None:
        """The file's tensors, checked; None if there is no file.

        Raises `_ForeignError` if it cannot be used, for whatever reason.
        """
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise _ForeignError("is not a regular file")
            # not mapped: a mapped file that someone shortens meanwhile ends the process
            with self.path.open("rb") as file:
                mark = _mark(os.fstat(file.fileno()))
                header = _header(file)
                self._check_metadata(_metadata_of(header))
                tensors = safetensors.numpy.load(header + file.read())
            file_rows.check(tensors, self.vocab_size)
        except FileNotFoundError:
            return None
        except _ForeignError:
            raise
        except Exception as error:  # no permission, or whatever parsers make of a broken file
            raise _ForeignError(f"is truncated, damaged or unreadable ({error!r:.200})") from error
        self._ours = mark
        return {name: array.copy() for name, array in tensors.items()}

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "plugin_version": _plugin_version(),
            "vocab_size": str(self.vocab_size),
            "tokenizer_hash": self.tokenizer_hash,
        }

    def _check_metadata(self, found: dict[str, str]) -> None:
        """Raises `_ForeignError` unless these are the metadata of a file for us."""
        wanted = self._metadata()
        if found.get("format") != FORMAT:
            raise _ForeignError("is truncated or not a phrase pool of vllm-ouroboros")
        for key in ("format_version", "vocab_size", "tokenizer_hash"):
            if found[key] != wanted[key]:
                what = f"{found[key]!r:.80}, here it is {wanted[key]!r}"
                raise _ForeignError(f"is for another {key.replace('_', ' ')} ({what})")

    def _write(
        self,
        snapshot: tuple[np.ndarray, ...],
        insertions: int,
        room: tuple[int, int],
        *,
        flush: bool = True,
    ) -> bool:
        try:
            tensors = file_rows.rows_of(snapshot, self.vocab_size)
            if not tensors["keys"].size:
                return False
            with locked(self.path, LOCK_TIMEOUT_S):
                changed = self._changed()
                theirs = self._read() if self._merges else None
                if theirs is not None:
                    if changed:
                        self._news = unknown(tensors, theirs)
                    tensors = union(tensors, theirs, *room, news=changed)
                self._refuse_foreign()
                self._put(tensors, flush=flush)
        except _ForeignError as error:
            self.failures += 1
            self._warn(f"{error}: phrases are not saved, and the file stays as it is", _FIX)
            return False
        except Exception as error:  # a full disk, a directory that is gone, ...
            self.failures += 1
            why = getattr(error, "strerror", None) or error
            self._warn(f"was not written ({why})", "what stood there is unchanged")
            return False
        self.saves += 1
        self._saved, self._told, self._merges = insertions, "", True
        return True

    def _refuse_foreign(self) -> None:
        """Raises `_ForeignError` if what stands at the path is not ours to overwrite."""
        with suppress(FileNotFoundError):
            if _mark(self.path.stat()) != self._ours:
                self._read()


@cache
def _plugin_version() -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("vllm-ouroboros")
    return "unknown"


def _header(file: BinaryIO) -> bytes:
    """The start of a safetensors file, up to the tensors."""
    size = file.read(8)
    return size + file.read(min(int.from_bytes(size, "little"), _MAX_HEADER))


def _metadata_of(header: bytes) -> dict[str, str]:
    """What a safetensors header says beside the tensors in strings; nothing if it is none."""
    with suppress(Exception):
        found = json.loads(header[8:])["__metadata__"]
        return {name: value for name, value in found.items() if isinstance(value, str)}
    return {}


def _insertions(pool: PhrasePool) -> int:
    return int(pool.arrays.inserted.sum())


def _mark(status: os.stat_result) -> tuple[int, ...]:
    """What changes whenever a file is written or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
