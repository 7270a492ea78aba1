"""How much to draft and to verify: expected accepted tokens against the cost of forwards.

A second is worth the tokens that the batch makes in it on average. A node is verified if it is
expected to bring more tokens than the time of its row is worth, a draft forward runs if what it
adds is worth its time. Steps without any draft are a choice; now and then a few steps with a draft
explore whether that still holds.

The constants were tuned on traces of the shipped pair and of a weaker one (code and random tokens,
batches 1, 8 and 32) by scripts/simulate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vllm_ouroboros.policy.acceptance_estimates import CalibrationBias, Estimates, apply_bias
from vllm_ouroboros.policy.forward_costs import Costs, update_average
from vllm_ouroboros.policy.request_statistics import AVERAGE_WEIGHT, RequestStatistics, SamplingMode
from vllm_ouroboros.policy.throughput import Step, Throughput
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.node_kinds import GRADE_BOUNDS

EXPLORATION_SHARE = 0.008  # of all time that exploring drafts which do not pay may take
EXPLORATION_STEPS = 4  # that one exploration takes
IDLE_FACTOR = 20.0  # a step that took so many times its forwards held a pause
MIN_PROBABILITY = 0.01  # below which a node is never worth its host work
EXTRA_ROWS_SHARE = 0.025  # of a plain step that a draft forward may take for guesses and window
SHRINKAGE = 2.5
"""What the odds of a node are divided by: of many estimates the highest are the most overrated."""


class Policy:
    """Decides for a batch, step by step.

    Args:
        costs: of this engine.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.greedy, self.sampled = SamplingMode(), SamplingMode()
        self.requests: dict[int, RequestStatistics] = {}  # by slot
        self._throughputs: dict[int, Throughput] = {}  # by size of batch
        self._tokens_per_round = 1.0  # that a draft forward adds to a chain
        self._rounds_per_step = 2.0  # of drafting, each as long as a round may be
        self._max_round_seconds = 1.0  # that a round may take
        self._seconds_undrafted = 0.0  # since the last draft
        self._ever_drafted = False
        self._drafting_pays = True  # by the last estimate
        self._exploration_left = 0  # steps that are still drafted to explore
        self._exploration_seconds = 0.0  # that exploring may spend on reading text
        self._last: tuple[float, Step] | None = None  # when the last step ended

    # -- requests and batches ------------------------------------------------------------------

    def begin_step(self, slot: int, greedy: bool) -> None:
        """A request takes a step; a new one starts with the statistics of its mode."""
        request = self.requests.get(slot)
        if request is None:
            self.requests[slot] = RequestStatistics(self.greedy if greedy else self.sampled)
        else:
            request.begin_step()

    def step_class(self, slot: int) -> int | None:
        """Class of the present step of a request, for `learn`; None while nothing is known."""
        request = self.requests.get(slot)
        return request.step_class if request is not None else None

    def forget(self, slot: int) -> None:
        """The request of a slot is gone."""
        request = self.requests.pop(slot, None)
        if request is not None:
            request.finish()

    def plain_step_seconds(self, requests: int) -> float:
        """Seconds of a step of a batch without any speculation."""
        return self.costs.target.at(requests) + self.costs.overhead

    def throughput(self, requests: int) -> float:
        """Tokens per second of a batch: what a second is worth."""
        observed = self._throughput(requests).tokens_per_second
        return max(observed, requests / self.plain_step_seconds(requests))

    def _throughput(self, requests: int) -> Throughput:
        return self._throughputs.setdefault(requests.bit_length(), Throughput())

    def _row_seconds(self, requests: int) -> float:
        """Seconds that a node adds to a target forward, on average over a small tree."""
        target = self.costs.target
        return (target.at(9 * requests) - target.at(requests)) / (8 * requests)

    def acceptance_threshold(self, requests: int) -> float:
        """Estimated probability that a node must have; above 1 where no row is worth its time."""
        price = self.throughput(requests) * self._row_seconds(requests)
        return SHRINKAGE * price / (1 - price + SHRINKAGE * price) if price < 1 else price

    def end_step(self, step: Step, now: float) -> None:
        """A step ended ``now`` (seconds of any clock), together with the draft for the next one."""
        last, self._last = self._last, (now, step)
        if last is None:
            return
        seconds = now - last[0]
        if seconds > IDLE_FACTOR * step.forwards:  # the engine had nothing to do in between
            return
        self._seconds_undrafted += seconds
        for mode in (self.greedy, self.sampled):
            mode.estimates.decay()
        if last[1].requests == step.requests and step.decoding:
            self.costs.observe_overhead(seconds - step.forwards, step.drafted)
            self._throughput(step.requests).observe(step.tokens, seconds)

    # -- drafting ------------------------------------------------------------------------------

    def reads_prompt(self, slot: int, tokens: int) -> bool:
        """Whether the draft model should read so many tokens of a prompt while it is at work."""
        request = self.requests.get(slot)
        if request is None or self.costs.draft is None or not self._drafting_pays:
            return False
        price = self.throughput(len(self.requests)) * self.costs.draft.at(tokens)
        return request.mean_savings * request.mode.mean_steps > price

    def choose_drafted(
        self,
        slots: np.ndarray,
        expected_accepted: np.ndarray,
        rows: int,
        lags: np.ndarray,
        limits: np.ndarray,
    ) -> np.ndarray:
        """For which requests the draft model should run: bool [R].

        Args:
            slots: int64 [R].
            expected_accepted: float64 [R], tokens of each tree without the draft model.
            rows: of one draft forward for all of them.
            lags: int32 [R], tokens that it would have to read first.
            limits: int32 [R], tokens that each request may still have.
        """
        if self.costs.draft is None:
            return np.zeros(len(slots), np.bool_)
        requests = [self.requests[slot] for slot in slots.tolist()]
        savings = [
            one.classify(e) for one, e in zip(requests, expected_accepted.tolist(), strict=True)
        ]
        price, throughput = self.costs.draft, self.throughput(len(slots))
        reading = np.array([price.at(n) for n in lags.tolist()])
        steps = np.minimum([max(1.0, one.mode.mean_steps) for one in requests], limits)
        gains = np.array(savings) - throughput * reading / steps
        self._max_round_seconds = self.costs.round(rows)
        seconds = self._rounds_per_step * self._max_round_seconds + self.costs.drafting
        able = gains > 0
        self._drafting_pays = bool(gains[able].sum() > throughput * seconds)
        chosen = able if self._drafting_pays else self._explore(reading, seconds)
        if chosen.any():
            self._seconds_undrafted, self._ever_drafted = 0.0, True
        return chosen

    def _explore(self, reading: np.ndarray, seconds: float) -> np.ndarray:
        """For whom to draft although it does not pay, to see whether that still holds: bool [R].

        Args:
            reading: float64 [R], seconds that the draft model needs before it can start.
            seconds: that drafting for a step takes.
        """
        if self._exploration_left == 0:
            budget = self._seconds_undrafted * EXPLORATION_SHARE
            self._exploration_seconds = budget - EXPLORATION_STEPS * seconds
            if not self._ever_drafted:  # what it costs is only known from the start of the engine
                self._exploration_seconds = float(reading.min())
        order = np.argsort(reading, kind="stable")  # those that are read soonest
        chosen = np.zeros(len(reading), np.bool_)
        chosen[order] = np.cumsum(reading[order]) <= self._exploration_seconds
        if chosen.any():
            self._exploration_seconds -= reading[chosen].sum()
            self._exploration_left = (self._exploration_left or EXPLORATION_STEPS) - 1
        else:  # whom it read is gone: the next exploration is another one
            self._exploration_left = 0
        return chosen

    def affords_rows(self, requests: int, rows: int, fewer: int) -> bool:
        """Whether a draft forward may have so many rows where fewer would do."""
        assert self.costs.draft is not None
        more = self.costs.draft.at(rows) - self.costs.draft.at(fewer)
        return more <= EXTRA_ROWS_SHARE * self.plain_step_seconds(requests)

    def observe_round(self, tokens: float) -> None:
        """A draft forward added so many tokens to a chain, on average."""
        self._tokens_per_round += AVERAGE_WEIGHT * (tokens - self._tokens_per_round)

    def observe_drafting(self, seconds: float) -> None:
        """Drafting for a step took so long."""
        rounds = seconds / self._max_round_seconds
        self._rounds_per_step = update_average(self._rounds_per_step, rounds, self._rounds_per_step)

    def continues_drafting(
        self, slots: np.ndarray, confidence: np.ndarray, lengths: np.ndarray, rows: int, batch: int
    ) -> np.ndarray:
        """Which requests should have another draft forward: bool [R].

        Args:
            slots: int64 [R].
            confidence: float32 [R, B], the draft model's probability of the tokens of each chain.
            lengths: int32 [R], tokens of each chain.
            rows: rows of that forward.
            batch: requests of the step, others included.
        """
        by_grade = self._by_mode(
            slots.tolist(), lambda found, biases: apply_bias(found.rates_by_grade(), biases)
        )
        rates = np.take_along_axis(by_grade, np.searchsorted(GRADE_BOUNDS, confidence, "right"), 1)
        within = np.arange(confidence.shape[1]) < lengths[:, None]
        reaches_end = np.where(within, rates, 1.0).prod(1)
        gains = reaches_end * self._tokens_per_round - self.acceptance_threshold(batch)
        pays = gains[gains > 0].sum() > self.throughput(batch) * self.costs.round(rows)
        return (gains > 0) & pays

    # -- verifying -----------------------------------------------------------------------------

    def rates(self, slots: list[int]) -> np.ndarray:
        """Acceptance rates float64 [R, NUM_KINDS] of the nodes of each request."""
        return self._by_mode(slots, Estimates.rates)

    def _by_mode(
        self, slots: list[int], of: Callable[[Estimates, list[CalibrationBias]], np.ndarray]
    ) -> np.ndarray:
        """What ``of`` says for the requests of each mode, put together: float64 [R, n]."""
        requests = [self.requests[slot] for slot in slots]
        found = of(self.greedy.estimates, [one.bias for one in requests])
        sampled = np.array([one.mode is self.sampled for one in requests], np.bool_)
        if sampled.any():
            biases = [one.bias for one in requests if one.mode is self.sampled]
            found[sampled] = of(self.sampled.estimates, biases)
        return found

    def min_probability(self, requests: int) -> float:
        """Probability below which no node is grown."""
        return max(MIN_PROBABILITY, 0.3 * self.acceptance_threshold(requests))

    def tree_sizes(self, probabilities: list[np.ndarray], batch: int) -> np.ndarray:
        """How many nodes of each tree are worth their rows: int64 [R].

        Args:
            probabilities: float64 of the nodes of each tree, descending.
            batch: requests of the step, others included.
        """
        flat = np.concatenate([*probabilities, np.empty(0)])
        order = np.argsort(-flat, kind="stable")
        seconds = self.costs.target.table(batch + len(flat))[batch:]
        shrunk = flat / (SHRINKAGE - (SHRINKAGE - 1) * flat)
        expected_accepted = np.concatenate([[0.0], np.cumsum(shrunk[order])])
        best = int(np.argmax(expected_accepted - self.throughput(batch) * seconds))
        owner = np.repeat(np.arange(len(probabilities)), [len(p) for p in probabilities])
        return np.bincount(owner[order[:best]], minlength=len(probabilities))

    def learn(
        self,
        slot: int,
        tree: DraftTree,
        size: int,
        without_draft: DraftTree | None,
        text: np.ndarray,
        step_class: int | None = None,
    ) -> None:
        """The target wrote what a request's tree was drafted for.

        Args:
            slot: of the request.
            tree: as it was grown.
            size: nodes of it that were verified.
            without_draft: the tree it would have had without the draft model, if that ran.
            text: int32 [m], what the target wrote.
            step_class: `step_class` of the step, if another may have begun since.
        """
        request = self.requests.get(slot)
        if request is None:  # it was preempted
            return
        estimates = request.mode.estimates
        estimates.learn(tree, text, request.bias)
        if without_draft is not None:
            accepted = estimates.learn(without_draft, text, None)
            saved = estimates.steps_saved(tree, text, int(accepted))
            batch, more = len(self.requests), len(text) - 1 - accepted
            seconds = saved * self.plain_step_seconds(batch) / batch
            rejected = size - len(without_draft.tokens) - more
            seconds -= rejected * self._row_seconds(batch)
            at = request.step_class if step_class is None else step_class
            request.observe_savings(self.throughput(batch) * seconds, at)
