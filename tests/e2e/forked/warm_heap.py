"""What each engine would do first, done once before they fork.

The garbage collector of a fork leaves alone what is imported here: to look at it takes a second,
and copies most of the memory that forks share.
"""

from __future__ import annotations

import atexit
import gc

from vllm_ouroboros.policy import acceptance_estimates
from vllm_ouroboros.trees import warm_up

warm_up.warm_up()
acceptance_estimates.warm_up()
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # of this process: forks end without
