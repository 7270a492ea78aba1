"""Rows of input files: found in one pass, read where they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ouroboros.cli.inputs import InputError

KINDS = (".jsonl", ".parquet")


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
    for file in files:
        if not file.is_file():
            raise InputError(f"input {file}: no such file")
        if file.suffix not in KINDS:
            raise InputError(f"input {file}: is none of {', '.join(KINDS)}")
    whole = [rows for file in files for rows in _of_file(file.resolve(), id_column)]
    seen: dict[str, str] = {}
    for rows in whole:
        for one in rows.ids:
            if one is not None and seen.setdefault(one, rows.path) != rows.path:
                raise InputError(f"id {one!r} stands in {seen[one]} and in {rows.path}: name files "
                                 "whose ids differ, or another --id-column")  # fmt: skip
    wanted = [_without(rows, finished) for rows in whole]
    most = at_once(sum(rows.wanted for rows in wanted))
    return [part for rows in wanted for part in _parts(rows, most) if part.wanted]


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

    with pyarrow.parquet.ParquetFile(rows.path) as file:
        table = file.read_row_group(rows.group).slice(rows.start, len(rows.ids))
    for row in table.to_pylist():
        yield json.dumps(row, default=str)


def _of_file(file: Path, id_column: str) -> Iterable[Rows]:
    if file.suffix == ".parquet":
        yield from _groups(file, id_column)
        return
    ids: list[str | None] = []
    seen: dict[str, int] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            ids.append(_id_of(line, id_column, f"{file.name}:{number}") if line.strip() else None)
            _once(seen, ids[-1], number, file, "line")
    yield Rows(str(file), 0, 0, tuple(ids))


def _groups(file: Path, id_column: str) -> Iterator[Rows]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"input {file}: pip install pyarrow to read it") from None
    seen: dict[str, int] = {}
    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        has_ids = id_column in table.schema_arrow.names
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            given: list[Any] = [None] * count
            if has_ids:
                given = table.read_row_group(group, columns=[id_column])[id_column].to_pylist()
            ids = []
            for one in given:
                number += 1
                ids.append(f"{file.name}:{number}" if one is None else str(one))
                _once(seen, ids[-1], number, file, "row")
            yield Rows(str(file), 0, group, tuple(ids))


def _id_of(line: bytes, id_column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        return place
    given = row.get(id_column) if isinstance(row, dict) else None
    return place if given is None else str(given)


def _once(seen: dict[str, int], one: str | None, number: int, file: Path, kind: str) -> None:
    if one is not None and (first := seen.setdefault(one, number)) != number:
        raise InputError(
            f"input {file}: {kind}s {first} and {number} have the id {one!r}: ids tell rows apart, "
            "change one or name another --id-column"
        )


def _without(rows: Rows, finished: Collection[str]) -> Rows:
    ids = tuple(None if one in finished else one for one in rows.ids)
    return Rows(rows.path, rows.start, rows.group, ids)


def _parts(rows: Rows, most: int) -> Iterator[Rows]:
    """Rows in pieces of at most so many."""
    starts = range(0, len(rows.ids), most)
    if rows.path.endswith(".parquet"):
        at: Iterable[int] = starts
    else:
        at = _offsets(rows.path, most)
    for first, start in zip(starts, at, strict=True):
        yield Rows(rows.path, start, rows.group, rows.ids[first : first + most])


def _offsets(path: str, every: int) -> list[int]:
    """Bytes at which line 0 begins, line ``every``, and so on."""
    found, offset = [], 0
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines):
            if number % every == 0:
                found.append(offset)
            offset += len(line)
    return found
