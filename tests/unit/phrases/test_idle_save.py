"""Saving while nothing is asked of the engine."""

from __future__ import annotations

import threading
import time

import pytest

from vllm_ouroboros.phrases.idle_save import IdleSave


class Saves:
    """Counts saves and can hold one."""

    def __init__(self) -> None:
        self.count, self.begun, self.gate = 0, threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self) -> None:
        self.begun.set()
        assert self.gate.wait(60)
        self.count += 1


def test_an_idle_engine_saves_once() -> None:
    saves = Saves()
    IdleSave(saves, 0.0).idle()
    assert saves.begun.wait(60)
    time.sleep(0.05)
    assert saves.count == 1


@pytest.mark.parametrize("again", [False, True])
def test_work_puts_the_save_off(again) -> None:
    saves = Saves()
    idle_save = IdleSave(saves, 0.2)
    idle_save.idle()
    idle_save.busy()
    if again:
        idle_save.idle()
    assert saves.begun.wait(60 if again else 0.5) == again
    time.sleep(0.3)
    assert saves.count == again


def test_work_waits_for_a_running_save() -> None:
    saves = Saves()
    saves.gate.clear()
    idle_save = IdleSave(saves, 0.0)
    idle_save.idle()
    assert saves.begun.wait(60)
    threading.Timer(0.1, saves.gate.set).start()
    idle_save.busy()
    assert saves.count == 1


def test_an_old_wait_does_not_save_after_a_new_one(monkeypatch) -> None:
    """A timer that has already fired when it is cancelled does nothing."""
    saves, started = Saves(), []
    monkeypatch.setattr(threading.Timer, "start", lambda timer: started.append(timer))
    idle_save = IdleSave(saves)
    idle_save.idle()
    idle_save.idle()
    first, second = started
    first.function(*first.args)
    assert saves.count == 0
    second.function(*second.args)
    second.function(*second.args)
    assert saves.count == 1


def test_without_a_thread_nothing_happens(monkeypatch) -> None:
    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", start)
    idle_save = IdleSave(Saves())
    idle_save.idle()
    idle_save.busy()
