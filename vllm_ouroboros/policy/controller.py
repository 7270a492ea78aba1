"""How much to draft and to verify: what nodes promise, against what forwards cost.

Time is worth what the batch makes of it on average, its tokens per second. A node is verified if it
promises more tokens than the time of its row is worth, a draft forward is run if what it adds is
worth its time. Steps without any draft are a choice; now and then one with a draft looks whether
that still holds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vllm_ouroboros.policy.acceptance_estimates import Estimates, Leaning, lean
from vllm_ouroboros.policy.forward_costs import Costs, refined
from vllm_ouroboros.policy.request_statistics import SMOOTH, Known, Manner
from vllm_ouroboros.policy.throughput import Speed, Step
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.node_kinds import EDGES

PROBING = 0.008  # share of all time that looking at drafts which do not pay may take
IDLE = 20.0  # a step that took so many times its forwards held a pause
FLOOR = 0.01  # probability below which a node is never worth its host work
EXTRA = 0.025  # of a plain step, which a draft forward may take for guesses and window
LOOK = 4  # steps that a look at drafts takes
DOUBT = 2.5  # what the odds of a node are divided by: of many, those overrated look best


class Policy:
    """Decides for a batch, step by step.

    Args:
        costs: of this engine.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.greedy, self.drawn = Manner(), Manner()
        self.requests: dict[int, Known] = {}  # by slot
        self._speeds: dict[int, Speed] = {}  # by size of batch
        self._gained = 1.0  # tokens that a draft forward adds to a chain
        self._rounds = 2.0  # rounds that drafting for a step takes, as long as one may be
        self._longest = 1.0  # seconds that a round may take
        self._unlooked = 0.0  # seconds that passed without a draft
        self._drafted = False  # whether drafting has ever been tried
        self._pays = True  # whether drafting did when it was last weighed
        self._look = 0  # steps that are still drafted for, to see whether it pays
        self._spare = 0.0  # seconds that such a look may spend on reading
        self._last: tuple[float, Step] | None = None  # when the last step ended

    # -- requests and batches ------------------------------------------------------------------

    def meet(self, slot: int, greedy: bool) -> None:
        """A request is to be drafted for; a new one is like others that choose as it does."""
        known = self.requests.get(slot)
        if known is None:
            self.requests[slot] = Known(self.greedy if greedy else self.drawn)
        else:
            known.go_on()

    def forget(self, slot: int) -> None:
        """The request of a slot is gone."""
        known = self.requests.pop(slot, None)
        if known is not None:
            known.end()

    def plain_step(self, requests: int) -> float:
        """Seconds of a step of a batch without any speculation."""
        return self.costs.target.at(requests) + self.costs.overhead

    def speed(self, requests: int) -> float:
        """Tokens per second of a batch: what a second is worth."""
        return max(self._speed(requests).value, requests / self.plain_step(requests))

    def _speed(self, requests: int) -> Speed:
        return self._speeds.setdefault(requests.bit_length(), Speed())

    def _row(self, requests: int) -> float:
        """Seconds that a node adds to a target forward, on average over a small tree."""
        target = self.costs.target
        return (target.at(9 * requests) - target.at(requests)) / (8 * requests)

    def row_worth(self, requests: int) -> float:
        """Probability that a node must have; above 1 where no row is worth its time."""
        price = self.speed(requests) * self._row(requests)
        return DOUBT * price / (1 - price + DOUBT * price) if price < 1 else price

    def end_step(self, step: Step, now: float) -> None:
        """A step ended ``now`` (seconds of any clock), together with the draft for the next one."""
        last, self._last = self._last, (now, step)
        if last is None:
            return
        seconds = now - last[0]
        if seconds > IDLE * step.forwards:  # the engine had nothing to do in between
            return
        self._unlooked += seconds
        for manner in (self.greedy, self.drawn):
            manner.estimates.fade()
        if last[1].requests == step.requests and step.decoding:
            self.costs.observe_overhead(seconds - step.forwards, step.drafted)
            self._speed(step.requests).observe(step.tokens, seconds)

    # -- drafting ------------------------------------------------------------------------------

    def reads(self, slot: int, tokens: int) -> bool:
        """Whether the draft model should read so many tokens of a prompt while it is at work."""
        known = self.requests.get(slot)
        if known is None or self.costs.draft is None or not self._pays:
            return False
        price = self.speed(len(self.requests)) * self.costs.draft.at(tokens)
        return known.usual * known.manner.steps > price

    def drafts(
        self,
        slots: np.ndarray,
        promised: np.ndarray,
        rows: int,
        lags: np.ndarray,
        limits: np.ndarray,
    ) -> np.ndarray:
        """For which requests the draft model should run: bool [R].

        Args:
            slots: int64 [R].
            promised: float64 [R], tokens that each tree promises without the draft model.
            rows: of one draft forward for all of them.
            lags: int32 [R], tokens that it would have to read first.
            limits: int32 [R], tokens that each request may still have.
        """
        if self.costs.draft is None:
            return np.zeros(len(slots), np.bool_)
        known = [self.requests[slot] for slot in slots.tolist()]
        added = [one.expect(p) for one, p in zip(known, promised.tolist(), strict=True)]
        price, speed = self.costs.draft, self.speed(len(slots))
        reading = np.array([price.at(n) for n in lags.tolist()])
        steps = np.minimum([max(1.0, one.manner.steps) for one in known], limits)
        gains = np.array(added) - speed * reading / steps
        self._longest = self.costs.round(rows)
        seconds = self._rounds * self._longest + self.costs.drafting
        able = gains > 0
        self._pays = bool(gains[able].sum() > speed * seconds)
        chosen = able if self._pays else self._looked_at(reading, seconds)
        if chosen.any():
            self._unlooked, self._drafted = 0.0, True
        return chosen

    def _looked_at(self, reading: np.ndarray, seconds: float) -> np.ndarray:
        """For whom to draft although it does not pay, to see whether that still holds: bool [R].

        Args:
            reading: float64 [R], seconds that the draft model needs before it can start.
            seconds: that drafting for a step takes.
        """
        if self._look == 0:
            self._spare = self._unlooked * PROBING - LOOK * seconds
            if not self._drafted:  # what it costs is only known from the start of the engine
                self._spare = float(reading.min())
        order = np.argsort(reading, kind="stable")  # those that are read soonest
        chosen = np.zeros(len(reading), np.bool_)
        chosen[order] = np.cumsum(reading[order]) <= self._spare
        if chosen.any():
            self._spare -= reading[chosen].sum()
            self._look = (self._look or LOOK) - 1
        else:  # whom it read is gone: the next look is another one
            self._look = 0
        return chosen

    def affords(self, requests: int, rows: int, fewer: int) -> bool:
        """Whether a draft forward may have so many rows where fewer would do."""
        assert self.costs.draft is not None
        more = self.costs.draft.at(rows) - self.costs.draft.at(fewer)
        return more <= EXTRA * self.plain_step(requests)

    def observe_round(self, gained: float) -> None:
        """A draft forward added so many tokens to a chain, on average."""
        self._gained += SMOOTH * (gained - self._gained)

    def observe_drafting(self, seconds: float) -> None:
        """Drafting for a step took so long."""
        self._rounds = refined(self._rounds, seconds / self._longest, self._rounds)

    def goes_on(
        self, slots: np.ndarray, confidence: np.ndarray, lengths: np.ndarray, rows: int, batch: int
    ) -> np.ndarray:
        """Which requests should have another draft forward: bool [R].

        Args:
            slots: int64 [R].
            confidence: float32 [R, B], of the tokens of each chain.
            lengths: int32 [R], tokens of each chain.
            rows: rows of that forward.
            batch: requests of the step, others included.
        """
        sure = self._by_manner(
            slots.tolist(), lambda known, leanings: lean(known.grades(), leanings)
        )
        right = np.take_along_axis(sure, np.searchsorted(EDGES, confidence, "right"), 1)
        ends = np.where(np.arange(confidence.shape[1]) < lengths[:, None], right, 1.0).prod(1)
        gains = ends * self._gained - self.row_worth(batch)
        pays = gains[gains > 0].sum() > self.speed(batch) * self.costs.round(rows)
        return (gains > 0) & pays

    # -- verifying -----------------------------------------------------------------------------

    def rates(self, slots: list[int]) -> np.ndarray:
        """Rates float64 [R, KINDS] of the nodes of each request."""
        return self._by_manner(slots, Estimates.rates)

    def _by_manner(
        self, slots: list[int], of: Callable[[Estimates, list[Leaning]], np.ndarray]
    ) -> np.ndarray:
        """What ``of`` says for requests of one manner, put together: float64 [R, n]."""
        known = [self.requests[slot] for slot in slots]
        first = of(self.greedy.estimates, [one.leaning for one in known])
        drawn = np.array([one.manner is self.drawn for one in known], np.bool_)
        if drawn.any():
            leanings = [one.leaning for one in known if one.manner is self.drawn]
            first[drawn] = of(self.drawn.estimates, leanings)
        return first

    def least(self, requests: int) -> float:
        """Probability below which a node is not worth a look."""
        return max(FLOOR, 0.3 * self.row_worth(requests))

    def sizes(self, probabilities: list[np.ndarray], batch: int) -> np.ndarray:
        """How many nodes of each tree are worth their rows: int64 [R].

        Args:
            probabilities: float64 of the nodes of each tree, descending.
            batch: requests of the step, others included.
        """
        flat = np.concatenate([*probabilities, np.empty(0)])
        order = np.argsort(-flat, kind="stable")
        seconds = self.costs.target.table(batch + len(flat))[batch:]
        doubted = flat / (DOUBT - (DOUBT - 1) * flat)
        promised = np.concatenate([[0.0], np.cumsum(doubted[order])])
        best = int(np.argmax(promised - self.speed(batch) * seconds))
        owner = np.repeat(np.arange(len(probabilities)), [len(p) for p in probabilities])
        return np.bincount(owner[order[:best]], minlength=len(probabilities))

    def learn(
        self, slot: int, tree: DraftTree, size: int, alone: DraftTree | None, text: np.ndarray
    ) -> None:
        """The target wrote what a request's tree was drafted for.

        Args:
            slot: of the request.
            tree: as it was grown.
            size: nodes of it that were verified.
            alone: the tree that it would have had without the draft model, if that ran.
            text: int32 [m], what the target wrote.
        """
        known = self.requests.get(slot)
        if known is None:  # the request was preempted
            return
        known.manner.estimates.learn(tree, text, known.leaning)
        if alone is not None:
            right = known.manner.estimates.learn(alone, text, None)
            saved = known.manner.estimates.steps_saved(tree, text, int(right))
            batch, more = len(self.requests), len(text) - 1 - right
            seconds = saved * self.plain_step(batch) / batch
            seconds -= (size - len(alone.tokens) - more) * self._row(batch)  # rows that were wrong
            known.compare(self.speed(batch) * seconds)
