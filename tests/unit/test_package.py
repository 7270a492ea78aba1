"""What `import vllm_ouroboros` offers."""

from __future__ import annotations

import importlib
import pkgutil

import vllm_ouroboros


def test_no_module_hides_a_public_function() -> None:
    """Importing a submodule sets an attribute of its name on the package."""
    for module in pkgutil.iter_modules(vllm_ouroboros.__path__):
        importlib.import_module(f"vllm_ouroboros.{module.name}")
    functions = set(vllm_ouroboros.__all__) - {"__version__"}
    assert {"stats", "trace", "take_origins", "reset_pool", "OuroborosProposer"} <= functions
    assert all(callable(getattr(vllm_ouroboros, name)) for name in functions)
