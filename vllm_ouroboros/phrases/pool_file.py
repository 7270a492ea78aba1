"""The file of a warm phrase pool: read at start, written now and then and at shutdown.

Engines may share it: a save writes the union of what the engine has and what the file has
(`merging.union`), and hands the engine what others learned. A lock file beside it lets one engine
write at a time; the system takes the lock from a process that dies.

Nothing here raises because of a file; what is wrong is logged, and decoding goes on without it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from vllm_ouroboros.phrases import file_rows
from vllm_ouroboros.phrases.merging import union, unknown
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_format import ForeignError, PoolFormat, mark
from vllm_ouroboros.phrases.shared_file import locked, replace

SAVE_INTERVAL_S = 300.0  # between two periodic saves
LOCK_TIMEOUT_S = 2.0  # that a save waits for another engine's
ROWS_AT_ONCE = 4096  # of others' phrases that a step takes in

_FIX = "move it away or set another pool_path"

# vLLM configures the loggers below "vllm" alone: elsewhere its format is not used and info is lost.
logger = logging.getLogger(f"vllm.{__name__}")


class PoolFile:
    """The file at one path, of one format.

    What stands at the path is overwritten only if it is a sound file of this format and of this
    tokenizer, whenever it came there. A new file is readable by its owner alone, for it holds
    pieces of users' texts; the mode of an existing one is kept. ``~`` and symbolic links are
    followed. ``clock`` gives seconds.
    """

    def __init__(self, path: str | Path, form: PoolFormat, *, clock=time.monotonic) -> None:
        # pathlib's own of these two raise, on an unknown user and on a loop of links
        self.path = Path(os.path.realpath(os.path.expanduser(path)))  # noqa: PTH111
        self.form = form
        self.saves = self.failures = 0
        """How often it was written, and how often it could not be."""
        self._clock = clock
        self._next = clock() + SAVE_INTERVAL_S
        self._saved = 0  # insertions into the pool that the file knows of
        self._ours: tuple[int, ...] | None = None  # mark of the file last found sound
        self._told = ""  # the last warning, to give it once
        self._thread: threading.Thread | None = None
        self._merges = True
        self._found: deque[dict[str, np.ndarray]] = deque(maxlen=1)  # of others, by the last write
        self._news: dict[str, np.ndarray] | None = None  # what of it is not taken in yet

    @classmethod
    def at(cls, path: str | Path) -> PoolFile:
        """The file at a path, for whatever tokenizer it is.

        Raises:
            ValueError: there is no pool's file.
        """
        return cls(path, PoolFormat.of(path))

    def rows(self) -> dict[str, np.ndarray]:
        """What the file holds, as `file_rows` describes it.

        Raises:
            ValueError: it cannot be used.
        """
        try:
            return self._read() or {}
        except ForeignError as error:
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
                self._put(rows, flush=True)
        except ForeignError as error:
            raise ValueError(str(error)) from None

    def _put(self, rows: Mapping[str, np.ndarray], *, flush: bool) -> None:
        data = self.form.dump(rows)
        # checked at the end, too: a foreign file may have come meanwhile
        self._ours = mark(replace(self.path, data, self._refuse_foreign, flush=flush))

    def load(self, pool: PhrasePool) -> int:
        """Make the file's phrases the contents of ``pool``; returns how many it then holds.

        They are cut to its β, G and capacity, and those used last are kept; its counts of
        insertions and lookups stay as they are. Without a usable file it is empty.
        """
        pool.clear()
        self._saved = _insertions(pool)
        try:
            tensors = self._read()
        except ForeignError as error:
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
        if self._found:
            self._news = self._found.pop()  # has what was left of the one before, too
        if (news := self._news) is None:
            return 0
        left = len(news["keys"])
        file_rows.fill(pool, {name: rows[:ROWS_AT_ONCE] for name, rows in news.items()})
        rest = {name: rows[ROWS_AT_ONCE:] for name, rows in news.items()}
        self._news = rest if left > ROWS_AT_ONCE else None
        return left

    def start_over(self) -> None:
        """Let the next save forget what the file has, that of others included."""
        self._wait()  # or it would bring back what it read before
        self._merges, self._news = False, None
        self._found.clear()

    def close(self, pool: PhrasePool) -> bool:
        """Wait for a running write, then save what changed; returns whether that was written.

        Without a flush: vLLM kills an engine that takes longer than five seconds to end, and a
        busy disk may take that long. The operating system completes the write.
        """
        self._wait()
        return _insertions(pool) != self._saved and self.save(pool, flush=False)

    def _work(self, pool: PhrasePool) -> tuple[tuple[np.ndarray, ...], int, tuple[int, int], bool]:
        """Arguments of `_write`: the shared phrases, insertions, the pool's keys and G, and whether
        phrases of others are still to be taken in.
        """
        arrays, behind = pool.arrays, self._news is not None or bool(self._found)
        return file_rows.snapshot(arrays), _insertions(pool), arrays.lengths.shape, behind

    def _changed(self) -> bool:
        """Whether another engine wrote the file since this one read or wrote it."""
        with suppress(OSError):
            return mark(self.path.stat()) != self._ours
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
        """The file's rows; None if there is no file.

        Raises `ForeignError` if it cannot be used.
        """
        try:
            rows, self._ours = self.form.read(self.path)
        except FileNotFoundError:
            return None
        return rows

    def _write(
        self,
        snapshot: tuple[np.ndarray, ...],
        insertions: int,
        room: tuple[int, int],
        behind: bool,
        *,
        flush: bool = True,
    ) -> bool:
        try:
            tensors = file_rows.rows_of(snapshot, self.form.vocab_size)
            empty = not tensors["keys"].size
            if empty and not self._changed():
                return False
            with locked(self.path, LOCK_TIMEOUT_S):
                changed = self._changed()
                theirs = self._read() if self._merges else None
                if theirs is not None and changed:
                    self._found.append(unknown(tensors, theirs))
                if empty:
                    return False
                if theirs is not None:
                    tensors = union(tensors, theirs, *room, news=changed or behind)
                self._refuse_foreign()
                self._put(tensors, flush=flush)
        except ForeignError as error:
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
        """Raises `ForeignError` if what stands at the path is not ours to overwrite."""
        with suppress(FileNotFoundError):
            if mark(self.path.stat()) != self._ours:
                self._read()


def _insertions(pool: PhrasePool) -> int:
    return int(pool.arrays.inserted.sum())
