"""Heads side by side: tokens accepted of the same held-out texts, paired bootstrap intervals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pair_data import PairError

RESAMPLES = 10_000
INTERVAL = 2.5, 97.5  # percentiles

Kind = tuple[str, int]  # arm, passes


@dataclass(frozen=True)
class Comparison:
    """Heads of one kind, all their seeds, for a chain or a tree.

    Attributes:
        accepted: mean accepted tokens per draft, over texts and seeds.
        difference: from the baseline; 0 for the baseline itself.
        low, high: its 95 % interval over held-out texts.
    """

    kind: Kind
    seeds: int
    accepted: float
    difference: float
    low: float
    high: float


def tallies_path(work: Path, name: str) -> Path:
    """Where the counts of a head's accepted tokens are: int64 [texts, shapes, length + 1]."""
    return work / f"{name}.accepted.npy"


def compare(work: Path, baseline: Kind, shape: int, seed: int = 0) -> list[Comparison]:
    """Compare all heads of a work directory.

    Args:
        work: directory with ``heads.jsonl`` and the counts.
        baseline: arm and passes of the heads that others are held against.
        shape: index of the shape of the draft in the counts: chain, then tree.
        seed: of the resampling.

    Raises:
        PairError: no head of the baseline, or heads of different held-out texts.
    """
    records = [json.loads(line) for line in (work / "heads.jsonl").read_text().splitlines()]
    newest = {record["name"]: record for record in records}
    groups: dict[Kind, list[NDArray[np.int64]]] = {}
    for name, record in newest.items():
        counts = np.load(tallies_path(work, name))[:, shape]
        groups.setdefault((record["arm"], record["passes"]), []).append(counts)
    if baseline not in groups:
        raise PairError(f"--baseline: no head of {baseline[0]} with {baseline[1]} passes in {work}")
    if len({counts.shape for group in groups.values() for counts in group}) > 1:
        raise PairError(f"--work: the heads in {work} were tried on different held-out texts")
    sums = {kind: np.mean([_sums(counts) for counts in group], 0) for kind, group in groups.items()}
    texts = len(sums[baseline])
    picks = np.random.default_rng(seed).integers(0, texts, (RESAMPLES, texts))
    found = []
    for kind, group in groups.items():
        resampled = _mean(sums[kind][picks]) - _mean(sums[baseline][picks])
        low, high = np.percentile(resampled, INTERVAL)
        accepted = float(_mean(sums[kind]))
        difference = accepted - float(_mean(sums[baseline]))
        found.append(Comparison(kind, len(group), accepted, difference, float(low), float(high)))
    return sorted(found, key=lambda one: one.accepted)


def _sums(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Accepted tokens and drafts of each text, [texts, 2]."""
    return np.stack((counts @ np.arange(counts.shape[1]), counts.sum(1)), 1).astype(np.float64)


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accepted tokens per draft over texts [..., texts, 2]."""
    total = sums.sum(-2)
    return total[..., 0] / np.maximum(total[..., 1], 1)
