"""The draft model or head of a rank of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_ouroboros.draft.head import DraftHead
from vllm_ouroboros.draft.model import DraftModel
from vllm_ouroboros.heads.checkpoint import is_head
from vllm_ouroboros.integration.patches import one_rank

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_ouroboros.draft.ranks import Ranks


def draft_of_rank(path: str, vllm_config: VllmConfig, ranks: Ranks) -> DraftModel | None:
    """The draft model at a path, or this rank's part of it; None where the first rank runs all.

    Args:
        path: folder or hub id.
        vllm_config: of the engine.
        ranks: of the engine.
    """
    kind = DraftHead if is_head(path) else DraftModel
    several = ranks.leads or ranks.follows
    whole = several and kind.is_whole(vllm_config)
    if whole and ranks.follows:
        return None
    draft = kind(path, vllm_config)
    if whole:
        draft.sharding = one_rank
    elif several:
        draft.ranks = ranks
    return draft
