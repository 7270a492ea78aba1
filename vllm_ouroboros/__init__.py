"""Ouroboros speculative decoding for vLLM: lossless, training-free (arXiv 2402.13720)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_ouroboros.integration.proposer import OuroborosProposer

__version__ = "0.1.0"
__all__ = ["OuroborosProposer", "__version__", "reset_pool", "stats", "take_origins", "trace"]


def __getattr__(name: str) -> Any:
    if name == "OuroborosProposer":  # importing it imports vLLM
        from vllm_ouroboros.integration.proposer import OuroborosProposer

        return OuroborosProposer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def stats(llm: Any) -> dict[str, int]:
    """Counters of an engine, summed over its life.

    Args:
        llm: a ``vllm.LLM`` that runs with our proposer.

    Returns:
        ``target_forwards`` (of whole batches), ``draft_forwards``, ``steps`` (verifications of one
        request, the one that ends its prompt included), ``steps_with_phrases`` and
        ``steps_with_draft`` (those that verified a tree, of phrases alone or not),
        ``emitted_tokens``, ``accepted_tokens`` = ``accepted_from_draft`` +
        ``accepted_from_suffix`` + ``accepted_from_prediction``, ``verified_nodes``,
        ``expected_tokens`` (what the policy expected to be accepted) and ``accepted_as_expected``
        (what was, of the same trees), ``faults``, ``pool_phrases``, ``pool_hits``,
        ``pool_lookups``, ``pool_from_*`` (insertions by source), ``pool_bytes`` and
        ``tree_bytes``.
    """
    return llm.collective_rpc("ouroboros_stats")[0]


def reset_pool(llm: Any) -> None:
    """Forget all phrases; counters and running requests go on."""
    llm.collective_rpc("ouroboros_reset_pool")


def trace(llm: Any, enabled: bool = True) -> None:
    """Start or stop recording who proposed each token; read it with `take_origins`."""
    llm.collective_rpc("ouroboros_trace", args=(enabled,))


def take_origins(llm: Any) -> dict[str, list[int]]:
    """Who proposed each token of the requests that finished since the last call.

    Returns:
        By internal request id, one number a token: 0 the target, 1 the draft chain, 2 a phrase of
        the pool, 3 its prediction. A request counts as finished once the engine has run a step
        after its last one.
    """
    return llm.collective_rpc("ouroboros_origins")[0]
