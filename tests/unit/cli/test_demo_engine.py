"""The demo's engines: in turns or one after the other, and what each of them reports."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_ouroboros.cli.demo import run as demo
from vllm_ouroboros.cli.demo.engine import EngineJob, EngineResult, match_origins, token_pieces
from vllm_ouroboros.cli.engine_process import EngineError
from vllm_ouroboros.cli.inputs import InputError

from ..helpers.cli_fakes import job

# -- the parent's side -------------------------------------------------------------------------


class Stage:
    """Engines that note down what happens to them, and how they stand."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.running: set[str] = set()
        self.broken = ""  # what fails
        self.device = "cpu"

    def start(self, module: str, spec: EngineJob, models: Any, *, verbose: bool) -> Any:
        return StageEngine(self, "ours" if spec.ouroboros is not None else "vanilla")

    def note(self, what: str) -> None:
        self.log.append(what)
        if what == self.broken:
            raise EngineError("MyError: no")


class StageEngine:
    def __init__(self, stage: Stage, name: str) -> None:
        self.stage, self.name, self.group = stage, name, 1
        self.facts = {"device": stage.device}
        stage.note(f"{name} starts")
        stage.running.add(name)

    def ask(self, what: str, done: Any) -> EngineResult | None:
        assert self.stage.running == {self.name}, "one engine works, the others stand still"
        self.stage.note(f"{self.name} {what}")
        return EngineResult([], {self.name: 1}) if what == "result" else None

    def pause(self) -> None:
        self.stage.running.discard(self.name)

    def resume(self) -> None:
        self.stage.running.add(self.name)

    def end(self) -> None:
        self.stage.running.discard(self.name)
        self.stage.note(f"{self.name} ends")


class Shown:
    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []

    def phase(self, text: str, requests: int | None = None) -> None:
        self.phases.append((text, requests))

    def done(self, count: int) -> None:
        pass


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage()
    monkeypatch.setattr(demo, "EngineProcess", stage.start)
    monkeypatch.setattr(demo, "peak_memory", lambda group: 10)
    monkeypatch.setattr(demo, "available_memory", lambda: 21)
    return stage


def test_both_engines_take_turns(stage: Stage, model: str) -> None:
    shown = Shown()
    results = demo._run_engines(job(model=model), shown, False)
    assert stage.log[:4] == ["vanilla starts", "vanilla warm", "ours starts", "ours warm"]
    assert stage.log[4:8] == ["vanilla time", "ours time"] * 2
    assert stage.log[8:10] == ["vanilla result", "ours result"]
    assert sorted(stage.log[10:]) == ["ours ends", "vanilla ends"]
    assert [results[name].counters for name in ("vanilla", "ouroboros")] == [
        {"vanilla": 1}, {"ours": 1}
    ]  # fmt: skip
    assert shown.phases[-1] == ("vanilla vLLM and Ouroboros: generating, in turns", 4)


@pytest.mark.parametrize("why", ["device", "memory"])
def test_one_engine_after_the_other(
    stage: Stage, model: str, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "device":
        stage.device = "cuda"
    else:
        monkeypatch.setattr(demo, "available_memory", lambda: 20)
    results = demo._run_engines(job(model=model), Shown(), False)
    assert stage.log == [
        f"{name} {what}"
        for name in ("vanilla", "ours")
        for what in ("starts", "warm", "time", "time", "result", "ends")
    ]
    assert set(results) == {"vanilla", "ouroboros"}


@pytest.mark.parametrize("what", ["starts", "warm", "time", "result"])
@pytest.mark.parametrize(("name", "title"), [("vanilla", "vanilla vLLM"), ("ours", "Ouroboros")])
def test_an_error_says_whose_it_is_and_ends_both(
    stage: Stage, model: str, name: str, title: str, what: str
) -> None:
    stage.broken = f"{name} {what}"
    with pytest.raises(InputError, match=f"^{title}: MyError: no$"):
        demo._run_engines(job(model=model), Shown(), False)
    assert not stage.running
    started = sum(entry.endswith("starts") for entry in stage.log) - (what == "starts")
    assert sum(entry.endswith("ends") for entry in stage.log) == started


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
