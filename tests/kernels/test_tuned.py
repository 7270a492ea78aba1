"""The table of measured launch configurations: which entry is taken, and what is refused."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from vllm_ouroboros.kernels import tuned
from vllm_ouroboros.kernels.launch import GPU, LaunchConfig
from vllm_ouroboros.kernels.tuned import Shape

SHAPE = Shape(
    head_dim=128, group=4, itemsize=2, page=16, kv_heads=8, rows=27, queries=27, context=8192
)
CONFIG = LaunchConfig(block_m=64, block_n=32, num_splits=16, num_warps=4, num_stages=3)
ENTRY = {"gpu": "NVIDIA H100*", "shape": SHAPE._asdict(), "config": CONFIG._asdict()}
H100 = "NVIDIA H100 80GB HBM3"


def table(tmp_path, *entries) -> tuple[tuned.Entry, ...]:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"entries": entries}))
    return tuned.read(path)


def test_the_shipped_table_is_well_formed() -> None:
    tuned.read(tuned.TABLE)


def test_no_gpu_has_no_entry() -> None:
    assert tuned.best_config(GPU(), SHAPE) == tuned.default_config(GPU(), SHAPE)


@pytest.mark.parametrize(
    "gpu, change, found",
    [
        (H100, {}, True),
        (H100, {"rows": 54, "queries": 16, "context": 4096, "kv_heads": 16}, True),
        (H100, {"rows": 55}, False),
        (H100, {"context": 16385}, False),
        (H100, {"context": 4095}, False),
        (H100, {"context": 0}, False),
        (H100, {"head_dim": 64}, False),
        (H100, {"group": 8}, False),
        (H100, {"itemsize": 4}, False),
        (H100, {"page": 32}, False),
        ("NVIDIA A100-SXM4-80GB", {}, False),
        ("", {}, False),
    ],
)
def test_what_an_entry_is_for(gpu, change, found, tmp_path) -> None:
    config = tuned.nearest(table(tmp_path, ENTRY), gpu, SHAPE._replace(**change))
    assert config == (CONFIG if found else None)


def test_the_nearest_entry_is_taken(tmp_path) -> None:
    far = deepcopy(ENTRY)
    far["shape"] |= {"rows": 54, "context": 16384}
    far["config"] |= {"num_splits": 2}
    entries = table(tmp_path, far, ENTRY)
    assert tuned.nearest(entries, H100, SHAPE).num_splits == 16
    assert tuned.nearest(entries, H100, SHAPE._replace(context=9000)).num_splits == 16
    assert tuned.nearest(entries, H100, SHAPE._replace(rows=50, context=12000)).num_splits == 2


def test_a_table_is_read_once(tmp_path) -> None:
    entries = table(tmp_path, ENTRY)
    (tmp_path / "tuned.json").unlink()
    assert tuned.read(tmp_path / "tuned.json") is entries


def test_a_launch_takes_the_table(monkeypatch) -> None:
    entry = tuned.Entry("test*", SHAPE, CONFIG)
    monkeypatch.setattr(tuned, "read", lambda path: (entry,))
    tuned._nearest.cache_clear()
    assert tuned.best_config(GPU("test GPU"), SHAPE) == CONFIG
    assert tuned.best_config(GPU("other GPU"), SHAPE) == tuned.default_config(GPU(), SHAPE)
    tuned._nearest.cache_clear()


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        (None, "gpu", "", r"entries\[1\]\.gpu = '' is not the pattern"),
        (None, "gpu", 5, r"entries\[1\]\.gpu = 5 is not the pattern"),
        (None, "shape", [], r"entries\[1\]\.shape is not an object with head_dim, group"),
        ("shape", "rows", 0, r"entries\[1\]\.shape\.rows = 0 is not a positive whole number"),
        ("shape", "rows", "27", r"entries\[1\]\.shape\.rows = '27' is not"),
        ("shape", "rows", True, r"entries\[1\]\.shape\.rows = True is not"),
        ("shape", "batch", 1, r"entries\[1\]\.shape\.batch is unknown; known keys are head_dim"),
        ("shape", "rows", None, r"entries\[1\]\.shape\.rows is missing"),
        ("config", "block_m", 48, r"config\.block_m = 48 is not a power of two from 16 to 1024"),
        ("config", "block_n", 8, r"config\.block_n = 8 is not a power of two from 16 to 1024"),
        ("config", "num_splits", 64, r"config\.num_splits = 64 is not a power of two from 1 to 32"),
        ("config", "num_stages", 9, r"config\.num_stages = 9 is not a number from 1 to 8"),
        ("shape", "group", 128, r"config\.block_m = 64 is less than the group of 128"),
    ],
)  # fmt: skip
def test_a_wrong_key_is_named(part, key, value, message, tmp_path) -> None:
    entry = deepcopy(ENTRY)
    place = entry if part is None else entry[part]
    if value is None:
        del place[key]
    else:
        place[key] = value
    with pytest.raises(ValueError, match=rf"tuned\.json: .*{message}"):
        table(tmp_path, ENTRY, entry)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"tuned\.json: no JSON"),
        ("[]", r'tuned\.json: "entries" is not a list'),
        ('{"entries": {}}', r'tuned\.json: "entries" is not a list'),
        ('{"entries": [1]}', r"tuned\.json: entries\[0\]\.gpu = None is not the pattern"),
    ],
)
def test_a_wrong_file_is_named(text, message, tmp_path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        tuned.read(path)
