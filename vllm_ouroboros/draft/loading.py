"""The configuration that a draft model is loaded and run with."""

from __future__ import annotations

import copy

from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace

COLLECTIVE = ("fastsafetensors", "instanttensor")
"""Formats of vLLM's for loading weights in which all ranks of an engine read together."""


def draft_config(engine: VllmConfig, model: ModelConfig, *, alone: bool) -> VllmConfig:
    """The configuration of an engine with a draft model in the target's place.

    What the draft model does not share with the target is a copy; what they share (compilation,
    with the list of attention layers) stays as it is, whatever vLLM derives from the draft model:
    ranks without a draft model must derive the same.

    Args:
        engine: of the target.
        model: the draft model's.
        alone: whether one rank of several runs all of it.
    """
    parallel, load = copy.copy(engine.parallel_config), copy.copy(engine.load_config)
    if alone:
        parallel.tensor_parallel_size = 1
        if load.load_format in COLLECTIVE:
            load.load_format = "auto"
    if alone or not model.is_moe:
        parallel.enable_expert_parallel = False
    shared = engine.compilation_config
    ranges = shared.compile_ranges_endpoints
    try:
        return replace(
            engine,
            quant_config=None,
            lora_config=None,  # adapters are the target's
            model_config=model,
            parallel_config=parallel,
            load_config=load,
        )
    finally:
        shared.compile_ranges_endpoints = ranges
