"""The configuration of a draft model beside its engine's."""

from __future__ import annotations

import copy

import pytest
from vllm.config import CompilationConfig, LoadConfig, ModelConfig, ParallelConfig, VllmConfig

from vllm_ouroboros.cli.inputs import PAIR
from vllm_ouroboros.draft import loading
from vllm_ouroboros.draft.loading import draft_config


@pytest.fixture(scope="module")
def models() -> tuple[ModelConfig, ModelConfig]:
    target, draft = (
        ModelConfig(model=str(PAIR / part), dtype="float32") for part in ("target", "draft")
    )
    return target, draft


def engine(target: ModelConfig, ranks: int = 4) -> VllmConfig:
    """Of so many ranks: four can share the heads of the target, and not the two of the draft."""
    return VllmConfig(
        model_config=target,
        parallel_config=ParallelConfig(tensor_parallel_size=ranks, enable_expert_parallel=False),
        load_config=LoadConfig(load_format="fastsafetensors"),
        compilation_config=CompilationConfig(compile_ranges_endpoints=[64]),
    )


def test_a_rank_alone_has_all_heads_and_waits_for_nobody(models) -> None:
    target, draft = models
    whole = engine(target)
    config = draft_config(whole, draft, alone=True)
    assert config.model_config is draft
    assert config.parallel_config.tensor_parallel_size == 1
    assert config.load_config.load_format == "auto"
    # the target's stay
    assert whole.parallel_config.tensor_parallel_size == 4
    assert whole.load_config.load_format == "fastsafetensors"
    assert config.compilation_config is whole.compilation_config
    with pytest.raises(ValueError, match="divisible by tensor parallel size"):
        draft_config(whole, draft, alone=False)


def test_compiled_for_one_rank_or_for_two_is_not_the_same(models) -> None:
    target, draft = models
    two = engine(target, 2)
    alone, shared = (draft_config(two, draft, alone=alone) for alone in (True, False))
    assert alone.compute_hash() != shared.compute_hash()
    assert shared.load_config.load_format == "fastsafetensors"


def test_all_ranks_compile_the_target_for_the_same_sizes(models, monkeypatch) -> None:
    """vLLM derives ranges of rows from whatever model it is given, and keeps them in what target
    and draft share; a rank without the draft model derives none."""
    target, draft = models
    whole, real = engine(target), loading.replace

    def replace(config, **changes):
        config.compilation_config.compile_ranges_endpoints = [64, 512]
        return real(config, **changes)

    before = copy.copy(whole.compilation_config.compile_ranges_endpoints)
    monkeypatch.setattr(loading, "replace", replace)
    draft_config(whole, draft, alone=True)
    assert whole.compilation_config.compile_ranges_endpoints == before


def test_a_dense_draft_of_a_mixture_has_no_experts_to_share(models) -> None:
    target, draft = models
    whole = engine(target, 2)
    whole.parallel_config.enable_expert_parallel = True
    for alone in (True, False):
        config = draft_config(whole, draft, alone=alone)
        assert not config.parallel_config.enable_expert_parallel
    assert whole.parallel_config.enable_expert_parallel
