"""The Ray cluster that all tests in this folder share, and what they ask engines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from vllm import SamplingParams

from .ray_programs import ray_cluster

NEW_TOKENS = 48


ALONE = "RAY" in os.environ
"""Whether nothing but tests of this folder runs: then they have one cluster to the end."""


@pytest.fixture(scope="session" if ALONE else "module")
def cluster(tmp_path_factory) -> Iterator[None]:
    """A cluster whose GPUs are none, but what vLLM's Ray executor gives to ranks."""
    serve = {
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    }
    cpus = 8 if ALONE else os.cpu_count() or 2
    with ray_cluster(tmp_path_factory.mktemp("cluster"), cpus=cpus, gpus=2, **serve):
        yield


class Asked(NamedTuple):
    """A prompt, and what vanilla vLLM answers."""

    prompt: str
    ids: list[int]
    tokens: list[int]
    text: str


@pytest.fixture(scope="session")
def asked(texts, tokenizer, vanilla) -> list[Asked]:
    """Prompts with the answers of one rank without speculation."""
    ids = [tokenizer.encode(text) for text in texts]
    outputs = vanilla(ids, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS))
    vanilla.engines.close()
    answers = [output.outputs[0] for output in outputs]
    return [
        Asked(text, tokens, list(answer.token_ids), answer.text)
        for text, tokens, answer in zip(texts, ids, answers, strict=True)
    ]
