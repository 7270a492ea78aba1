"""How much to draft and to verify: what nodes promise, against what forwards cost.

A step takes the nodes that make the expected tokens per second of the whole batch greatest, and
drafting goes on while it is worth its forwards. Steps without any draft are a choice; now and then
one with a draft looks whether that still holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vllm_ouroboros.costs import Costs
from vllm_ouroboros.estimates import Estimates, Leaning, bins, probabilities
from vllm_ouroboros.tree import ROOT, DraftTree

TRIAL, BLOCK = 16, 8  # steps that each way is tried at first, by turns of so many
PROBE, GLANCE = 400, 4  # after so many steps of the better way, so many of the other one
FORGET = 0.98  # what a step leaves of the steps before it
IDLE = 20.0  # a step that took so many times its forwards held a pause
SMOOTH = 0.1  # weight of a new step in averages


def prune(tree: DraftTree, keep: np.ndarray) -> DraftTree:
    """The tree of some nodes: ``keep`` bool [n] holds no node without its parent."""
    place = np.cumsum(keep) - 1
    parents = tree.parents[keep]
    parents = np.where(parents >= 0, place[parents], ROOT).astype(np.int32)
    kinds = None if tree.kinds is None else tree.kinds[keep]
    return DraftTree(tree.tokens[keep], parents, tree.sources[keep], kinds)


def best_size(gains: np.ndarray, requests: int, seconds: np.ndarray, spent: float) -> int:
    """How many nodes make the expected tokens per second of a step greatest.

    Args:
        gains: float64 [n], probabilities of all nodes of a batch, descending.
        requests: R, each of which gets a token without any node.
        seconds: float64 [R + n + 1 or more], of a target forward by rows.
        spent: seconds of the step beside that forward.
    """
    tokens = requests + np.concatenate([[0.0], np.cumsum(gains)])
    return int(np.argmax(tokens / (spent + seconds[requests : requests + len(tokens)])))


class Step(NamedTuple):
    """One step of the engine: verification, and the draft for the next step."""

    requests: int
    tokens: int  # emitted
    forwards: float  # seconds that the forwards of both models took
    drafted: bool  # whether the draft model ran
    decoding: bool  # whether no request was in its prompt


@dataclass
class Way:
    """Steps with, or without, the draft model: how fast they were of late."""

    tokens: float = 0.0
    seconds: float = 0.0
    steps: int = 0

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def observe(self, tokens: int, seconds: float) -> None:
        """One step."""
        self.tokens = FORGET * self.tokens + tokens
        self.seconds = FORGET * self.seconds + seconds
        self.steps += 1


@dataclass
class Ways:
    """Both ways for one size of batch, and whose turn it is."""

    without: Way = field(default_factory=Way)
    drafting: Way = field(default_factory=Way)
    turn: bool = True  # whether the draft model runs
    left: int = 0  # steps of this turn
    left_of_better: int = PROBE  # steps until the other way gets a glance

    def next(self) -> bool:
        """Whether the draft model runs in the next step."""
        if self.left == 0:
            if min(self.without.steps, self.drafting.steps) < TRIAL:
                self.turn, self.left = self.drafting.steps <= self.without.steps, BLOCK
            else:
                better = self.drafting.speed >= self.without.speed
                glance = self.turn == better and self.left_of_better == 0
                self.turn = better != glance
                self.left = GLANCE if glance else BLOCK
                self.left_of_better = PROBE if glance else max(0, self.left_of_better - BLOCK)
        self.left -= 1
        return self.turn


class Policy:
    """Decides for a batch, step by step.

    Args:
        costs: of this engine.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs, self.estimates = costs, Estimates()
        self.leanings: dict[int, Leaning] = {}  # by slot of a request
        self._ways: dict[int, Ways] = {}  # by size of batch
        self._gained = 1.0  # tokens that a draft forward adds to a chain
        self._last: tuple[float, Step] | None = None  # when the last step ended

    def leaning(self, slot: int) -> Leaning:
        """How a request differs from others; a new one does not."""
        return self.leanings.setdefault(slot, Leaning())

    def forget(self, slot: int) -> None:
        """The request of a slot is gone."""
        self.leanings.pop(slot, None)

    def drafts(self, requests: int) -> bool:
        """Whether the draft model should run for a batch of so many requests."""
        return self.costs.draft is not None and self._of(requests).next()

    def _of(self, requests: int) -> Ways:
        return self._ways.setdefault(requests.bit_length(), Ways())

    def plain_speed(self, requests: int) -> float:
        """Tokens per second of a batch without any speculation."""
        return requests / (self.costs.target.at(requests) + self.costs.overhead)

    def end_step(self, step: Step, now: float) -> None:
        """A step ended ``now`` (seconds of any clock), together with the draft for the next one."""
        last, self._last = self._last, (now, step)
        if last is None or last[1].requests != step.requests or not step.decoding:
            return
        seconds = now - last[0]
        if seconds > IDLE * step.forwards:  # the engine had nothing to do in between
            return
        self.costs.observe_overhead(seconds - step.forwards)
        if last[1].drafted == step.drafted:  # else it paid for one way and earned by the other
            ways = self._of(step.requests)
            way = ways.drafting if step.drafted else ways.without
            way.observe(step.tokens, seconds)

    def observe_round(self, gained: float) -> None:
        """A draft forward added so many tokens to a chain, on average."""
        self._gained += SMOOTH * (gained - self._gained)

    def goes_on(
        self, slots: np.ndarray, confidence: np.ndarray, lengths: np.ndarray, rows: int
    ) -> np.ndarray:
        """Which requests should have another draft forward: bool [R].

        Args:
            slots: int64 [R].
            confidence: float32 [R, B], of the tokens of each chain.
            lengths: int32 [R], tokens of each chain.
            rows: rows of that forward.
        """
        requests = len(slots)
        ends = np.ones(requests)
        for r, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
            rates = self.estimates.rates(self.leaning(slot))
            ends[r] = rates[bins(confidence[r, :length])].prod()
        way = self._of(requests).drafting
        speed = way.speed if way.steps >= TRIAL else self.plain_speed(requests)
        draft = self.costs.draft.at(rows) if self.costs.draft else 0.0
        target = self.costs.target
        row = (target.at(8 * requests + requests) - target.at(requests)) / (8 * requests)
        return ends * self._gained > speed * (draft / requests + row)

    def select(self, trees: list[DraftTree], slots: list[int], spent: float) -> list[DraftTree]:
        """The nodes of a batch's trees that are worth their rows.

        Args:
            trees: of the requests, with kinds.
            slots: of the same requests.
            spent: seconds that the draft of this step took.
        """
        if not trees:
            return []
        gains = [self.probabilities(*pair) for pair in zip(trees, slots, strict=True)]
        flat = np.concatenate(gains)
        order = np.argsort(-flat, kind="stable")  # a parent, which stands before, is no less
        spent += self.costs.overhead
        seconds = self.costs.target.table(len(trees) + len(flat))
        keep = np.zeros(len(flat), np.bool_)
        keep[order[: best_size(flat[order], len(trees), seconds, spent)]] = True
        parts = np.split(keep, np.cumsum([len(g) for g in gains])[:-1])
        return [prune(*pair) for pair in zip(trees, parts, strict=True)]

    def probabilities(self, tree: DraftTree, slot: int) -> np.ndarray:
        """Probability float64 [n] of each node of a request's tree to be accepted."""
        result = np.empty(len(tree.tokens))
        rates = self.estimates.rates(self.leaning(slot))
        probabilities(tree.parents, tree.kinds, rates, result)
        return result

    def learn(self, slot: int, tree: DraftTree, predicted: np.ndarray) -> None:
        """A request's tree was verified; ``predicted`` [n + 1] is the target's token per row."""
        if tree.kinds is not None:
            self.estimates.learn(tree, predicted, self.leaning(slot))
