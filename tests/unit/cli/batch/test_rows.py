"""Rows of files: which there are, and what a task reads of them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from vllm_ouroboros.cli.batch import rows
from vllm_ouroboros.cli.batch.rows import find, read
from vllm_ouroboros.cli.inputs import InputError

LINES = [
    json.dumps({"id": "a", "prompt": "1"}), "", "no JSON", json.dumps({"prompt": "ünd"}),
    json.dumps({"id": 5, "prompt": "3"}), json.dumps(["x"]), json.dumps({"id": "z"}),
]  # fmt: skip
IDS = ["a", "rows.jsonl:3", "rows.jsonl:4", "5", "rows.jsonl:6", "z"]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(LINES))  # the last line has no end
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    found = [{"key": i if i != 4 else None, "prompt": f"text {i}"} for i in range(7)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(found), path, row_group_size=3)
    return path


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_lines_that_are_not_finished(lines: Path, most: int) -> None:
    asked = []
    pieces = find([lines], "id", {"5"}, lambda wanted: asked.append(wanted) or most)
    assert asked == [5]
    found = dict(row for piece in pieces for row in read(piece))
    assert [*found] == [one for one in IDS if one != "5"]
    assert json.loads(found["rows.jsonl:4"])["prompt"] == "ünd"
    assert found["rows.jsonl:3"].strip() == "no JSON"
    assert all(0 < piece.wanted <= most for piece in pieces)


@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize("most", [1, 2, 100])
def test_rows_of_a_table(table: Path, most: int, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(rows, "BATCH", at_once)
    pieces = find([table], "key", {"1"}, lambda _: most)
    found = {one: json.loads(row) for piece in pieces for one, row in read(piece)}
    assert [*found] == ["0", "2", "3", "rows.parquet:5", "5", "6"]
    assert found["rows.parquet:5"] == {"prompt": "text 4"}
    assert found["6"]["prompt"] == "text 6"


def test_a_table_without_prompts_shows_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.table({"question": ["why"]}), path)
    [piece] = find([path], "id", (), lambda _: 1)
    assert [*read(piece)] == [("rows.parquet:1", '{"question": "why"}')]


def test_ids_are_places_where_there_are_none(table: Path) -> None:
    pieces = find([table], "id", (), lambda _: 100)
    ids = [one for piece in pieces for one in piece.ids]
    assert ids == [f"rows.parquet:{i}" for i in range(1, 8)]


@pytest.mark.parametrize("kind", ["lines", "table", "two files"])
def test_ids_that_stand_twice_are_refused(tmp_path: Path, kind: str) -> None:
    found = [{"id": "a"}, {"id": "b"}, {"id": "a"}]
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text("".join(json.dumps(row) + "\n" for row in found))
    other.write_text(json.dumps(found[1]))
    files = [one]
    if kind == "table":
        files = [tmp_path / "one.parquet"]
        pyarrow.parquet.write_table(pa.Table.from_pylist(found), files[0], row_group_size=2)
    elif kind == "two files":
        one.write_text(json.dumps(found[1]))
        files = [one, other]
    with pytest.raises(InputError, match="another --id-column") as error:
        find(files, "id", (), lambda _: 100)
    assert ("'b'" if kind == "two files" else "'a'") in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        find([tmp_path / "x.jsonl"], "id", (), lambda _: 1)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(InputError, match=r"none of \.jsonl, \.parquet"):
        find([tmp_path / "x.csv"], "id", (), lambda _: 1)
