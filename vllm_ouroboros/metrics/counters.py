"""Counters of the engine's life."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from vllm_ouroboros.trees.draft_tree import NodeSource

# plain numbers: comparing with members of an IntEnum takes several times as long
_DRAFT, _SUFFIX = int(NodeSource.DRAFT), int(NodeSource.SUFFIX)


class Fault(IntEnum):
    """What may go wrong while drafting; none of it costs a request."""

    EXCEPTION = 0
    MEMORY = 1  # the draft model found none
    NONFINITE = 2  # its logits are no numbers
    POOL = 3  # the pool holds what it cannot hold


@dataclass
class Counters:
    """Sums since the engine started; see ``vllm_ouroboros.stats``."""

    target_forwards: int = 0
    draft_forwards: int = 0
    steps: int = 0
    steps_with_phrases: int = 0
    steps_with_draft: int = 0
    emitted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_from_draft: int = 0
    accepted_from_suffix: int = 0
    accepted_from_prediction: int = 0
    verified_nodes: int = 0
    expected_tokens: float = 0.0
    accepted_as_expected: int = 0
    accepted_lengths: list[int] = field(default_factory=list)
    """Verified trees by how many of their nodes were accepted."""
    faults: list[int] = field(default_factory=lambda: [0] * len(Fault))
    """By `Fault`."""

    def count_tree(self, sources: list[int], accepted: list[int], expected: float | None) -> None:
        """Count a verified tree.

        Args:
            sources: `NodeSource` of its nodes.
            accepted: of those that were accepted.
            expected: how many the policy expected to be accepted, if it cut this tree.
        """
        if _DRAFT in sources:
            self.steps_with_draft += 1
        else:
            self.steps_with_phrases += 1
        self.verified_nodes += len(sources)
        length, lengths = len(accepted), self.accepted_lengths
        if length:
            drafted, suffixes = accepted.count(_DRAFT), accepted.count(_SUFFIX)
            self.accepted_from_draft += drafted
            self.accepted_from_suffix += suffixes
            self.accepted_from_prediction += length - drafted - suffixes
            self.accepted_tokens += length
        if expected is not None:
            self.expected_tokens += expected
            self.accepted_as_expected += length
        if length >= len(lengths):
            lengths.extend([0] * (1 + length - len(lengths)))
        lengths[length] += 1

    def as_dict(self) -> dict[str, int]:
        """All numbers by name, whole ones; of faults their sum."""
        numbers = {name: value for name, value in vars(self).items() if not isinstance(value, list)}
        return {name: round(value) for name, value in numbers.items()} | {
            "faults": sum(self.faults)
        }
