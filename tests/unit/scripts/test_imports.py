"""What scripts import is there: beside them, installed, or a name of the package."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
FILES = sorted(SCRIPTS.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SCRIPTS)))
def test_a_script_finds_what_it_imports(file: Path) -> None:
    tree = ast.parse(file.read_text())
    for node in tree.body:  # what functions import may be optional
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            root = name.split(".")[0]
            assert file.with_name(f"{root}.py").is_file() or find_spec(root), name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_ouroboros."):
            if ".kernels" in node.module:  # Triton may be missing
                continue
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module


def test_no_two_scripts_share_a_name() -> None:
    """Several folders of scripts may be on sys.path at a time."""
    names = [file.name for file in FILES]
    assert len(set(names)) == len(names)
