"""An engine with the runner, steps, graphs and kernels of CUDA devices; see `interpreted`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from vllm import SamplingParams

import vllm_ouroboros

PAIR = Path(vllm_ouroboros.__file__).parent / "assets" / "tiny-code"
PARAMS = [
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3},
]


@dataclass
class Case:
    """An engine and what must have been called in it."""

    name: str
    nodes: int
    options: dict
    batch: int
    tokens: int
    called: set[str]
    engine: dict = field(default_factory=dict)
    prompt: int = 40  # tokens: rows take long in the interpreter


CASES = (
    Case(
        "one request at a time",
        4,
        {
            "draft_model": str(PAIR / "draft"),
            "draft_tokens": 4,
            "window_size": 3,
            "guess_set_size": 2,
            "adaptive": False,
        },
        1,
        7,  # drafts take long in the interpreter
        {"tree", "graphs", "padded", "replays", "walks"},
    ),
    Case(
        "trees beside chunks of prompts",
        12,
        {"draft_model": None, "adaptive": False},
        3,
        16,
        {"tree", "graphs", "padded", "mixed", "walks"},
        {"max_num_batched_tokens": 48, "enable_chunked_prefill": True},  # chunks longer than trees
        prompt=64,
    ),
    Case(
        "a draft head",
        4,
        {"draft_model": str(PAIR / "head"), "draft_tokens": 3, "adaptive": False},
        2,
        7,
        {"tree", "replays", "walks"},
    ),
    Case(
        "adaptive trees, chunks of prompts",
        8,
        {"draft_model": None},
        3,
        16,
        {"tree", "graphs", "padded", "walks"},
        {"max_num_batched_tokens": 24, "enable_chunked_prefill": True},
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_vanilla(case, prompts, vanilla, tools) -> None:
    """Greedy requests, whose acceptance stays on the device, and a sampled one."""
    some = [ids[: case.prompt] for ids in prompts[: len(PARAMS)]]
    params = [{**one, "max_tokens": case.tokens} for one in PARAMS]
    expected = tools.tokens_of(vanilla(some, [SamplingParams(**one) for one in params]))
    job = {
        "engine": {
            **tools.BASE,
            **case.engine,
            "max_num_seqs": case.batch,
            "speculative_config": {"model": tools.PROPOSER, "num_speculative_tokens": case.nodes},
            "additional_config": {"ouroboros": case.options},
        },
        "prompts": some,
        "params": params,
    }
    program = Path(__file__).with_name("interpreted.py")
    child = subprocess.run(
        [sys.executable, "-P", str(program)],
        input=json.dumps(job), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    result = json.loads(child.stdout.splitlines()[-1])
    assert result["tokens"] == expected
    assert result["stats"]["accepted_tokens"] > 0
    assert case.called <= {name for name, count in result["calls"].items() if count}
