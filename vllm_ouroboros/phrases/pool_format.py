"""The format of a pool's file: safetensors, whose metadata name the format and the tokenizer.

Its tensors are the rows of `file_rows`. A file is read without trusting it: what is not sound is a
`ForeignError`, whatever it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import safetensors.numpy

from vllm_ouroboros.phrases import file_rows

FORMAT = "vllm-ouroboros phrase pool"
FORMAT_VERSION = 5

MAX_BYTES = 2**32
"""Of a file that is read: a pool of the default size takes a fiftieth, and it is read whole."""

_MAX_HEADER = 2**20  # bytes; ours takes less than one kB


class ForeignError(Exception):
    """A file to leave alone; the message goes on from the path and says what it is."""


class PoolFormat(NamedTuple):
    """What the files for one tokenizer look like.

    Args:
        vocab_size: all token ids are below it.
        tokenizer_hash: of `tokenizer_hash`.
    """

    vocab_size: int
    tokenizer_hash: str

    @classmethod
    def of(cls, path: str | Path) -> PoolFormat:
        """That of a file.

        Raises:
            ValueError: there is no pool's file.
        """
        try:
            with Path(path).open("rb") as opened:
                found = _metadata_of(_header(opened))
            known = found["tokenizer_hash"]  # is shown: nothing that a terminal obeys
            if found["format"] == FORMAT and re.fullmatch("[0-9a-f]{64}", known):
                return cls(int(found["vocab_size"]), known)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from None
        except (KeyError, ValueError):
            pass
        raise ValueError(f"{path}: is no phrase pool of vllm-ouroboros")

    def dump(self, rows: Mapping[str, np.ndarray]) -> bytes:
        """The file that holds rows."""
        return safetensors.numpy.save(dict(rows), self._metadata())

    def read(self, path: Path) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        """The rows of a file, checked, and its `mark`.

        Raises:
            FileNotFoundError: there is none.
            ForeignError: it cannot be used, for whatever reason.
        """
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ForeignError("is not a regular file")
            if status.st_size > MAX_BYTES:
                raise ForeignError(f"has {status.st_size} bytes, more than any pool")
            # not mapped: a mapped file that someone shortens meanwhile ends the process
            with path.open("rb") as file:
                found = mark(os.fstat(file.fileno()))
                header = _header(file)
                self._check(_metadata_of(header))
                tensors = safetensors.numpy.load(header + file.read())
            file_rows.check(tensors, self.vocab_size)
        except (FileNotFoundError, ForeignError):
            raise
        except Exception as error:  # no permission, or whatever parsers make of a broken file
            raise ForeignError(f"is truncated, damaged or unreadable ({error!r:.200})") from error
        return {name: array.copy() for name, array in tensors.items()}, found

    def _metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "plugin_version": _plugin_version(),
            "vocab_size": str(self.vocab_size),
            "tokenizer_hash": self.tokenizer_hash,
        }

    def _check(self, found: dict[str, str]) -> None:
        """Raises `ForeignError` unless these are the metadata of such a file."""
        wanted = self._metadata()
        if found.get("format") != FORMAT:
            raise ForeignError("is truncated or not a phrase pool of vllm-ouroboros")
        for key in ("format_version", "vocab_size", "tokenizer_hash"):
            if found[key] != wanted[key]:
                what = f"{found[key]!r:.80}, here it is {wanted[key]!r}"
                raise ForeignError(f"is for another {key.replace('_', ' ')} ({what})")


def tokenizer_hash(vocab: Mapping[str, int]) -> str:
    """SHA-256 of a tokenizer's vocabulary (token to id), in hex; the order does not matter."""
    pairs = sorted((token, int(i)) for token, i in vocab.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def mark(status: os.stat_result) -> tuple[int, ...]:
    """What changes whenever a file is written or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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
