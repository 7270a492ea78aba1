"""Thousands of broken files: none raises, hangs, takes memory, or gets past the checks."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

READER = Path(__file__).parents[1] / "helpers" / "broken_files.py"


@pytest.mark.parametrize("kind", ["pools", "costs"])
def test_broken_files_do_no_harm(kind: str, tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # many times as fast as a disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        command = [sys.executable, str(READER), kind, folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert done.returncode == 0, f"status {done.returncode}, {tmp_path}:\n{done.stderr[-4000:]}"
