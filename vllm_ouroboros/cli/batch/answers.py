"""The answers of a batch: one for each row, kept as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_ouroboros.cli.inputs import InputError
from vllm_ouroboros.phrases.shared_file import replace

PART_ROWS, PART_SECONDS = 1000, 60.0
"""A Parquet part is written after so many rows or seconds."""
BEGIN = b'{"id": "'
"""Of every line."""


class Answers:
    """Answers in a file of JSON lines; what a killed run left stays.

    Args:
        path: of the file.
        retry: forget the rows that are errors.

    Attributes:
        finished: ids of the rows that have an answer.
    """

    def __init__(self, path: Path, *, retry: bool = False) -> None:
        self.path = path
        self.finished: set[str] = set()
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise InputError(f"--out {path}: is a folder or in none that exists")
        if path.exists():
            kept = [row for row in self._read() if not (retry and row["error"] is not None)]
            self.finished = {row["id"] for row in kept}
            # a line that was cut off goes, and what is tried again
            replace(path, "".join(map(_line, kept)).encode(), lambda: None)
        self._file = path.open("a", encoding="utf-8")

    def _read(self) -> Iterator[dict[str, Any]]:
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
                if row is not None and not row.keys() >= {"id", "error"}:
                    raise ValueError("no id")
            except (ValueError, AttributeError):
                if number == len(lines) and BEGIN.startswith(line[: len(BEGIN)]):
                    return  # it was cut off
                raise InputError(
                    f"--out {self.path}: line {number} is no answer; name another file"
                ) from None
            if row is not None:
                yield row

    def add(self, row: dict[str, Any]) -> bool:
        """Keep an answer; False if the row has one already."""
        if row["id"] in self.finished:
            return False
        self.finished.add(row["id"])
        self._keep(row)
        return True

    def _keep(self, row: dict[str, Any]) -> None:
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Write what is left."""
        self._file.close()


class ParquetAnswers(Answers):
    """Answers in a folder of Parquet files, each written whole."""

    def __init__(self, path: Path, *, retry: bool = False) -> None:
        self.path = path
        if path.is_file() or not path.resolve().parent.is_dir():
            raise InputError(f"--out {path}: answers in Parquet are a folder of files")
        path.mkdir(exist_ok=True)
        self._rows: list[dict[str, Any]] = []
        self.finished = set()
        for part in self._parts():
            kept = [row for row in _rows_of(part) if not (retry and row["error"] is not None)]
            self.finished |= {row["id"] for row in kept}
            if retry:
                self._write(part, kept)
        self._next = 1 + max((int(part.stem[5:]) for part in self._parts()), default=-1)
        self._since = time.monotonic()

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    def _keep(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= PART_ROWS or time.monotonic() - self._since > PART_SECONDS:
            self.close()

    def close(self) -> None:
        if self._rows:
            self._write(self.path / f"part-{self._next:05}.parquet", self._rows)
            self._rows, self._next = [], self._next + 1
        self._since = time.monotonic()

    def _write(self, part: Path, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        schema = pa.schema([
            ("id", pa.string()), ("text", pa.string()), ("prompt_tokens", pa.int64()),
            ("generated_tokens", pa.int64()), ("error", pa.string()),
        ])  # fmt: skip
        table = pa.Table.from_pylist(rows, schema)
        new = part.with_suffix(".tmp")
        pyarrow.parquet.write_table(table, new)
        new.replace(part)


def open_answers(path: Path, *, retry: bool = False) -> Answers:
    """Answers in a path that ends in ``.jsonl`` or ``.parquet``.

    Raises:
        InputError: it ends otherwise, or holds something else.
    """
    if path.suffix == ".parquet":
        return ParquetAnswers(path, retry=retry)
    if path.suffix == ".jsonl":
        return Answers(path, retry=retry)
    raise InputError(f"--out {path}: ends in neither .jsonl nor .parquet")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _rows_of(part: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(part).to_pylist()
