"""An engine in a process of its own: what it reports, how it fails and ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ouroboros import demo
from vllm_ouroboros.demo_engine import EngineJob, match_origins, token_pieces
from vllm_ouroboros.engine_process import first_cause, one_line

from .cli_fakes import job

# -- an engine's process -----------------------------------------------------------------------

CHILD = """
import subprocess, sys, pickle
from multiprocessing.connection import Connection
events = Connection(int(sys.argv[1]), readable=False)
job = pickle.load(sys.stdin.buffer)
"""


def run_child(monkeypatch: pytest.MonkeyPatch, code: str) -> object:
    monkeypatch.setattr(demo, "_CHILD", CHILD + code)
    engine = EngineJob("m", None, ("a",), 8, "float32", 1)
    seen: list[tuple[str, int]] = []
    result = demo._run_engine(engine, "vanilla", lambda _, p, n: seen.append((p, n)), False)
    return result, seen


def test_events_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    result, seen = run_child(
        monkeypatch,
        'events.send(("phase", "load"))\n'
        'events.send(("done", 1))\n'
        'events.send(("result", job.prompts))',
    )
    assert result == ("a",)
    assert seen == [("load", 0), ("", 1)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('events.send(("error", "ValueError: no"))', "vanilla vLLM: ValueError: no (--verbose"),
        (
            'print("(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] a.b.MyError: deep")\n'
            "sys.stdout.flush()\n"
            'events.send(("error", "RuntimeError: Engine core initialization failed. See"))',
            "vanilla vLLM: MyError: deep (--verbose",
        ),
        ("sys.exit(3)", "process ended with status 3"),
        ("import os; os.abort()", "process ended with status -6"),
    ],
)
def test_errors_of_an_engine(monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    with pytest.raises(demo.DemoError, match=re.escape(message)):
        run_child(monkeypatch, code)


def test_nothing_of_an_engine_stays_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run_child(
        monkeypatch,
        'child = subprocess.Popen(["sleep", "600"]); events.send(("result", child.pid))',
    )
    assert isinstance(result, int)
    state = Path(f"/proc/{result}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_an_engine_ends_with_its_parent() -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from vllm_ouroboros import engine_process as p; p.end_with_parent()",
        ],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(30) == -signal.SIGKILL


def test_environment_of_an_engine(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    local = job(model=model).engine(ouroboros=True)
    remote = job(model=model, draft_model="owner/name").engine(ouroboros=True)
    assert demo._environ(local, verbose=False)["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert "VLLM_LOGGING_LEVEL" not in demo._environ(local, verbose=True)
    assert demo._environ(local, verbose=True)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in demo._environ(remote, verbose=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert demo._environ(local, verbose=False)["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert demo._environ(local, verbose=False)["PATH"] == os.environ["PATH"]


# -- what an engine reports --------------------------------------------------------------------


def test_pieces_hold_back_unfinished_characters() -> None:
    data = "a é𝄞 b".encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    for context in ([], [0x78], [0xC3]):
        pieces = token_pieces(decode, context, list(data))
        assert len(pieces) == len(data)
        if context != [0xC3]:
            assert "".join(pieces) == "a é𝄞 b"
            assert pieces[2:4] == ["", "é"]
    assert token_pieces(decode, [], [0x61, 0xF0]) == ["a", "\ufffd"]
    assert token_pieces(decode, [], []) == []


def test_origins_match_by_prefix_and_length() -> None:
    origins = {"1-abc": [1, 2, 0], "11-abc": [2], "2": [1]}
    assert match_origins(origins, "1", 3) == [1, 2, 0]
    assert match_origins(origins, "1", 2) == [1, 2]
    assert match_origins(origins, "2", 3) == [1, 0, 0]
    assert match_origins(origins, "3", 2) == [0, 0]


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
