"""A file that several processes replace: one at a time, and always by a complete one."""

from __future__ import annotations

import fcntl
import glob
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMP_SUFFIX = ".ouroboros-tmp"


@contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """A block in which nobody else who asks replaces a file.

    The lock is on a file beside it, and the system takes it from a process that dies. On a file
    system without locks there is none. A new lock file is its owner's alone: who can open it can
    hold the lock.

    Raises:
        TimeoutError: somebody else has it for too long.
    """
    beside = path.with_name(f".{path.name}.lock")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        until = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process holds {beside}") from None
                time.sleep(0.02)
            except OSError:
                break
        yield


def replace(
    path: Path, data: bytes, check: Callable[[], None], *, flush: bool = True
) -> os.stat_result:
    """Put a complete new file in the place of an old one, or of none.

    A writer locks its temporary file, so one that can be locked was left by a crash.

    Args:
        path: of the file.
        data: its new content.
        check: is called just before; what it raises leaves the old file.
        flush: whether to wait until the disk has the new file.

    Returns:
        The new file's status.

    Raises:
        OSError: it cannot be written; the old file stays.
    """
    folder, prefix = path.parent, f".{path.name}."
    for left in folder.glob(glob.escape(prefix) + "*" + _TEMP_SUFFIX):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    with tempfile.NamedTemporaryFile(
        dir=folder, prefix=prefix, suffix=_TEMP_SUFFIX, delete=False
    ) as temp:
        try:
            with suppress(OSError):  # file systems without locks
                fcntl.flock(temp, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # no file yet, or file systems without modes
                os.fchmod(temp.fileno(), stat.S_IMODE(path.stat().st_mode))
            temp.write(data)
            temp.flush()
            if flush:
                os.fsync(temp.fileno())
            check()
            Path(temp.name).replace(path)
            return os.fstat(temp.fileno())
        finally:
            Path(temp.name).unlink(missing_ok=True)
