"""Launch configurations of tree attention that were measured on a GPU, and which one is nearest.

The table is `tuned.json` beside this file; `scripts/gpu/tune_tree_attention.py` writes it. Shapes
and GPUs that it does not have get `launch.launch_config`.
"""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .launch import GPU, MAX_SPLITS, LaunchConfig, launch_config, power_of_two

TABLE = Path(__file__).with_name("tuned.json")
FARTHEST = 1.0  # octaves between the entry's and the asked size, of the size that differs most


class Shape(NamedTuple):
    """What a configuration depends on."""

    head_dim: int  # D
    group: int  # query heads of a KV head
    itemsize: int  # bytes of a query's element
    page: int  # tokens of a page
    kv_heads: int  # Hkv
    rows: int  # T, rows of the step
    queries: int  # most rows that a request has
    context: int  # most committed tokens that a request has


EXACT = 4  # fields of Shape that must be equal; the others may differ by `FARTHEST`
LIMITS = {"block_m": 1024, "block_n": 1024, "num_splits": MAX_SPLITS, "num_warps": 32,
          "num_stages": 8}  # fmt: skip


class Entry(NamedTuple):
    """One measured shape."""

    gpu: str  # pattern of the GPU's name, as for `fnmatch`: "NVIDIA H100*"
    shape: Shape
    config: LaunchConfig


def best_config(gpu: GPU, shape: Shape) -> LaunchConfig:
    """The nearest entry of the shipped table, else `launch_config`."""
    return _nearest(gpu.name, shape) or default_config(gpu, shape)


def default_config(gpu: GPU, shape: Shape) -> LaunchConfig:
    """`launch_config` of a shape."""
    return launch_config(
        num_rows=shape.rows, num_kv_heads=shape.kv_heads, group=shape.group,
        head_dim=shape.head_dim, block_size=shape.page, max_query_len=shape.queries,
        max_context_len=shape.context, itemsize=shape.itemsize, gpu=gpu,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _nearest(gpu: str, shape: Shape) -> LaunchConfig | None:
    return nearest(read(TABLE), gpu, shape)


def nearest(entries: tuple[Entry, ...], gpu: str, shape: Shape) -> LaunchConfig | None:
    """Configuration of the entry whose sizes are nearest; None: no entry is near.

    Nearness is the sum of the distances in octaves; of equally near entries the first.
    """
    best, least = None, math.inf
    for entry in entries:
        if entry.shape[:EXACT] != shape[:EXACT] or not fnmatchcase(gpu, entry.gpu):
            continue
        octaves = [
            abs(math.log2(max(own, 1) / max(asked, 1)))
            for own, asked in zip(entry.shape[EXACT:], shape[EXACT:], strict=True)
        ]
        if max(octaves) <= FARTHEST and sum(octaves) < least:
            best, least = entry.config, sum(octaves)
    return best


@cache
def read(path: Path) -> tuple[Entry, ...]:
    """Entries of a table; each file is read once.

    Raises:
        ValueError: naming the file and the key that is wrong.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
        raise ValueError(f'{path}: "entries" is not a list')
    return tuple(_entry(f"{path}: entries[{i}]", entry) for i, entry in enumerate(table["entries"]))


def _entry(where: str, entry: Any) -> Entry:
    gpu = entry.get("gpu") if isinstance(entry, dict) else None
    if not isinstance(gpu, str) or not gpu:
        raise ValueError(f"{where}.gpu = {gpu!r} is not the pattern of a GPU's name")
    shape = Shape(**_sizes(f"{where}.shape", entry.get("shape"), Shape._fields))
    config = LaunchConfig(**_sizes(f"{where}.config", entry.get("config"), LaunchConfig._fields))
    for key, value in config._asdict().items():
        least = 16 if key.startswith("block") else 1
        power = key == "num_stages" or power_of_two(value) == value
        if not power or not least <= value <= LIMITS[key]:
            what = "a number" if key == "num_stages" else "a power of two"
            raise ValueError(
                f"{where}.config.{key} = {value} is not {what} from {least} to {LIMITS[key]}"
            )
    if config.block_m < shape.group:
        raise ValueError(
            f"{where}.config.block_m = {config.block_m} is less than the group of {shape.group}"
        )
    return Entry(gpu, shape, config)


def _sizes(where: str, given: Any, names: tuple[str, ...]) -> dict[str, int]:
    """A JSON object of positive whole numbers with exactly these keys."""
    if not isinstance(given, dict):
        raise ValueError(f"{where} is not an object with {', '.join(names)}")
    for key in (*names, *given):
        if key not in given:
            raise ValueError(f"{where}.{key} is missing")
        if key not in names:
            raise ValueError(f"{where}.{key} is unknown; known keys are {', '.join(names)}")
        if type(given[key]) is not int or given[key] < 1:
            raise ValueError(f"{where}.{key} = {given[key]!r} is not a positive whole number")
    return given
