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
    prompt: int = 24  # tokens: rows take long in the interpreter


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
        5,  # drafts take long in the interpreter
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
        5,
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
        prompt=40,
    ),
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Call with a job; see the program of this name."""
    log = tmp_path_factory.mktemp("interpreted") / "log"
    program = Path(__file__).with_name("interpreted.py")
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as process,
    ):  # fmt: skip
        yield lambda job: ask(process, job, log)


def ask(process: subprocess.Popen, job: dict, log: Path) -> dict:
    print(json.dumps(job), file=process.stdin, flush=True)
    answer = json.loads(process.stdout.readline() or "{}")
    assert answer, log.read_text(errors="replace")[-3000:]
    return answer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_vanilla(case, interpreted, prompts, vanilla, tools) -> None:
    """Greedy requests, whose acceptance stays on the device, and a sampled one."""
    some = [ids[: case.prompt] for ids in prompts[: len(PARAMS)]]
    params = [{**one, "max_tokens": case.tokens} for one in PARAMS]
    expected = tools.tokens_of(vanilla(some, [SamplingParams(**one) for one in params]))
    job = {
        "engine": {
            **tools.BASE,
            "max_model_len": 128,  # of which launches have a quarter of 512's programs
            **case.engine,
            "max_num_seqs": case.batch,
            "speculative_config": {"model": tools.PROPOSER, "num_speculative_tokens": case.nodes},
            "additional_config": {"ouroboros": case.options},
        },
        "prompts": some,
        "params": params,
    }
    result = interpreted(job)
    assert result["tokens"] == expected
    assert result["stats"]["accepted_tokens"] > 0
    assert case.called <= {name for name, count in result["calls"].items() if count}
