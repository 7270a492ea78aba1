"""`OuroborosProposer`: vLLM's drafting hook. Runs the rounds of drafting and keeps the trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_ouroboros.config import ConfigError, OuroborosConfig
from vllm_ouroboros.draft.head import DraftHead
from vllm_ouroboros.draft.model import DraftModel
from vllm_ouroboros.draft.ranks import Ranks
from vllm_ouroboros.draft.rounds import DraftRounds
from vllm_ouroboros.integration import step_trees
from vllm_ouroboros.integration.deferred import Deferred
from vllm_ouroboros.integration.draft_of_rank import draft_of_rank
from vllm_ouroboros.integration.faults import Pause
from vllm_ouroboros.integration.live_requests import LiveRequests
from vllm_ouroboros.integration.observation import Observation, keep_features
from vllm_ouroboros.integration.persistence import Persistence
from vllm_ouroboros.integration.stats import flat_stats
from vllm_ouroboros.integration.step_requests import StepRequests
from vllm_ouroboros.integration.step_trees import DraftBatch
from vllm_ouroboros.metrics.counters import Counters, Fault
from vllm_ouroboros.metrics.exported import Exported
from vllm_ouroboros.metrics.step_clock import StepClock
from vllm_ouroboros.phrases.contexts import CONTEXTS
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.policy import acceptance_estimates
from vllm_ouroboros.policy.controller import Policy
from vllm_ouroboros.policy.throughput import Step
from vllm_ouroboros.trees import warm_up as tree_loops
from vllm_ouroboros.trees.drafting import Drafting
from vllm_ouroboros.trees.packing import pack_trees, unpack_trees
from vllm_ouroboros.verify.token_sampler import (
    RequestSampling,
    TokenSampler,
    eos_token_ids,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


logger = init_logger(f"vllm.{__name__}")  # vLLM configures what is below "vllm"


class OuroborosProposer:
    """Drafts for a whole batch; built by vLLM's model runner, then bound to it.

    Args:
        vllm_config: the engine's configuration.
        draft: stands in for the draft model that the configuration names.
        clock: seconds of this one count.

    Raises:
        ConfigError: ``additional_config["ouroboros"]`` is wrong.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        draft: DraftModel | None = None,
        clock: StepClock | None = None,
    ) -> None:
        self.config = OuroborosConfig.from_vllm(vllm_config)
        config, scheduler = self.config, vllm_config.scheduler_config
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.budget: int = vllm_config.num_speculative_tokens
        self.draft = draft
        parallel = vllm_config.parallel_config
        self.ranks = Ranks.of_engine() if parallel.tensor_parallel_size > 1 else Ranks()
        if config.draft_model is not None and draft is None:
            self.draft = draft_of_rank(config.draft_model, vllm_config, self.ranks)
        head = self.draft if isinstance(self.draft, DraftHead) else None
        self.eos = eos_token_ids(vllm_config)
        self.drafting = Drafting(
            PhrasePool(config.pool_capacity, config.guess_set_size, config.phrase_len),
            max_requests=scheduler.max_num_seqs,
            budget=self.budget,
            draft_tokens=self.budget if config.adaptive else config.draft_tokens,
            num_suffixes=config.num_suffixes,
            window_size=0 if head else config.window_size,
            max_len=self.draft.max_len if self.draft else self.max_model_len,
            vocab_size=vllm_config.model_config.get_vocab_size(),
            stops=tuple(sorted(self.eos)),
            contexts=len(CONTEXTS) if config.adaptive else 1,
            keeps_chain_kv=head is None,
        )
        self.head = head
        if head is not None:
            head.use(self.drafting.state)
        self.requests = LiveRequests(
            config, self.drafting, self.eos, self.max_model_len, vllm_config.model_config.seed
        )
        self.deferred = Deferred()
        self._on_release = [head.features.forget] if head is not None else []
        self.requests.on_release = self._release
        self.counters = Counters()
        self.observation = Observation(self.drafting, self.requests, self.counters, self.deferred)
        self.pause = Pause(self.counters)
        self.clock = clock or StepClock()
        self.exported = Exported(self.counters, self.clock, self.drafting, lambda: self.pause.lasts)
        self.rounds = None
        if self.draft is not None:
            self.rounds = DraftRounds(
                self.draft, self.drafting, scheduler.max_num_batched_tokens,
                self.counters, self.clock,
            )  # fmt: skip
        self.persistence: Persistence | None = None  # with a `pool_path`, once the model is loaded
        self.policy: Policy | None = None  # with `adaptive`, once costs are measured
        self.forward_seconds = 0.0  # of the target's last forward
        self._runner: GPUModelRunner | None = None

    def bind(self, runner: GPUModelRunner, sampler: TokenSampler) -> None:
        """Tell the proposer which runner it drafts for, and how that runner samples."""
        self._runner = runner
        self.deferred.waits = runner.forwards_overlap
        if self.rounds is not None:
            self.rounds.sampler = sampler
        processors = [*sampler.processors.all]
        opaque = self.requests.bind(runner.device, processors, self._draft_prefix)
        if opaque:
            logger.warning(
                "Ouroboros drafts nothing in this engine: logits processor %s may depend on more "
                "than parameters, prompt and output. If it does not, give the class the attribute "
                "ouroboros_stateless = True.",
                ", ".join(opaque),
            )

    def _release(self, slot: int) -> None:
        self.catch_up()
        for forget in self._on_release:
            forget(slot)

    def _draft_prefix(self, req_id: str, computed: int) -> int:
        """How many of the tokens that a request starts with have draft KV."""
        if self.rounds is None:
            return computed
        row = self.runner.input_batch.req_id_to_index[req_id]
        return self.rounds.cache.prefix(self.runner, row, computed)

    @property
    def runner(self) -> GPUModelRunner:
        """The bound runner."""
        if self._runner is None:
            raise ConfigError(
                "OuroborosProposer runs inside our worker only, and this engine has another one: "
                "leave --worker-cls at auto and let VLLM_PLUGINS include ouroboros"
            )
        return self._runner

    def load_model(self, target: torch.nn.Module) -> None:
        """Load the draft model or head; called by the runner once the target is loaded."""
        model = self.runner.model_config
        if self.draft is not None:
            self.draft.load(target)
        tree_loops.warm_up()
        acceptance_estimates.warm_up()
        if self.config.pool_path is not None and not self.ranks.follows:
            self.persistence = Persistence(self.drafting.pool, self.config.pool_path, model)
            self.requests.idle_save = self.persistence.idle_save
            self.exported.file = self.persistence.file

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings=None,
    ) -> list[list[int]]:
        """Draft the next tree of each request of the batch.

        Args:
            sampled_token_ids: tokens that each request emitted in this step; none for a request
                in the middle of its prompt.
            num_tokens_no_spec: int32 [max_num_seqs], committed tokens of each request.
            token_ids_cpu: int32 [max_num_seqs, max_model_len].
            slot_mappings: unused; the draft model has its own.

        Returns:
            The trees' tokens, flat, parents before children.
        """
        del slot_mappings
        if self.ranks.follows:
            return self._follow()
        with self.ranks.deciding(), self.clock.phase("propose"):
            drafts: list[list[int]] = [[] for _ in sampled_token_ids]
            if self.pause.takes():
                self.observation.pass_by(self.runner, sampled_token_ids)
            else:
                try:
                    drafts = self._step(sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
                except Exception as error:
                    self.recover(error, self.runner.input_batch.req_ids)
            if self.ranks.leads:
                batch = self.runner.input_batch.req_ids
                self.ranks.end(*pack_trees([self.requests[req_id].tree for req_id in batch]))
        self.clock.end_step(len(drafts))
        return drafts

    def _step(
        self, emitted: list[list[int]], lengths: np.ndarray, token_ids: np.ndarray
    ) -> list[list[int]]:
        """Learn from a step and draft for the next one; arguments as for `propose`."""
        with self.clock.phase("learn"):
            self.observation.learn(self.runner, emitted, token_ids, self.policy)
            if self.head is not None:
                keep_features(self.head, self.requests, self.runner)
        drafts = self._propose(emitted, lengths, token_ids)
        self._end_step(emitted)
        if self.persistence is not None:
            self.deferred.call(self.persistence.save_if_due)
        return drafts

    def recover(self, error: Exception, batch: Sequence[str] = ()) -> None:
        """After a fault: forget drafts, and draft nothing for a while.

        Args:
            error: the fault.
            batch: ids of the requests that were drafted for.

        Raises:
            Exception: the fault itself, where other ranks wait for ever.
        """
        if self.ranks.parted:
            raise error
        fault = self.pause.begin(error)
        self.deferred.drop()
        self.requests.drop_drafts(batch, keep_kv=fault != Fault.NONFINITE)
        if fault == Fault.NONFINITE and self.rounds is not None:
            self.rounds.cache.forget()
        if fault == Fault.POOL:
            self.drafting.pool.clear()
        if fault == Fault.MEMORY and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def catch_up(self) -> None:
        """Do what no draft waits for; what fails costs speculation alone."""
        try:
            self.deferred.catch_up()
        except Exception as error:
            self.recover(error)

    def _follow(self) -> list[list[int]]:
        """The trees that the first rank drafts."""
        orders = self.draft.orders(self.clock, self.runner) if self.draft is not None else {}
        trees = unpack_trees(*self.ranks.follow(orders))
        for req_id, tree in zip(self.runner.input_batch.req_ids, trees, strict=True):
            self.requests[req_id].tree = tree
        return [tree.tokens.tolist() if tree is not None else [] for tree in trees]

    def set_policy(self, policy: Policy) -> None:
        """Let a policy decide from now on."""
        self.policy = policy
        if self.persistence is not None:
            self.persistence.costs = policy.costs
        self._on_release.append(policy.forget)
        if self.rounds is not None:
            self.rounds.policy = policy

    def _end_step(self, emitted: list[list[int]]) -> None:
        if self.policy is not None:
            rounds = self.rounds
            step = Step(
                requests=len(emitted),
                tokens=sum(map(len, emitted)),
                forwards=self.forward_seconds + (rounds.seconds if rounds else 0.0),
                decoding=all(emitted),
                drafted=rounds is not None and rounds.drafted,
            )
            self.policy.end_step(step, self.clock.now())

    def _propose(
        self, emitted: list[list[int]], lengths: np.ndarray, token_ids: np.ndarray
    ) -> list[list[int]]:
        policy, rounds = self.policy, self.rounds
        given = StepRequests.of(
            self.runner, self.requests, self.drafting.state.in_pool, emitted, lengths
        )
        sampled = self._begin(given)
        given.commit(self.drafting, token_ids)
        drafted = DraftBatch.of(given.drafted, given.rows, token_ids, len(emitted))
        phrases, expected_accepted = None, np.zeros(len(given.rows))
        if policy is not None:
            with self.clock.phase("build"):
                phrases = step_trees.phrase_trees(self.drafting, policy, drafted)
                expected_accepted = phrases.expected_accepted
        if rounds is not None:
            rounds.run(
                self.runner, given.prompts, drafted.slots, drafted.rows, token_ids, sampled,
                expected_accepted,
            )  # fmt: skip
        with self.clock.phase("build"):
            if policy is not None and phrases is not None:
                trees = step_trees.best_first_trees(self.drafting, policy, phrases, drafted)
            else:
                trees = step_trees.fixed_trees(self.drafting, drafted)
            self.drafting.check_trees(drafted.slots)
            drafts: list[list[int]] = [[] for _ in emitted]
            for request, row, tree in zip(given.drafted, given.rows, trees, strict=True):
                request.tree = tree
                drafts[row] = tree.tokens.tolist()
        return drafts

    def _begin(self, given: StepRequests) -> dict[int, RequestSampling]:
        """Begin the drafts of a step.

        Returns:
            How those sample that do, by slot, with noise that drafting may use up.
        """
        policy, rounds = self.policy, self.rounds
        sampled: dict[int, RequestSampling] = {}
        for request, row, length, limit in zip(
            given.drafted, given.rows, given.lengths, given.limits, strict=True
        ):
            slot, sampling = request.slot, request.sampling
            capacity = rounds.cache.capacity(self.runner, row) if rounds else 0
            self.drafting.start(slot, length, limit, capacity, request.chain_only)
            if policy is not None:
                policy.begin_step(slot, sampling.argmax_only)
            if rounds is not None and not sampling.argmax_only:
                sampled[slot] = sampling.with_noise_copy()
        if policy is not None:
            for slot, row, _ in given.prompts:
                of_row = self.requests[self.runner.input_batch.req_ids[row]]
                policy.begin_step(slot, of_row.sampling.argmax_only)
        return sampled

    def warm_up(self, num_tokens: int) -> None:
        """Compile the draft model, which the first request would otherwise wait for."""
        if self.draft is not None:
            self.draft.warm_up(num_tokens)

    def shut_down(self) -> None:
        """Save what should outlive the engine."""
        self.catch_up()
        if self.persistence is not None:
            self.persistence.close()

    def reset_pool(self) -> None:
        """Forget all phrases; those in the file stay until the next save of new ones."""
        self.catch_up()
        if self.requests.idle_save is not None:
            self.requests.idle_save.busy()
        self.drafting.pool.clear()
        if self.persistence is not None:
            self.persistence.start_over()

    def stats(self) -> dict[str, int]:
        """Counters since the start, flat."""
        self.catch_up()
        return flat_stats(self.counters, self.drafting)
