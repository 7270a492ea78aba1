"""Imported by the abused server's worker (``--worker-extension-cls abuse_worker.Extension``): its
pool is saved every ABUSE_SAVE_SECONDS.
"""

from __future__ import annotations

import os

from vllm_ouroboros.phrases import pool_file

pool_file.SAVE_INTERVAL_S = float(os.environ["ABUSE_SAVE_SECONDS"])


class Extension:
    """Adds nothing to the worker."""
