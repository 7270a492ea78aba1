"""Events of a device stand in for its clock."""

from __future__ import annotations

import pytest
import torch

from vllm_ouroboros.verify.cuda.device_timer import DeviceTimer


class Event:
    """Recorded at some millisecond, over when told so."""

    now, over = 0.0, False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return Event.over

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_seconds_are_told_once_they_are_known(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = DeviceTimer()
    assert timer.take() is None
    with timer:
        Event.now = 250.0
    assert timer.take() is None
    Event.over = True
    assert timer.take() == pytest.approx(0.25)
    assert timer.take() is None
