"""Ray Serve under load, which adds a replica, and an engine that dies.

`RAY=1` in the environment runs it, with nothing beside it.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import psutil
import pytest
from openai import APIStatusError, OpenAI

from .conftest import NEW_TOKENS
from .ray_programs import below, processes, serving_on_ray, title_of

pytestmark = pytest.mark.skipif("RAY" not in os.environ, reason="RAY=1 runs them, alone")


def test_serving_scales_without_loss(cluster, asked, tmp_path) -> None:
    """From one replica to two under load; then the engine of one dies."""
    some = [one.prompt for one in asked[:24]]
    expected = [one.text for one in asked[:24]]

    def replicas() -> list[psutil.Process]:
        return [
            one
            for one in processes("ReplicaServer:tiny")
            if any("VLLM::Worker" in title_of(child) for child in below(one))
        ]

    more = (
        *("--address", os.environ["RAY_ADDRESS"], "--ouroboros-config", '{"adaptive": false}'),
        *("--replicas", "1-2", "--requests", "2", "--delay", "1"),
    )

    def engines() -> list[psutil.Process]:
        found = [one for replica in replicas() for one in below(replica)]
        return [one for one in found if "VLLM::Worker" in title_of(one)]

    with serving_on_ray(tmp_path, *more) as address, ThreadPoolExecutor(8) as threads:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)

        def ask(text: str) -> str:
            answer = client.completions.create(
                model="tiny", prompt=text, temperature=0, max_tokens=NEW_TOKENS
            )
            return answer.choices[0].text

        until, both = time.monotonic() + 240, []
        while not both and time.monotonic() < until:
            assert [*threads.map(ask, some)] == expected
            both = engines() if len(replicas()) == 2 else []
        before = [one.cpu_times().user for one in both]
        assert [*threads.map(ask, some)] == expected
        after = [one.cpu_times().user for one in both]
        assert min(np.subtract(after, before)) > 0.2, "each of two replicas answers"
        # what runs in a replica whose engine dies is lost, and nothing else
        engine, other = both
        asked_for = count()

        def attempt(i: int) -> str | Exception:
            if next(asked_for) == 16:
                engine.kill()
            try:
                return ask(some[i])
            except APIStatusError as error:
                return error

        order = [*range(24)] * 3
        found = [*threads.map(attempt, order)]
        assert other.is_running()
        assert other.status() != psutil.STATUS_ZOMBIE
    lost = [one for one in found if not isinstance(one, str)]
    assert 0 < len(lost) < 8, f"{len(lost)} requests failed, of 8 that two replicas had"
    assert all(one in (expected[i], *lost) for i, one in zip(order, found, strict=True))
