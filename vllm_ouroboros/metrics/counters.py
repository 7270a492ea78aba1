"""Counters of the engine's life."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vllm_ouroboros.trees.draft_tree import NodeSource


@dataclass
class Counters:
    """Sums since the engine started; see ``vllm_ouroboros.stats``."""

    target_forwards: int = 0
    draft_forwards: int = 0
    steps: int = 0
    emitted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_from_draft: int = 0
    accepted_from_suffix: int = 0
    verified_nodes: int = 0

    def count_accepted(self, sources: list[int]) -> None:
        """Count the tokens of one step by `NodeSource`."""
        self.accepted_from_draft += sources.count(NodeSource.DRAFT)
        self.accepted_from_suffix += sources.count(NodeSource.SUFFIX)
        self.accepted_tokens = self.accepted_from_draft + self.accepted_from_suffix

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        return asdict(self)
