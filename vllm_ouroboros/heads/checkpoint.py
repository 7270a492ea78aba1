"""Draft heads by their files; needs neither vLLM nor a compiled loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EAGLE = "EagleLlamaForCausalLM"


def is_head(path: str) -> bool:
    """Whether a draft model is a head: a folder with ``config.json`` of an "Eagle" architecture.

    EAGLE's own checkpoints name their target's architecture; they have a tensor ``fc.weight``.
    """
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return is_named(config) or _has_fc(folder)


def is_named(config: dict[str, Any]) -> bool:
    return any(name.startswith("Eagle") for name in config.get("architectures") or [])


def _has_fc(folder: Path) -> bool:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
        if "fc.weight" in names:
            return True
    return False
