"""What the engines of a batch job are started with."""

from __future__ import annotations

from typing import Any

from vllm_ouroboros.cli.inputs import DRAFT, TARGET, InputError, model_reference
from vllm_ouroboros.config import PROPOSER, ConfigError, OuroborosConfig

OURS = ("model", "speculative_config", "additional_config")


def ray_options(cores: float = 1) -> dict[str, Any]:
    """What Ray is told of engines on this platform; it gives each rank a GPU unless told otherwise.

    Args:
        cores: of a rank where there are no accelerators.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    return {
        "placement_group_config": {"bundle_per_worker": {"CPU": cores}},
        # each engine by itself would take the same cores
        "runtime_env": {"env_vars": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
    }


def replica_bounds(text: str) -> tuple[int, int]:
    """Fewest and most replicas of an option such as 2 or 1-4.

    Raises:
        InputError: it is something else.
    """
    fewest, _, most = text.partition("-")
    try:
        bounds = int(fewest), int(most or fewest)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise InputError(f"--replicas {text}: must be a number such as 2, or bounds such as 1-4")
    return bounds


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
    from vllm_ouroboros.integration.model_compat import check_models

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
