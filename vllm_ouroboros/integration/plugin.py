"""Entry point of the group ``vllm.general_plugins``; vLLM calls it in each of its processes."""

from __future__ import annotations

import logging

HEAD = "vllm_ouroboros.heads.fspad:EagleFSPADLlamaForCausalLM"
HEADS = ("EagleFSPADLlama", "EagleFSPADQwen2", "EagleFSPADQwen3")
"""Architectures of FSPAD's draft heads, by the target's: the head itself is the same."""


def register() -> None:
    """Make Ouroboros and draft heads selectable; may be called again, never in vLLM's way.

    With a vLLM version that we do not know, selecting us is refused at start-up (see `compat`),
    and everything else runs as if we were not installed.
    """
    from vllm import ModelRegistry

    from vllm_ouroboros.integration.patches import apply_all

    try:
        for name in HEADS:
            ModelRegistry.register_model(f"{name}ForCausalLM", HEAD)
        apply_all()
    except (AttributeError, ImportError, StopIteration) as error:
        logging.getLogger("vllm_ouroboros").warning("Ouroboros is off, vLLM has changed: %r", error)
