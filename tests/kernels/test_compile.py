"""Kernels compile to machine code and fit the card: the interpreter takes more than Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("compile_for_gpu.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile the kernels")
def test_kernels_compile(tmp_path) -> None:
    triton = pytest.importorskip("triton")
    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this Triton cannot compile for CUDA")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr
    assert set(done.stdout.split()) == {
        "_attend", "_merge", "_count_depths", "_best_of_chunk", "_best_of_row", "_walk", "_compact",
    }  # fmt: skip
