"""A demo's job and a command line for tests."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from vllm_ouroboros.cli.demo.job import Job
from vllm_ouroboros.cli.main import app


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def job(**changed: object) -> Job:
    options: dict = {
        "model": None,
        "draft_model": None,
        "prompts": ["def f():"],
        "max_tokens": 8,
        "dtype": "float32",
        "rounds": 2,
    }
    return Job.checked(**(options | changed))
