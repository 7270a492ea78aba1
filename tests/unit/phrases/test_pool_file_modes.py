"""Who may read what stands beside a pool: its owner alone, whatever the umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_ouroboros.policy.forward_costs import CostCurve, Costs

from ..helpers.pool_files import make, small_pool

PRIVATE = 0o600


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[int]]:
    """Modes of files by the end of their name, from when they are opened until they have theirs."""
    modes: dict[str, set[int]] = {}
    opened, replaced = os.open, Path.replace

    def note(name: object) -> None:
        mode = stat.S_IMODE(Path(str(name)).stat().st_mode)
        modes.setdefault(str(name).rpartition(".")[2], set()).add(mode)

    def open_(name, *args, **options):
        descriptor = opened(name, *args, **options)
        note(name)
        return descriptor

    def replace(self, target):
        note(self)
        return replaced(self, target)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(Path, "replace", replace)
    return modes


def modes_of(folder: Path) -> dict[str, int]:
    return {one.name: stat.S_IMODE(one.stat().st_mode) for one in folder.iterdir()}


def test_new_files_are_their_owners_alone_from_the_start(umask, path, seen) -> None:
    assert make(path).save(small_pool())
    Costs(CostCurve([1], [1.0]), None).save(str(path))
    names = path.name, f".{path.name}.lock", f"{path.name}.costs.json"
    assert modes_of(path.parent) == dict.fromkeys(names, PRIVATE)
    assert seen == {name: {PRIVATE} for name in ("lock", "ouroboros-tmp", "tmp")}


def test_others_may_be_let_in(umask, path) -> None:
    """The modes of a pool and its lock stay as they were set; costs have no mode to keep."""
    for turn in range(2):
        make(path).save(small_pool())
        Costs(CostCurve([1], [1.0]), None).save(str(path))
        if not turn:
            for one in path.parent.iterdir():
                one.chmod(0o660)
    lock, costs = f".{path.name}.lock", f"{path.name}.costs.json"
    assert modes_of(path.parent) == {path.name: 0o660, lock: 0o660, costs: PRIVATE}
