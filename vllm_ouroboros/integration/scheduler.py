"""vLLM's scheduler with KV slots reserved for the draft chain; tenants and figures pass it."""

from __future__ import annotations

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_ouroboros.config import OuroborosConfig
from vllm_ouroboros.integration.stat_logger import Carrier


class OuroborosScheduler(Scheduler):
    """Reserves slots past the scheduled tokens: the draft model writes KV there.

    ``VllmConfig.num_lookahead_tokens`` knows vLLM's own draft models only and gives 0 for a custom
    proposer.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._carrier = Carrier()
        config = OuroborosConfig.from_vllm(self.vllm_config)
        if config.draft_model is not None:
            self.num_lookahead_tokens = self.num_spec_tokens + 1
            tokens = 1 + self.num_spec_tokens + self.num_lookahead_tokens
            self._spec_decode_step_blocks = sum(
                cdiv(tokens, manager.block_size)
                for manager in self.kv_cache_manager.coordinator.single_type_managers
            )

    def schedule(self, *args, **kwargs):
        """Schedule a step; new requests take their ``cache_salt`` along to the worker."""
        output = super().schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            new.cache_salt = self.requests[new.req_id].cache_salt
        return output

    def update_from_output(self, scheduler_output, model_runner_output):
        """As vLLM does; what the worker shows goes along with the statistics."""
        self._carrier.take(model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args, **kwargs):
        """vLLM's statistics of a step, and ours."""
        stats = super().make_stats(*args, **kwargs)
        self._carrier.give(stats)
        return stats
