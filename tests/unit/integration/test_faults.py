"""Faults while drafting: pauses that grow, and what kind each one is."""

from __future__ import annotations

import pytest
import torch

from vllm_ouroboros.integration.faults import FORGIVEN_AFTER, MAX_PAUSE, Pause, fault_of
from vllm_ouroboros.metrics.counters import Counters, Fault
from vllm_ouroboros.phrases.arrays import PoolFault


def length(pause: Pause) -> int:
    """Steps that a pause takes."""
    steps = 0
    while pause.takes():
        steps += 1
    return steps


def test_pauses_grow_while_faults_go_on() -> None:
    counters = Counters()
    pause = Pause(counters)
    lengths = []
    for _ in range(16):
        assert not pause.lasts
        pause.begin(ValueError())
        lengths.append(length(pause))
    assert lengths[:6] == [0, 1, 2, 4, 8, 16]
    assert lengths[-1] == MAX_PAUSE
    assert counters.faults[Fault.EXCEPTION] == 16


def test_a_fault_after_a_long_time_is_a_first_one() -> None:
    pause = Pause(Counters())
    for _ in range(4):
        pause.begin(ValueError())
        length(pause)
    for _ in range(FORGIVEN_AFTER + 1):
        assert not pause.takes()
    pause.begin(ValueError())
    assert length(pause) == 0


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), Fault.EXCEPTION),
        (IndexError(), Fault.EXCEPTION),
        (FloatingPointError("nan"), Fault.NONFINITE),
        (PoolFault("x"), Fault.POOL),
        (MemoryError(), Fault.MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory."), Fault.MEMORY),
    ],
    ids=repr,
)
def test_kinds(error, kind) -> None:
    assert fault_of(error) == kind


def test_the_cpu_without_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert fault_of(error.value) == Fault.MEMORY


def test_a_line_of_the_log_says_what_and_for_how_long(monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        "vllm_ouroboros.integration.faults.logger.warning",
        lambda text, *args, **more: lines.append(text % args),
    )
    pause = Pause(Counters())
    pause.begin(FloatingPointError("not finite"))
    pause.begin(MemoryError())
    assert "nonfinite: FloatingPointError: not finite" in lines[0]
    assert "for 1 step(s)" in lines[0]
    assert "memory: MemoryError" in lines[1]
    assert "for 2 step(s)" in lines[1]
