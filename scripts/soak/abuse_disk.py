"""The folder of the pool's file on a small file system of its own, and what can go wrong there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from vllm_ouroboros.phrases.pool_file import PoolFile

SIZE_MB = 512
"""Of the file system: a full pool's file takes 90 MB, and a save writes a new one beside it."""


class UnavailableError(Exception):
    """A thing cannot be broken here; the message says why."""


class PoolDisk:
    """A folder for the pool's file, on a tmpfs where one may be mounted.

    Args:
        folder: where it is made.

    Attributes:
        path: of the pool's file.
        missing: why there is no tmpfs; empty if there is one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._kept = folder / "pool", folder / "pool.kept"
        self._folder.mkdir(exist_ok=True)
        while self._folder.is_mount():  # of a run that was killed
            self._run("umount", str(self._folder))
        self.path = self._folder / "pool.safetensors"
        size = f"size={SIZE_MB}m"
        self.missing = self._try("mount", "-t", "tmpfs", "-o", size, "none", str(self._folder))
        if self.missing:
            for old in self._folder.iterdir():
                old.unlink()

    def close(self) -> None:
        """Give the file system back."""
        if not self.missing:
            self._try("umount", str(self._folder))

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)

    def _try(self, *command: str) -> str:
        """What went wrong with a command, if anything."""
        try:
            self._run(*command)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"{' '.join(command[:2])}: {getattr(error, 'stderr', None) or error}".strip()
        return ""

    def digest(self) -> str:
        """Of the file's content."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    # -- the file ------------------------------------------------------------------------------

    @contextmanager
    def truncated(self) -> Iterator[None]:
        """A block in which the second half of the file is missing."""
        with self._spoilt():
            os.truncate(self.path, self.path.stat().st_size // 2)
            yield

    @contextmanager
    def garbage(self) -> Iterator[None]:
        """A block in which random bytes stand in the file's place."""
        with self._spoilt():
            size = min(self.path.stat().st_size, 2**20)
            self._put(np.random.default_rng(0).bytes(size))
            yield

    @contextmanager
    def foreign(self) -> Iterator[None]:
        """A block in which a sound pool of another tokenizer stands in the file's place."""
        with self._spoilt():
            ours = PoolFile.at(self._kept)
            beside = self._folder / "foreign.safetensors"
            theirs = PoolFile(beside, ours.form._replace(tokenizer_hash="0" * 64))
            theirs.put(ours.rows())
            beside.replace(self.path)
            yield

    @contextmanager
    def _spoilt(self) -> Iterator[None]:
        """A block that may spoil the file, which comes back."""
        if not self.path.exists():
            raise UnavailableError(f"{self.path} is not there yet")
        shutil.copyfile(self.path, self._kept)
        try:
            yield
        finally:
            self._put(self._kept.read_bytes())

    def _put(self, data: bytes) -> None:
        beside = self._folder / "put"
        beside.write_bytes(data)
        beside.replace(self.path)

    # -- the file system -----------------------------------------------------------------------

    @contextmanager
    def unwritable(self) -> Iterator[None]:
        """A block in which nothing can be written in the folder."""
        if self.missing:
            raise UnavailableError(f"there is no file system of its own: {self.missing}")
        if why := self._remount("ro"):
            raise UnavailableError(why)
        try:
            yield
        finally:
            if why := self._remount("rw"):
                raise RuntimeError(why)

    def _remount(self, how: str) -> str:
        """What went wrong with it, if anything."""
        why = ""
        for _ in range(50):  # busy while a save writes
            if not (why := self._try("mount", "-o", f"remount,{how}", str(self._folder))):
                break
            time.sleep(0.1)
        return why

    @contextmanager
    def full(self) -> Iterator[None]:
        """A block in which the file system is full."""
        if self.missing:
            raise UnavailableError(f"there is no file system of its own: {self.missing}")
        filler = self._folder / "filler"
        try:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                for size in (2**20, 2**12):
                    with suppress(OSError):
                        while file.write(bytes(size)) == size:
                            pass
            yield
        finally:
            filler.unlink(missing_ok=True)
