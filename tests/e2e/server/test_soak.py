"""The randomized soak of scripts/soak/soak.py, a short one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "soak"
sys.path.insert(0, str(SCRIPTS))

import soak  # noqa: E402


def test_random_requests(tmp_path: Path, capsys):
    """Streams, aborts, seeds, structures, preemption: no error, no hang, vanilla's answers."""
    status = soak.main(["--requests", "45", "--seed", "1", "--out", str(tmp_path)])
    report = capsys.readouterr().out
    assert status == 0, report
    figures = dict(line.split() for line in report.splitlines() if len(line.split()) == 2)
    for name in ("compared", "completed", "sampled", "structured", "left", "preempted"):
        assert int(figures[name]) > 0, name
    references = (tmp_path / "references.jsonl").read_text().splitlines()
    assert all(json.loads(line)["answer"]["status"] == 200 for line in references)
