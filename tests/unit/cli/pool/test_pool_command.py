"""``vllm-ouroboros pool``: from texts to a file that an engine reads."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from vllm_ouroboros.cli.inputs import TARGET
from vllm_ouroboros.cli.main import app
from vllm_ouroboros.cli.pool import corpus
from vllm_ouroboros.cli.pool.command import build as build_pool
from vllm_ouroboros.cli.pool.command import merge
from vllm_ouroboros.cli.pool.files import file_for
from vllm_ouroboros.config import OuroborosConfig
from vllm_ouroboros.phrases.contexts import CONTEXTS
from vllm_ouroboros.phrases.pool import PhrasePool

TEXT = "def add(one, two):\n    return one + two\n"


def run(*arguments: object):
    return CliRunner().invoke(app, ["pool", *map(str, arguments)])


def build(out: Path, *files: Path, **options: object):
    more = [part for name, value in options.items() for part in (f"--{name}", value)]
    return run("build", *files, "--tokenizer", TARGET, "--out", out, "--plain", *more)


def contents(path: Path) -> tuple[PhrasePool, list[int]]:
    """A pool that an engine would start with, and the tokens of `TEXT`."""
    file, encode = file_for(path, str(TARGET))
    pool = PhrasePool(65536, 10, 6)
    assert file.load(pool) > 0
    return pool, encode(TEXT)


def written(folder: Path, kind: str) -> Path:
    path = folder / f"corpus.{kind}"
    if kind == "jsonl":
        rows = [
            {"messages": [{"role": "user", "content": "x y"}, {"role": "a", "content": TEXT}]},
            {"prompt": "a b", "other": 1},
        ]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [None, TEXT], "id": [1, 2]}), path)
    else:
        path.write_text(TEXT)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "md"])
def test_a_pool_of_texts_is_what_requests_would_have_left(tmp_path, kind) -> None:
    out = tmp_path / "pool.safetensors"
    result = build(out, written(tmp_path, kind))
    assert result.exit_code == 0, result.output
    assert "phrases of" in result.output
    pool, ids = contents(out)
    for at in range(len(ids) - 6):
        assert tuple(ids[at + 1 : at + 7]) in pool.lookup(ids[at])
    found = json.loads(run("info", out, "--json").output)
    assert found["phrases"] == len(pool)
    assert found["keys"] > found["keys of one token"] > 10, "keys of several tokens, too"
    assert found["longest phrase"] == 6
    assert "from history" in run("info", out).output


def test_long_texts_are_read_piece_by_piece(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 64)
    path = tmp_path / "long.txt"
    path.write_text(TEXT * 20)
    pieces = [*corpus.texts_of(path, None)]
    assert len(pieces) > 5
    assert "".join(text for text, _ in pieces) == TEXT * 20
    assert sum(size for _, size in pieces) == path.stat().st_size


def test_a_text_in_one_line_is_read_piece_by_piece(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "PIECE", 64)
    path = tmp_path / "line.txt"
    path.write_text("word " * 200)
    pieces = [text for text, _ in corpus.texts_of(path, None)]
    assert max(map(len, pieces)) <= 2 * 64
    assert "".join(pieces) == "word " * 200


def test_progress_is_shown(tmp_path) -> None:
    path = written(tmp_path, "txt")
    result = run("build", path, "--tokenizer", TARGET, "--out", tmp_path / "pool")
    assert result.exit_code == 0, result.output
    size = path.stat().st_size
    assert f"{size}/{size} bytes" in result.stderr
    assert path.name in result.stderr


def test_pools_are_as_large_as_an_engines_unless_told() -> None:
    usual = OuroborosConfig()
    for command in (build_pool, merge):
        given = {name: one.default for name, one in signature(command).parameters.items()}
        assert given["capacity"] == usual.pool_capacity
        assert given["guess_set_size"] == usual.guess_set_size
        assert given.get("phrase_len", usual.phrase_len) == usual.phrase_len


def test_capacity_bounds_the_pool(tmp_path) -> None:
    out = tmp_path / "pool.safetensors"
    assert build(out, written(tmp_path, "txt"), capacity=8).exit_code == 0
    assert json.loads(run("info", out, "--json").output)["keys"] <= 8


@pytest.mark.parametrize(
    "name, content, options, words",
    [
        ("none.txt", None, {}, "no such file"),
        ("a.csv", "a", {}, "is none of .jsonl"),
        ("a.jsonl", "{", {}, "line 1: is no JSON"),
        ("a.jsonl", "[1]", {}, "line 1: is no JSON object"),
        ("a.jsonl", '{"x": 1}', {}, "name a --field"),
        ("a.jsonl", '{"text": "a b"}', {"field": "body"}, "no text in body"),
        ("a.txt", "", {}, "nothing to write"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, options, words) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    result = build(tmp_path / "pool.safetensors", path, **options)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "pool.safetensors").exists()


def test_a_model_without_a_tokenizer_is_named(tmp_path) -> None:
    result = run("build", written(tmp_path, "txt"), "--tokenizer", tmp_path, "--out", "/tmp/x")
    assert result.exit_code == 2
    assert "--tokenizer" in result.output


def test_pools_are_merged(tmp_path) -> None:
    texts = {"one": TEXT, "two": "class Other:\n    value = 17\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        assert build(tmp_path / name, tmp_path / f"{name}.txt").exit_code == 0
    both = tmp_path / "both"
    assert run("merge", tmp_path / "one", tmp_path / "two", "--out", both).exit_code == 0
    file, encode = file_for(both, str(TARGET))
    pool = PhrasePool(65536, 10, 6)
    file.load(pool)
    for text in texts.values():
        ids = encode(text)
        assert tuple(ids[1:7]) in pool.lookup(ids[0])


def test_what_is_no_pool_is_not_merged_nor_overwritten(tmp_path) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    assert build(tmp_path / "one", tmp_path / "corpus.txt").exit_code == 0
    for bad in (tmp_path / "none", tmp_path / "corpus.txt"):
        result = run("merge", tmp_path / "one", bad, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert str(bad) in result.output
    result = run("merge", tmp_path / "one", "--out", tmp_path / "corpus.txt")
    assert result.exit_code == 2
    assert (tmp_path / "corpus.txt").read_text() == TEXT


def test_a_damaged_pool_is_named(tmp_path) -> None:
    assert build(tmp_path / "pool", written(tmp_path, "txt")).exit_code == 0
    (tmp_path / "half").write_bytes((tmp_path / "pool").read_bytes()[:-9])
    for result in (
        run("info", tmp_path / "half"),
        run("merge", tmp_path / "half", "--out", tmp_path / "out"),
    ):
        assert result.exit_code == 2
        assert "is truncated, damaged or unreadable" in result.output


def test_every_context_of_an_engine_is_a_key(tmp_path) -> None:
    assert build(tmp_path / "pool", written(tmp_path, "txt")).exit_code == 0
    pool, ids = contents(tmp_path / "pool")
    kinds = {int(key) >> 28 for key in pool.arrays.keys if int(key) >= 2**31}
    assert len(ids) < CONTEXTS[-1] or len(kinds) == len(CONTEXTS) - 1
