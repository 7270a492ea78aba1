"""A request's own options on their way from the front end to the worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from vllm_ouroboros.config import DEFAULTS, KEY, ConfigError, RequestOptions

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

MOST_CHARACTERS = 16
"""Characters of a predicted text for each token that a text may have; usual are four."""

logger = init_logger(f"vllm.{__name__}")  # vLLM configures what is below "vllm"


def sendable(extra_args: dict[str, Any], processor: InputProcessor) -> dict[str, Any]:
    """What the front end sends of a request's options: those that are set, a prediction as ids.

    Raises:
        VLLMValidationError: one of them cannot be; the server answers with status 400.
    """
    try:
        options = RequestOptions.of(extra_args)
        chosen = options.model_dump(exclude_defaults=True)
        if options.prediction is not None:
            chosen["prediction"] = _token_ids(options.prediction, processor)
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter=KEY) from None
    return {KEY: chosen}


def _token_ids(prediction: str | list[int], processor: InputProcessor) -> list[int]:
    """Token ids of a prediction, no more of them than a text may have."""
    model = processor.model_config
    if not isinstance(prediction, str):
        ids = prediction
    else:
        if processor.tokenizer is None:
            raise ConfigError(
                "ouroboros.prediction is text, and this engine has no tokenizer "
                "(skip_tokenizer_init): pass token ids"
            )
        # the event loop of a server waits for this: no more than can be of use
        text = prediction[: MOST_CHARACTERS * model.max_model_len]
        ids = processor.tokenizer.encode(text, add_special_tokens=False)
    size = model.get_vocab_size()
    wrong = next((token for token in ids if token >= size), None)
    if wrong is not None:
        raise ConfigError(
            f"ouroboros.prediction has the token id {wrong}: ids of this model are below {size}"
        )
    return list(ids[: model.max_model_len])


def received(params: SamplingParams) -> RequestOptions:
    """What a request asks for; the front end has checked it, unless another program sent it."""
    try:
        return RequestOptions.of(params.extra_args)
    except ConfigError as error:
        logger.warning_once("A request's options are left out: %s", error)
        return DEFAULTS


def predicted_tokens(options: RequestOptions) -> np.ndarray | None:
    """The prediction int32 [n] of received options, or None."""
    found = options.prediction
    return np.array(found, np.int32) if isinstance(found, list) and found else None
