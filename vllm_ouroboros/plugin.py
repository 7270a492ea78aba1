"""Entry point of the group ``vllm.general_plugins``; vLLM calls it in each of its processes."""

from __future__ import annotations

import logging


def register() -> None:
    """Make Ouroboros selectable; safe to call more than once, and never in vLLM's way.

    With a vLLM version that we do not know nothing is patched: selecting us then fails in the
    proposer with the versions that work, and everything else runs as if we were not installed.
    """
    from vllm_ouroboros.compat import check_version, vllm_version

    problems = check_version(vllm_version())
    if problems:
        logging.getLogger("vllm_ouroboros").warning("Ouroboros is off: %s", problems[0])
        return
    from vllm_ouroboros.patches import apply_all

    apply_all()
