"""What ``vllm_ouroboros.stats`` shows of an engine."""

from __future__ import annotations

from vllm_ouroboros.metrics.counters import Counters
from vllm_ouroboros.trees.drafting import Drafting


def flat_stats(counters: Counters, drafting: Drafting) -> dict[str, int]:
    """Counters since the start and what the pool holds, flat; see ``vllm_ouroboros.stats``."""
    pool = drafting.pool
    flat = counters.as_dict()
    flat["pool_phrases"] = len(pool)
    flat["pool_hits"] = int(pool.arrays.hits.sum())
    flat["pool_lookups"] = int(pool.arrays.lookups[0])
    flat["pool_bytes"] = pool.bytes
    flat["tree_bytes"] = drafting.bytes
    for source, count in pool.inserted().items():
        flat[f"pool_from_{source}"] = count
    return flat
