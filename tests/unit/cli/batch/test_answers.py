"""Answers in files: kept as they come, whatever ends the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_ouroboros.cli.batch import answers as module
from vllm_ouroboros.cli.batch.answers import Answers, _rows_of, open_answers
from vllm_ouroboros.cli.inputs import InputError


def row(one: str, error: str | None = None) -> dict:
    text = None if error else f"text of {one}"
    return {"id": one, "text": text, "prompt_tokens": 1, "generated_tokens": 2, "error": error}


def rows_of(path: Path) -> list[dict]:
    if path.is_dir():
        return [one for part in sorted(path.glob("part-*")) for one in _rows_of(part)]
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_a_later_run_goes_on(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(module, "PART_ROWS", 2)
    path = tmp_path / name
    first = open_answers(path)
    assert [first.add(row(one)) for one in ("a", "b", "a")] == [True, True, False]
    first.add(row("c", "too long"))
    first.close()
    again = open_answers(path)
    assert again.finished == {"a", "b", "c"}
    assert not again.add(row("b"))
    again.add(row("d"))
    again.close()
    assert [one["id"] for one in rows_of(path)] == ["a", "b", "c", "d"]
    retried = open_answers(path, retry=True)
    assert retried.finished == {"a", "b", "d"}
    retried.add(row("c"))
    retried.close()
    assert sorted(one["id"] for one in rows_of(path)) == ["a", "b", "c", "d"]
    assert all(one["error"] is None for one in rows_of(path))


@pytest.mark.parametrize("left", [1, 6, 20])
def test_a_line_that_was_cut_off_is_answered_again(tmp_path: Path, left: int) -> None:
    path = tmp_path / "answers.jsonl"
    whole = json.dumps(row("a")) + "\n"
    path.write_text(whole + json.dumps(row("b"))[:left])
    answers = open_answers(path)
    assert answers.finished == {"a"}
    answers.add(row("b"))
    answers.close()
    assert rows_of(path) == [row("a"), row("b")]


@pytest.mark.parametrize("text", ['{"prompt": "x"}\n{"prompt": "y"}\n', '{"prompt": "x"}', "notes"])
def test_a_file_of_something_else_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match="line 1 is no answer"):
        open_answers(path)
    assert path.read_text() == text


def test_paths_that_cannot_hold_answers(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("")
    (tmp_path / "x.jsonl").mkdir()
    for name in ("x.csv", "x.parquet", "x.jsonl", "nowhere/y.jsonl", "nowhere/y.parquet"):
        with pytest.raises(InputError, match="--out"):
            open_answers(tmp_path / name)


def test_answers_are_in_the_file_at_once(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.jsonl")
    answers.add(row("a"))
    assert rows_of(answers.path) == [row("a")]
    answers.close()
