"""Entry point of the group ``vllm.general_plugins``; vLLM calls it in each of its processes."""

from __future__ import annotations

import logging


def register() -> None:
    """Make Ouroboros selectable; safe to call more than once, and never in vLLM's way.

    With a vLLM version that we do not know, selecting us is refused at start-up (see `compat`),
    and everything else runs as if we were not installed.
    """
    from vllm_ouroboros.integration.patches import apply_all

    try:
        apply_all()
    except (AttributeError, ImportError, StopIteration) as error:
        logging.getLogger("vllm_ouroboros").warning("Ouroboros is off, vLLM has changed: %r", error)
