"""Rows of input files: found in one pass, read where they are needed."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ouroboros.cli.inputs import InputError, check_files

KINDS = (".jsonl", ".parquet")
COLUMNS = ("prompt", "messages", "sampling_params")
"""What of a Parquet file's rows is read, if it has any of them."""
BATCH = 1024  # rows of a Parquet file that are decoded at a time


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a file.

    Attributes:
        path: of the file, the same on all machines.
        start: JSON lines: the byte at which the first one begins; Parquet: its number in the group.
        group: of a Parquet file.
        ids: of each row; None: nobody wants it.
    """

    path: str
    start: int
    group: int
    ids: tuple[str | None, ...]

    @property
    def wanted(self) -> int:
        """How many rows are wanted."""
        return sum(one is not None for one in self.ids)


def find(
    files: Sequence[Path], id_column: str, finished: Collection[str], at_once: Callable[[int], int]
) -> list[Rows]:
    """The rows of files that are not finished yet, in pieces.

    A row without an id, and a line that is none, has the file's name and its number for one.

    Args:
        files: JSON lines or Parquet.
        id_column: where rows have their id.
        finished: ids.
        at_once: rows of a piece, from how many are wanted.

    Raises:
        InputError: a file is missing or of another kind, or two rows have one id.
    """
    check_files(files, "input", KINDS)
    seen: dict[str, tuple[str, int]] = {}
    found = [part for file in files for part in _of_file(file.resolve(), id_column)]
    for part in found:
        for number, one in enumerate(part.ids, part.first):
            if one in seen:
                path, other = seen[one]
                raise InputError(
                    f"id {one!r} stands in row {other} of {path} and in row {number} of "
                    f"{part.path}: ids tell rows apart, change one, leave out a file, or name "
                    "another --id-column"
                )
            if one is not None:
                seen[one] = part.path, number
    for part in found:
        part.ids = [None if one in finished else one for one in part.ids]
    most = at_once(sum(one is not None for part in found for one in part.ids))
    pieces = [
        Rows(part.path, part.starts[i], part.group, tuple(part.ids[i : i + most]))
        for part in found
        for i in range(0, len(part.ids), most)
    ]
    return [rows for rows in pieces if rows.wanted]


def read(rows: Rows) -> Iterator[tuple[str, str]]:
    """Ids and rows, these as JSON (or what stood in the place of it)."""
    found = _lines(rows) if rows.path.endswith(".jsonl") else _parquet(rows)
    for one, row in zip(rows.ids, found, strict=True):
        if one is not None:
            yield one, row


def _lines(rows: Rows) -> Iterator[str]:
    with Path(rows.path).open("rb") as file:
        file.seek(rows.start)
        for _ in rows.ids:
            yield file.readline().decode(errors="replace")


def _parquet(rows: Rows) -> Iterator[str]:
    import pyarrow.parquet

    end = rows.start + len(rows.ids)
    with pyarrow.parquet.ParquetFile(rows.path) as file:
        wanted = [name for name in COLUMNS if name in file.schema_arrow.names] or None
        batches = file.iter_batches(BATCH, row_groups=[rows.group], columns=wanted)
        for first, batch in zip(range(0, end, BATCH), batches, strict=False):
            for row in batch[max(0, rows.start - first) : end - first].to_pylist():
                yield json.dumps(row, default=str)


@dataclass
class _Part:
    """All rows of a file, or of a group of one.

    Attributes:
        path: of the file.
        group: of a Parquet file.
        first: number of the first row, in the file.
        ids: of each row; None: there is none, or nobody wants it.
        starts: of each row, see `Rows`.
    """

    path: str
    group: int
    first: int
    ids: list[str | None]
    starts: Sequence[int]


def _of_file(file: Path, id_column: str) -> Iterator[_Part]:
    if file.suffix == ".parquet":
        yield from _groups(file, id_column)
        return
    ids: list[str | None] = []
    starts = array("q")
    start = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            ids.append(_id_of(line, id_column, f"{file.name}:{number}") if line.strip() else None)
            starts.append(start)
            start += len(line)
    yield _Part(str(file), 0, 1, ids, starts)


def _groups(file: Path, id_column: str) -> Iterator[_Part]:
    import pyarrow.parquet

    first = 1
    with pyarrow.parquet.ParquetFile(file) as table:
        has_ids = id_column in table.schema_arrow.names
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            given: list[Any] = [None] * count
            if has_ids:
                given = table.read_row_group(group, columns=[id_column])[id_column].to_pylist()
            ids: list[str | None] = [
                f"{file.name}:{number}" if one is None else str(one)
                for number, one in enumerate(given, first)
            ]
            yield _Part(str(file), group, first, ids, range(count))
            first += count


def _id_of(line: bytes, id_column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        return place
    given = row.get(id_column) if isinstance(row, dict) else None
    return place if given is None else str(given)
