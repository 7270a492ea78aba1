"""What our worker of any platform offers on top of vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

if TYPE_CHECKING:
    from vllm_ouroboros.integration.runner import TreeRunner


class OuroborosWorkerMixin:
    """Mixed into a vLLM worker: the end of an engine, and what `vllm_ouroboros` asks for."""

    model_runner: TreeRunner
    backends: ClassVar[dict[AttentionBackendEnum, str]]
    """Our attention backends, by the ones of vLLM in whose place they serve this process."""

    def init_device(self) -> None:
        """As vLLM does, with our attention backends."""
        for backend, path in self.backends.items():
            register_backend(backend, path)
        selector._cached_get_attn_backend.cache_clear()  # another engine of this process filled it
        super().init_device()  # type: ignore[misc]

    def compile_or_warm_up_model(self):
        """As vLLM does, then measure what forwards cost."""
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        self.model_runner.measure_costs()
        return result

    def finish_weight_update(self, *args, **kwargs) -> None:
        """As vLLM does; trainers send weights past `TreeRunner.reload_weights`."""
        super().finish_weight_update(*args, **kwargs)  # type: ignore[misc]
        self.model_runner.target_changed()

    def shutdown(self) -> None:
        """Save the phrase pool, then end as vLLM does; a later engine gets vLLM's backends."""
        runner = getattr(self, "model_runner", None)  # absent if the start failed
        if runner is not None:
            runner.drafter.shut_down()
        for backend in self.backends:
            backend.clear_override()
        selector._cached_get_attn_backend.cache_clear()
        super().shutdown()  # type: ignore[misc]

    def ouroboros_stats(self) -> dict[str, int]:
        """Counters; see `OuroborosProposer.stats`."""
        return self.model_runner.drafter.stats()

    def ouroboros_reset_pool(self) -> None:
        """Forget all phrases."""
        self.model_runner.drafter.reset_pool()

    def ouroboros_trace(self, enabled: bool) -> None:
        """Record for each emitted token who proposed it."""
        self.model_runner.drafter.requests.tracing = enabled

    def ouroboros_origins(self) -> dict[str, list[int]]:
        """`NodeSource` of each token of the requests that finished since the last call."""
        requests = self.model_runner.drafter.requests
        done, requests.finished_origins = requests.finished_origins, {}
        return done

    def ouroboros_costs(self) -> dict[str, object]:
        """Milliseconds of forwards by rows; empty unless adaptive."""
        policy = self.model_runner.drafter.policy
        return policy.costs.as_dict() if policy is not None else {}

    def ouroboros_step_times(self) -> list[dict[str, float]]:
        """Host seconds by phase of the last steps; see `StepClock`."""
        return list(self.model_runner.drafter.clock.history)
