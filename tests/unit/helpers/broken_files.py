"""Reads broken files by the thousand, of pools or of costs: ``python broken_files.py KIND FOLDER``.

It may have little more memory than it starts with, and the system ends it when one file takes it
too long. The file that it ended at is left in the folder.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import resource
import signal
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from vllm_ouroboros.cli.doctor.report import show_costs
from vllm_ouroboros.cli.inputs import InputError
from vllm_ouroboros.cli.pool.files import describe, merge
from vllm_ouroboros.phrases import pool_file
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import FIRST_HASH
from vllm_ouroboros.phrases.file_rows import MAX_WIDTH
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.phrases.pool_file import PoolFile
from vllm_ouroboros.phrases.pool_format import PoolFormat, tokenizer_hash
from vllm_ouroboros.policy.forward_costs import CostCurve, Costs, read_costs

SECONDS, MEMORY = 10, 2**25  # that a file may take; none is larger than 2 MB
VOCAB, HASH = 50, tokenizer_hash({"a": 0})
DEEP = "[" * 20_000 + "]" * 20_000  # stands for "DEEP"
ODD = (
    0, 1, -1, 4, 5, VOCAB - 1, VOCAB, 2**20, 2**31 - 1, 2**31, -(2**31), 2**40, 2**60, 2**63,
    2**64 - 1, 10**30, 10**400, 1.5, float("inf"), float("nan"), None, True, [], {}, [[0, 2**62]],
    [0, 2**64 - 1], "DEEP", "", "1", "\x1b[2J", "\ud800", "I8", "U8", "U32", "F32", "I64",
    "F8_E5M2", "BF16", "__metadata__",
)  # fmt: skip


def file_at(path: Path) -> PoolFile:
    return PoolFile(path, PoolFormat(VOCAB, HASH))


def filled() -> PhrasePool:
    """A pool with phrases of all sources, behind one token or two."""
    pool, draw = PhrasePool(64, 3, 4), random.Random(1)
    for source in PhraseSource:
        pool.insert_text(draw.choices(range(VOCAB), k=12), source, contexts=2)
    return pool


def flipped(draw: random.Random, data: bytes) -> bytes:
    new, size = bytearray(data), 8 + int.from_bytes(data[:8], "little")
    end = draw.choice([8, size, len(data)]) if size < len(data) else len(data)
    for _ in range(draw.randint(1, 6)):
        new[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(new)


def resized(draw: random.Random, data: bytes) -> bytes:
    """Cut, with more behind it, nothing of it, or with a header said to be of another length."""
    size = int.from_bytes(data[:8], "little") + draw.randint(-9, 9)
    said = draw.choice([0, size, len(data), 2**20, 2**27, 2**31, 2**40, 2**60, 2**64 - 1])
    return draw.choice([
        data[: draw.randrange(len(data))],
        data + draw.choice([bytes(draw.randint(1, 99)), draw.randbytes(4000), data]),
        draw.choice([b"", bytes(8), bytes(5000), draw.randbytes(900)]),
        said.to_bytes(8, "little") + data[8:],
    ])  # fmt: skip


def with_odd_places(draw: random.Random, data: Any) -> bytes:
    """JSON with values that are odd, missing, elsewhere or under another name."""
    root = [json.loads(data) if isinstance(data, bytes) else data]
    places = [(node, key) for node in containers(root) for key in keys_of(node)]
    for node, key in draw.sample(places, draw.randint(1, 2)):
        other, elsewhere = draw.choice(places)
        with suppress(IndexError, KeyError):  # the first change may have taken it away
            new = draw.choice([draw.choice(ODD), draw.choice(ODD), other[elsewhere]])
            if draw.random() < 0.15:
                del node[key]
            elif isinstance(node, dict) and draw.random() < 0.2:
                node[str(draw.choice(ODD))] = node.pop(key)
            else:
                node[key] = copy.deepcopy(new)
    return json.dumps(root[0] if root else None).replace('"DEEP"', DEEP).encode()


def containers(node: Any) -> list[Any]:
    found = [node[key] for key in keys_of(node)]
    return [node, *(inner for one in found if keys_of(one) for inner in containers(one))]


def keys_of(node: Any) -> list[Any]:
    return [*node] if isinstance(node, dict) else [*range(len(node))] if type(node) is list else []


def split(data: bytes) -> tuple[Any, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def with_an_odd_header(draw: random.Random, data: bytes) -> bytes:
    header, body = split(data)
    return joined(with_odd_places(draw, header), body)


def with_odd_rows(draw: random.Random, data: bytes) -> bytes:
    rows = {name: column.copy() for name, column in safetensors.numpy.load(data).items()}
    name, kind = draw.choice([*rows]), draw.random()
    if kind < 0.5:  # values, of which most are out of range
        limits = np.iinfo(rows[name].dtype)
        values = [v for v in ODD if type(v) is int and limits.min <= v <= limits.max]
        rows[name].flat[draw.randrange(rows[name].size)] = draw.choice([*values, limits.max])
    elif kind < 0.75:  # the same key or phrase again and again
        rows[name][:] = rows[name][draw.randrange(len(rows[name]))]
    else:  # few rows, that are wide
        few, width = draw.choice([0, 1, 2]), draw.choice([0, 1, MAX_WIDTH, MAX_WIDTH + 1, 2**18])
        rows = {name: column[:few] for name, column in rows.items()}
        rows["lengths"] = np.minimum(rows["lengths"], width)
        rows["tokens"] = np.full((few, width), 7, np.int32)
    return safetensors.numpy.save(rows, split(data)[0]["__metadata__"])


def check_pool(pool: PhrasePool) -> None:
    a, (_, most, width) = pool.arrays, pool.arrays.tokens.shape
    keys, held = a.keys, np.arange(most) < a.counts[:, None]
    within = held[:, :, None] & (np.arange(width) < a.lengths[:, :, None])
    plain, hashed = (keys >= -1) & (keys < VOCAB), (keys >= FIRST_HASH) & (keys < 2**32)
    assert (plain | hashed).all() and len({*keys[keys >= 0].tolist()}) == (keys >= 0).sum()
    assert ((a.counts >= 0) & (a.counts <= most * (keys >= 0))).all()
    assert ((a.lengths[held] >= 1) & (a.lengths[held] <= width)).all()
    assert ((a.sources[held] >= 0) & (a.sources[held] < len(PhraseSource))).all()
    assert ((a.tokens[within] >= 0) & (a.tokens[within] < VOCAB)).all()


def read_pool(path: Path, sound: Path) -> bool:
    """Do all that is done with a pool's file; returns whether an engine had phrases of it."""
    pool = PhrasePool(64, 3, 4)
    found = file_at(path).load(pool) > 0
    check_pool(pool)
    try:
        shown = describe(path)
        merge([path, sound], path.with_name("merged"), 99, 9)
    except InputError:  # made of ValueError alone
        assert not found
        return False
    assert all(str(value).isprintable() for value in shown.values()), shown
    saved = path.with_name("saved")
    saved.write_bytes(path.read_bytes())
    if file_at(saved).save(filled()):
        assert file_at(saved).load(pool)
        check_pool(pool)
        return found
    assert not found, "what can be read can be replaced"
    return False


def read_file_of_costs(path: Path, _: Path) -> bool:
    """The same for a file of costs."""
    wrong = show_costs(path)
    try:
        found = Costs.of(read_costs(path))
    except ValueError:
        assert wrong
        return False
    assert np.isfinite(found.target.table(64)).all()
    return wrong is None


def is_about_memory(record: logging.LogRecord) -> bool:
    """What is logged must not be; and it is not shown."""
    message = record.getMessage()
    assert "MemoryError" not in message and "allocate" not in message, message
    return False


def fuzz(kind: str, folder: Path) -> None:
    """Break a sound file again and again, always in the same ways, and read what comes of it."""
    draw, path, sound = random.Random(kind), folder / "pool", folder / "sound"
    os.fsync = lambda _: None  # slow, and not what is tried
    pool_file.logger.addFilter(is_about_memory)
    file_at(sound).save(filled())
    header, body = split(sound.read_bytes())
    path.write_bytes(joined(json.dumps(header, sort_keys=True).encode(), body))
    cases, read = 10_000, read_pool
    mutations = [flipped, resized, with_an_odd_header, with_an_odd_header, with_odd_rows]
    if kind == "costs":
        curve = CostCurve([1, 2, 8], [0.25, 0.5, 1.0])
        path = Costs(curve, curve, 0.5).save(str(path))
        cases, read = 1_000, read_file_of_costs
        mutations = [flipped, resized, with_odd_places]
    data = path.read_bytes()
    assert read(path, sound)  # compiles what is compiled
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    taken = 0
    for case in range(cases):
        path.write_bytes(mutations[case % len(mutations)](draw, data))
        signal.alarm(SECONDS)  # ends the process
        taken += read(path, sound)
    assert cases / 50 < taken < cases / 2, f"{taken} of {cases} were sound"


if __name__ == "__main__":
    with redirect_stdout(None):
        fuzz(sys.argv[1], Path(sys.argv[2]))
