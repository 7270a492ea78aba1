"""Fixtures of the unit tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_ouroboros.cli import engine_process
from vllm_ouroboros.cli.engine_process import EngineProcess
from vllm_ouroboros.cli.inputs import TARGET
from vllm_ouroboros.phrases import pool_file

from .helpers.engine_children import CHILD


class Log(logging.Handler):
    """Records of the module's logger, whether or not vLLM has configured it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def warnings(self) -> list[str]:
        return [r.getMessage() for r in self.records if r.levelno >= logging.WARNING]


@pytest.fixture
def log():
    """What the module of pool files logs."""
    handler, level = Log(), pool_file.logger.level
    pool_file.logger.setLevel(logging.INFO)
    pool_file.logger.addHandler(handler)
    yield handler
    pool_file.logger.removeHandler(handler)
    pool_file.logger.setLevel(level)


@pytest.fixture
def path(tmp_path) -> Path:
    """Of a pool's file that is not there yet."""
    return tmp_path / "pool.safetensors"


@pytest.fixture(scope="module")
def vllm_config():
    """vLLM's current configuration, with the shipped target as its model."""
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config

    config = VllmConfig()
    config.model_config = ModelConfig(model=str(TARGET))
    with set_current_vllm_config(config):
        yield  # not the config: hypothesis prints its arguments, and a bare config has no repr


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that looks like a model's."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.fixture(scope="module")
def quick():
    """One thread, which tiny tensors like best, and no look for plugins at each turn."""
    import torch
    from vllm.v1.sample import logits_processor

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(logits_processor, "_load_logitsprocs_plugins", list)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts an engine's process that runs some code; it ends with the test."""
    started: list[EngineProcess] = []

    def start(code: str, timeout: float = 30) -> EngineProcess:
        monkeypatch.setattr(engine_process, "child_code", lambda module: CHILD + code)
        started.append(EngineProcess("m", "m", [], timeout=timeout))
        return started[-1]

    yield start
    for engine in started:
        if not engine._log.closed:
            engine.end()
