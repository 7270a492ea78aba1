"""scripts/bench/plot.py makes a picture of rows, also of those without figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="of the bench extra")
SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "bench"
sys.path.insert(0, str(SCRIPTS))

import plot  # noqa: E402


def row(method: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "cell", "method": method, "setting": "", "batch": 1, "rate": None, "status": "ok",
        "reason": None, "tokens_per_second": 2.0, "ratio": 1.5, "ratio_low": 1.4,
        "ratio_high": 1.6, "dtype": "bfloat16", "commit": "c0ffee",
        "hardware": {"cpu": "a CPU", "cores": 2}, "inflated": {"model": "a/b"},
    } | more  # fmt: skip


NOTHING = {"tokens_per_second": None, "ratio": None, "ratio_low": None, "ratio_high": None}


def test_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row("vanilla", ratio=1.0),
        row("draft_model", setting="K=3"),
        row("ngram", ratio_low=None, ratio_high=None),
        row("suffix", status="skipped", **NOTHING),
        row("ouroboros-cold", setting="γ=8", ratio=2.0, ratio_low=2.1),
        row("ouroboros-cold", batch=None, rate=0.5, ratio=0.9, ratio_low=0.8, ratio_high=1.0),
        row("ngram", batch=8, status="failed", **NOTHING),
        {"kind": "run", "method": "ngram"},
    ]
    file, out = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(file), "--out", str(out)])
    plot.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 10_000
    assert len(plot.read_rows([file])) == 6


def test_the_subtitle_says_what_it_was_measured_with() -> None:
    text = plot.subtitle([row("ngram"), row("suffix"), row("suffix", commit="beef")])
    assert text.startswith("a CPU, 2 cores, bfloat16, commit c0ffee, beef\n")
    assert "target inflated from a/b" in text
    assert "inflated" not in plot.subtitle([row("ngram", inflated={"model": None})])


def test_files_without_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    for content, message in ((json.dumps(row("vanilla")), "no rows of other"), ("{", "line 1 is")):
        file.write_text(content)
        monkeypatch.setattr(sys, "argv", ["plot.py", str(file)])
        with pytest.raises(SystemExit, match=message):
            plot.main()
