"""Texts of files, one by one, whatever their size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_ouroboros.cli.inputs import InputError

KINDS = (".jsonl", ".parquet", ".txt", ".md")
FIELDS = ("text", "content", "messages", "turns", "prompt", "completion", "response", "answer")
"""What of a row is text, unless a field is named: strings, or conversations."""
PIECE = 2**20  # characters of a plain text that are read at once, and then up to a line's end
BATCH = 256  # rows of a Parquet file


def texts_of(file: Path, field: str | None) -> Iterator[tuple[str, int]]:
    """Texts of a file, each with how many bytes of it were read for it, about.

    Args:
        file: one of `KINDS`.
        field: of rows; None: all of `FIELDS`.

    Raises:
        InputError: a row is no object, or has no text.
    """
    if file.suffix == ".jsonl":
        yield from _of_lines(file, field)
    elif file.suffix == ".parquet":
        yield from _of_parquet(file, field)
    else:
        with file.open(encoding="utf-8", errors="replace") as lines:
            while piece := lines.read(PIECE):
                piece += lines.readline(PIECE)
                yield piece, len(piece.encode())


def _of_lines(file: Path, field: str | None) -> Iterator[tuple[str, int]]:
    read = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            read += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"corpus {file}, line {number}: is no JSON ({error})") from None
            for text in _of_row(row, field, f"corpus {file}, line {number}"):
                yield text, read
                read = 0


def _of_parquet(file: Path, field: str | None) -> Iterator[tuple[str, int]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        size, rows = file.stat().st_size, max(1, table.metadata.num_rows)
        names = set(table.schema_arrow.names)
        wanted = [name for name in ((field,) if field else FIELDS) if name in names]
        if not wanted:
            raise InputError(f"corpus {file}: has no column {field or ' or '.join(FIELDS)}")
        done = told = 0
        for batch in table.iter_batches(BATCH, columns=wanted):
            for row in batch.to_pylist():
                done += 1
                for text in _of_row(row, field, f"corpus {file}, row {done}", empty=True):
                    yield text, size * (done - told) // rows
                    told = done


def _of_row(row: Any, field: str | None, where: str, empty: bool = False) -> list[str]:
    if isinstance(row, str):
        return [row]
    if not isinstance(row, dict):
        raise InputError(f"{where}: is no JSON object with a text")
    names = (field,) if field else FIELDS
    found = [text for name in names for text in _strings(row.get(name))]
    if not found and not empty:
        raise InputError(f"{where}: has no text in {' or '.join(names)}; name a --field")
    return found


def _strings(value: Any) -> list[str]:
    """The texts of a field: a string, or a list of strings or of messages."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, dict):
        return _strings(value.get("content"))
    if isinstance(value, list):
        return [text for one in value for text in _strings(one)]
    return []
