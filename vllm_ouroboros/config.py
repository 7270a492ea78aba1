"""Options of an engine, ``additional_config["ouroboros"]``, and of a request, its
``extra_args["ouroboros"]``; both are checked where they come in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

if TYPE_CHECKING:
    from vllm.config import SpeculativeConfig, VllmConfig

KEY = "ouroboros"
"""Of the options among those that others may have, of an engine and of a request."""
PROPOSER = "vllm_ouroboros.OuroborosProposer"
"""What users pass as ``--speculative-model``."""


_Options = TypeVar("_Options", bound=BaseModel)


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, the value and the fix."""


class OuroborosConfig(BaseModel):
    """Settings of one engine, in the symbols of the paper (arXiv 2402.13720).

    Lengths and sizes are in tokens unless a field says otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    draft_model: str | None = Field(
        None, description="path or hub id of the draft model; null drafts from the pool alone"
    )
    draft_tokens: int = Field(8, ge=1, le=64, description="γ, tokens of the drafted chain")
    num_suffixes: int = Field(3, ge=0, le=32, description="K, phrases that lengthen the chain")
    phrase_len: int = Field(6, ge=1, le=32, description="β, tokens of a phrase (N = β + 1)")
    window_size: int = Field(
        10, ge=0, le=64, description="W, columns of the Jacobi window; 0 turns it off"
    )
    guess_set_size: int = Field(10, ge=1, le=64, description="G, phrases kept per key token")
    pool_capacity: int = Field(
        262144, ge=64, le=2**22, description="keys that the phrase pool holds before it evicts"
    )
    pool_scope: Literal["global", "request"] = Field(
        "global", description="who shares phrases: all requests, or nobody"
    )
    pool_path: str | None = Field(
        None, description="file of a warm pool, read at start and kept up to date; null keeps none"
    )
    adaptive: bool = Field(
        True, description="choose by measured costs, step by step, how much to draft and verify"
    )

    @classmethod
    def parse(cls, options: Any) -> OuroborosConfig:
        """Validate ``options`` (a dict or None for all defaults).

        Raises:
            ConfigError: one line for each wrong key, with the key, the value and the range.
        """
        if options is None:
            options = {}
        if not isinstance(options, dict):
            raise ConfigError(
                f'additional_config["ouroboros"] is {options!r}: pass a JSON object, '
                'for example {"draft_model": "path"}'
            )
        config = _checked(cls, options)
        if config.pool_path is not None and config.pool_scope == "request":
            raise ConfigError(
                f"ouroboros.pool_path = {config.pool_path!r}: a pool with pool_scope = 'request' "
                "has no phrases to keep; leave out the one or the other"
            )
        return config

    @classmethod
    def from_vllm(cls, vllm_config: VllmConfig) -> OuroborosConfig:
        """Read and check the settings of an engine, the node budget included."""
        config = cls.parse((vllm_config.additional_config or {}).get("ouroboros"))
        config.check_budget(vllm_config.num_speculative_tokens)
        return config

    @property
    def usual_budget(self) -> int:
        """Nodes of a tree that holds a whole chain and its suffixes."""
        return self.draft_tokens + self.num_suffixes * self.phrase_len

    def check_budget(self, num_speculative_tokens: int) -> None:
        """Refuse a node budget that cannot hold a chain of fixed length."""
        if not self.adaptive and num_speculative_tokens < self.draft_tokens:
            raise ConfigError(
                f"num_speculative_tokens = {num_speculative_tokens} is the node budget of a "
                f"request's tree and must be at least ouroboros.draft_tokens = "
                f"{self.draft_tokens}: raise the one or lower the other"
            )


class RequestOptions(BaseModel):
    """What a request may ask for, in ``SamplingParams.extra_args["ouroboros"]``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    speculate: StrictBool = Field(True, description="whether anything is drafted for it")
    learn: StrictBool = Field(True, description="whether its text becomes phrases of the pool")
    scope: Annotated[StrictStr, Field(min_length=1, max_length=256)] | None = Field(
        None, description="name of those whom it shares phrases with; null: everybody without one"
    )
    prediction: StrictStr | list[Annotated[StrictInt, Field(ge=0)]] | None = Field(
        None, description="what it is expected to answer, as text or token ids: tried first"
    )

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """The options among ``extra_args``: an object, or one as JSON text (the OpenAI server takes
        no objects in ``vllm_xargs``).

        Raises:
            ConfigError: one line for each wrong key, with the key and the value.
        """
        given = (extra_args or {}).get(KEY)
        if given is None:
            return DEFAULTS
        options = given
        if isinstance(given, str):
            try:
                options = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{KEY} = {given!r:.200}: no JSON ({error})") from None
        if not isinstance(options, dict):
            raise ConfigError(
                f'{KEY} = {given!r:.200}: pass a JSON object, for example {{"learn": false}}'
            )
        return _checked(cls, options)


DEFAULTS = RequestOptions.model_validate({})


def is_ours(speculative_config: SpeculativeConfig | None) -> bool:
    """Whether a speculative config names our proposer."""
    return (
        speculative_config is not None
        and speculative_config.method == "custom_class"
        and speculative_config.model == PROPOSER
    )


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether this engine asked for our proposer."""
    return is_ours(vllm_config.speculative_config)


def _checked(cls: type[_Options], options: dict[str, Any]) -> _Options:
    """The options of a class, or `ConfigError` with one line for each wrong key."""
    try:
        return cls(**options)
    except ValidationError as error:  # of a union there is an error for each type that was tried
        lines = dict.fromkeys(_explain(cls, one) for one in error.errors())
        raise ConfigError("; ".join(lines)) from None


def _explain(cls: type[BaseModel], error: Any) -> str:
    """One line for one pydantic error."""
    # of a union the location goes on with the type that was tried
    parts = [part for part in error["loc"] if not str(part).startswith(("constrained", "list["))]
    key = ".".join(str(part) for part in parts) or "?"
    if error["type"] == "extra_forbidden":
        return f"ouroboros.{key}: unknown key; known keys are {', '.join(cls.model_fields)}"
    bounds = cls.model_fields[key].metadata if key in cls.model_fields else []
    limits = {type(b).__name__: b for b in bounds}
    allowed = ""
    if "Ge" in limits and "Le" in limits:
        allowed = f" (allowed: {limits['Ge'].ge} to {limits['Le'].le})"
    return f"ouroboros.{key} = {error['input']!r:.200}: {error['msg'].lower()}{allowed}"
