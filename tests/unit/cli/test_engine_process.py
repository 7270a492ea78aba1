"""Engines in processes of their own: the dialogue, how they fail, pause and end, their memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ouroboros.cli import engine_process
from vllm_ouroboros.cli.engine_process import (
    EngineError,
    EngineProcess,
    available_memory,
    environ,
    first_cause,
    group_members,
    one_line,
    peak_memory,
)

from ..helpers.engine_children import CHILD, READY, gone, state

# -- the parent's side -------------------------------------------------------------------------


def test_an_engine_answers(start: Any) -> None:
    engine = start(
        READY + 'events.send(("done", 2)); events.send(("result", asked.upper())); events.recv()'
    )
    assert engine.facts == {"spec": "m"}
    seen: list[int] = []
    assert engine.ask("run", seen.append) == "RUN"
    assert seen == [2]
    assert 2**20 < peak_memory(engine.group) < 2**31
    assert available_memory() > 2**20
    began = time.monotonic()
    engine.end()
    assert time.monotonic() - began < 10


def test_pausing_stops_all_processes_and_ends_none(start: Any) -> None:
    engine = start(
        'child = subprocess.Popen(["sleep", "600"])\n'
        'events.send(("ready", {"child": child.pid})); events.recv()\n'
        'events.send(("result", 1)); events.recv()\n'
    )
    pid, child = engine.group, engine.facts["child"]
    assert {pid, child} <= set(group_members(pid))
    engine.pause()
    assert state(pid, "T") and state(child, "T")
    engine.resume()
    assert engine.ask("run") == 1
    engine.pause()
    engine.end()
    assert gone(pid) and gone(child)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('events.send(("error", "ValueError: no"))', "ValueError: no (--verbose"),
        (
            'print("(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] a.b.MyError: deep")\n'
            "sys.stdout.flush()\n"
            'events.send(("error", "RuntimeError: Engine core initialization failed. See"))',
            "MyError: deep (--verbose",
        ),
        ("sys.exit(3)", "ended with status 3"),
        ("os.abort()", "ended with status -6"),
    ],
)
def test_an_engine_that_does_not_start(start: Any, code: str, message: str) -> None:
    with pytest.raises(EngineError) as found:
        start(code)
    assert message in str(found.value)


def test_an_answer_that_fails_or_never_comes(start: Any) -> None:
    engine = start(READY + 'events.send(("error", "OutOfMemoryError: big"))')
    with pytest.raises(EngineError, match="OutOfMemoryError: big"):
        engine.ask("run")
    engine = start(READY + "time.sleep(600)", timeout=5)
    with pytest.raises(EngineError, match=r"silent for 5 s \(--timeout\)"):
        engine.ask("run")
    engine.end()
    assert gone(engine.group)


def test_a_stopped_engine_ends_with_its_parent() -> None:
    """Even when the parent is killed, which nothing in a stopped process could notice."""
    code = (
        "import time\n"
        "from vllm_ouroboros.cli import engine_process as p\n"
        f"p.child_code = lambda module: {CHILD + READY!r}\n"
        "e = p.EngineProcess('m', 'm', [])\n"
        "e.pause(); print(e.group, flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert state(pid, "T")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(100):
        if gone(pid):
            break
        time.sleep(0.1)
    assert gone(pid)


def test_environment_of_an_engine(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    local, remote = [model, None], [model, "owner/name"]
    assert environ(local, verbose=False)["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert "VLLM_LOGGING_LEVEL" not in environ(local, verbose=True)
    assert environ(local, verbose=True)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environ(remote, verbose=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert environ(local, verbose=False)["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert environ(local, verbose=False)["PATH"] == os.environ["PATH"]


# -- the child's side --------------------------------------------------------------------------


def test_the_dialogue_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        def __init__(self, spec: str) -> None:
            self.facts = {"spec": spec}

        def answer(self, wanted: int, done: Any) -> float:
            done(wanted)
            return 1 / wanted

    sent: list[Any] = []
    wanted = iter(["m", 2, 4, 0])
    fake = SimpleNamespace(recv=lambda: next(wanted), send=sent.append)
    monkeypatch.setattr(engine_process, "Connection", lambda _: fake)
    monkeypatch.setattr(engine_process, "end_with_parent", lambda: None)
    engine_process.serve(0, Engine)
    assert sent[:3] == [("ready", {"spec": "m"}), ("done", 2), ("result", 0.5)]
    assert sent[3:] == [
        ("done", 4), ("result", 0.25), ("done", 0), ("error", "ZeroDivisionError: division by zero")
    ]  # fmt: skip


def test_a_child_ends_when_it_is_told(start: Any) -> None:
    engine: EngineProcess = start(READY + "assert asked is None\nsys.exit(0)")
    engine.end()
    assert gone(engine.group)
    assert engine._child.returncode == 0


def test_an_engine_ends_with_its_parent() -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from vllm_ouroboros.cli import engine_process as p; p.end_with_parent()",
        ],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(30) == -signal.SIGKILL


# -- errors ------------------------------------------------------------------------------------


def test_first_cause() -> None:
    log = (
        "WARNING: nothing\n"
        "(EngineCore pid=7) ERROR 01-01 [core.py:1] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 01-01 [core.py:1] torch.x.OutOfMemoryError: too big: 3\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert first_cause(log) == "OutOfMemoryError: too big: 3"
    assert first_cause("RuntimeError: Engine core initialization failed.\n") is None
    assert first_cause("") is None


def test_one_line() -> None:
    text = (
        "1 validation error for ModelConfig\n  Value error, no such model [type=value_error, "
        "input_value=1]\n    For further information visit https://example.org"
    )
    assert one_line(ValueError(text)) == "ValueError: no such model"
    assert one_line(KeyError("a\nb")).count("\n") == 0
    assert len(one_line(ValueError("x" * 10_000))) == 400
