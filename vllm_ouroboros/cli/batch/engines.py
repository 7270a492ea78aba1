"""What the engines of a batch job are started with."""

from __future__ import annotations

from typing import Any

from vllm_ouroboros.cli.inputs import DRAFT, TARGET, InputError, model_reference
from vllm_ouroboros.config import PROPOSER, ConfigError, OuroborosConfig

OURS = ("model", "speculative_config", "additional_config")


def engine_arguments(
    model: str | None, draft_model: str | None, config: dict[str, Any], given: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The target, and arguments of an engine that drafts for it with Ouroboros.

    Args:
        model: target; None: the shipped one.
        draft_model: of the same vocabulary, "none" for the phrase pool alone; None: the shipped one
            for the shipped target, else none.
        config: options of Ouroboros.
        given: other arguments of ``vllm.LLM``.

    Raises:
        InputError: an engine could not start.
    """
    from vllm_ouroboros.integration.compat import check_models

    for key in OURS:
        if key in given:
            raise InputError(
                f"--engine-args: {key} is said by --model, --draft-model and --ouroboros-config"
            )
    target = model_reference(str(TARGET) if model is None else model, "--model")
    if draft_model is None:
        draft_model = str(DRAFT) if model is None else "none"
    if draft_model != "none":
        config = {**config, "draft_model": model_reference(draft_model, "--draft-model")}
    problems = check_models(target, config.get("draft_model"), config)
    try:
        budget = OuroborosConfig.parse(config).usual_budget
    except ConfigError as error:
        problems = [str(error)]
    if problems:
        raise InputError("; ".join(problems))
    return target, {
        **given,
        "speculative_config": {"model": PROPOSER, "num_speculative_tokens": budget},
        "additional_config": {"ouroboros": config},
    }
