"""A batch job of Ray Data, whose driver and engines are killed.

`RAY=1` in the environment runs it, with nothing beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from vllm_ouroboros.phrases.pool_file import PoolFile

from .conftest import NEW_TOKENS
from .ray_programs import ENGINE, below, processes

pytestmark = pytest.mark.skipif("RAY" not in os.environ, reason="RAY=1 runs them, alone")


def wait_until(found: Callable[[], object], process: subprocess.Popen, log: Path, what: str):
    """What is found at last, while a process runs."""
    until = time.monotonic() + 240
    while not (result := found()):
        ended = process.poll() is not None
        if ended or time.monotonic() > until:
            pytest.fail(f"{what}: {log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
    return result


def test_every_row_comes_out_once(cluster, asked, tmp_path) -> None:
    """Though the driver is killed and started again, and then one of the two engines that Ray made
    of one; bad rows cost themselves alone.
    """
    lines, table = tmp_path / "rows.jsonl", tmp_path / "table.parquet"
    out, log, pool = (tmp_path / name for name in ("answers.jsonl", "log", "pool"))
    good = [{"id": f"row {i}", "prompt": text} for i, (text, *_) in enumerate(asked)]
    bad = ["no JSON", json.dumps({"id": "long", "prompt": "x = 1\n" * 1000})]
    lines.write_text("".join(f"{line}\n" for line in [*map(json.dumps, good[:40]), *bad]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good[40:]), table, row_group_size=8)
    command = [
        *(sys.executable, "-P", "-m", "vllm_ouroboros.cli.main", "batch", str(lines), str(table)),
        *("--out", str(out), "--replicas", "1-2", "--batch-size", "2", "--plain", "--verbose"),
        *("--ouroboros-config", json.dumps({"adaptive": False, "pool_path": str(pool)})),
        *("--engine-args", json.dumps(ENGINE)),
        *("--sampling-params", json.dumps({"max_tokens": NEW_TOKENS})),
    ]

    def answers() -> list[dict]:
        return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    def start() -> subprocess.Popen:
        with log.open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def engines() -> set[psutil.Process]:
        return {*processes("vLLMEngineStageUDF")}

    job = start()
    try:
        wait_until(answers, job, log, "no answer")
        job.kill()
        job.wait()
        first, before = engines(), answers()
        assert 0 < len(before) < len(asked)
        job = start()
        counts: list[int] = []

        def both_answer() -> set[psutil.Process]:
            found = engines() - first
            counts.append(len(found))
            return found if len(found) == 2 and len(answers()) > len(before) else set()

        killed, _ = wait_until(both_answer, job, log, "no two engines")
        assert {*counts} == {0, 1, 2}, "one after the other"
        engine = below(killed)
        assert len(answers()) < len(asked)
        killed.kill()
        assert job.wait(400) == 1, log.read_text(errors="replace")[-4000:]  # bad rows
    finally:
        job.kill()
    psutil.wait_procs(engine, 30)
    assert not any(process.is_running() for process in engine), "an engine outlived its replica"
    found = answers()
    assert Counter(row["id"] for row in found) == Counter(
        [*(row["id"] for row in good), "rows.jsonl:41", "long"]
    )
    answered = {row["id"]: row["text"] for row in found if row["error"] is None}
    assert [answered[row["id"]] for row in good] == [one.text for one in asked]
    errors = {row["id"]: row["error"] for row in found if row["error"] is not None}
    assert errors.keys() == {"rows.jsonl:41", "long"}
    assert errors["rows.jsonl:41"].startswith("JSONDecodeError")
    assert "maximum context length" in errors["long"]
    assert len(PoolFile.at(pool).rows()["keys"]) > 100, "what Ouroboros learned"
