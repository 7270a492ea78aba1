"""Kernels run on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ..unit.helpers.quick_interpreter import patch_once

HERE = Path(__file__).parent
KERNELS = (
    "tree_attention", "tree_attention_device", "tree_depths", "tree_accept", "kv_compact",
)  # fmt: skip
PLAIN = ("test_reference.py", "test_tuned.py", "test_gpu_scripts.py")  # do without Triton
INTERPRET = not torch.cuda.is_available()

if find_spec("triton") is None:
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name not in PLAIN]
elif INTERPRET:
    # Triton decides when a function is decorated, its own library's included. vLLM may have
    # imported it already: then import it anew (but for its extension, which loads only once).
    stale = [f"vllm_ouroboros.kernels.{name}" for name in KERNELS]
    for module in list(sys.modules):
        own = module == "triton" or module.startswith("triton.")
        if module in stale or (own and not module.startswith("triton._C")):
            del sys.modules[module]
    os.environ["TRITON_INTERPRET"] = "1"
    import vllm_ouroboros.kernels.kv_compact
    import vllm_ouroboros.kernels.tree_accept
    import vllm_ouroboros.kernels.tree_attention  # noqa: F401

    patch_once()
    del os.environ["TRITON_INTERPRET"]  # engines that other tests start do without it

# Behind everything else: for `attention_cases`, which several test modules share.
sys.path.append(str(HERE))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tests' tensors live."""
    return "cpu" if INTERPRET else "cuda"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch) -> None:
    """The interpreter's switch, for the time of a test."""
    if INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
