"""A demo's job and a command line for tests."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from vllm_ouroboros import cli, demo


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


def job(**changed: object) -> demo.Job:
    options: dict = {
        "model": None,
        "draft_model": None,
        "prompts": ["def f():"],
        "max_tokens": 8,
        "dtype": "float32",
        "rounds": 2,
    }
    return demo.Job.checked(**(options | changed))
