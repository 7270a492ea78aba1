"""The documents: options as they are, links that lead somewhere, tests that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vllm_ouroboros.config import OuroborosConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "scripts")),
]  # fmt: skip


def test_options_are_listed_with_their_defaults_and_ranges() -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    found = {
        row[0]: row[1:]
        for row in re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*?) \| .* \|$", text, re.MULTILINE)
    }
    fields = OuroborosConfig.model_fields
    assert list(found) == list(fields)
    for key, (default, limits) in found.items():
        assert json.loads(default) == fields[key].default, key
        bounds = {
            name: getattr(b, name)
            for b in fields[key].metadata
            for name in ("ge", "le")
            if hasattr(b, name)
        }
        if bounds:
            assert limits == f"{bounds['ge']} to {bounds['le']}", key


def anchors(document: Path) -> set[str]:
    """What a link may name behind the #, made of headings as GitHub does."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_headings_and_tests(document: Path) -> None:
    text = document.read_text()
    for file, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if file.startswith("http"):
            continue
        target = document.parent / file if file else document
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"
    for file, names in re.findall(r"\]\(([^)\s]*\.py)\)((?:`?[,;` ]*`::\w+`)+)", text):
        code = (document.parent / file).read_text()
        for name in re.findall(r"::(\w+)", names):
            assert f"def {name}(" in code, f"{file}::{name}"
