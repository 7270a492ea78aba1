"""The time of a forward is told once."""

from __future__ import annotations

import time

import pytest

from vllm_ouroboros.metrics.forward_timer import HostTimer


def test_a_block_is_timed_and_told_once() -> None:
    timer = HostTimer()
    assert timer.take() is None
    before = time.perf_counter()
    with timer:
        time.sleep(0.01)
    most = time.perf_counter() - before
    seconds = timer.take()
    assert seconds is not None and 0.01 <= seconds <= most
    assert timer.take() is None


def test_a_block_that_fails_is_timed() -> None:
    timer = HostTimer()
    with pytest.raises(ValueError), timer:
        raise ValueError
    assert timer.take() is not None
