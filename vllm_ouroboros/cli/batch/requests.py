"""What an engine is asked for a row: tokens, and how to sample."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty",
           "repetition_penalty")  # fmt: skip
COUNTS = ("max_tokens", "min_tokens", "top_k", "seed")
FLAGS = ("ignore_eos", "skip_special_tokens")
LISTS = {"stop": str, "stop_token_ids": int}
KEYS = (*NUMBERS, *COUNTS, *FLAGS, *LISTS)
"""Sampling parameters that a row may set, as vLLM names them."""
ERROR = "__inference_error__"
"""Ray Data's column: rows that have one there go past the engine."""


def sampling(given: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters of a row: all of `KEYS`, so that rows have one schema.

    Raises:
        ValueError: one is unknown or of another type.
    """
    if not isinstance(given, dict):
        raise ValueError(f"sampling_params is {given!r}: must be an object")
    found = dict(defaults)
    for key, value in given.items():
        if key not in KEYS:
            raise ValueError(f"sampling_params.{key} is none of {', '.join(KEYS)}")
        found[key] = None if value is None else _checked(key, value)
    return found


def _checked(key: str, value: Any) -> Any:
    if key in LISTS:
        values, kind = ([value] if isinstance(value, str) else value), LISTS[key]
        if isinstance(values, list) and all(type(one) is kind and _fits(one) for one in values):
            return values
    elif key in FLAGS:
        if isinstance(value, bool):
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if key in NUMBERS:
            return float(value)
        if value == value // 1 and _fits(value):
            return int(value)
    raise ValueError(f"sampling_params.{key} = {value!r} is of a wrong type or too large")


def _fits(value: Any) -> bool:
    """Whether rows can have it in a column: Ray's integers have 64 bits."""
    return isinstance(value, str) or abs(value) < 2**63


@dataclass(frozen=True)
class Requests:
    """Makes requests of rows; what is wrong with a row becomes its error.

    Attributes:
        model: whose tokenizer and chat template to use.
        defaults: sampling parameters of rows that say nothing else, all of `KEYS`.
        trust_remote_code: as in vLLM.
    """

    model: str
    defaults: dict[str, Any]
    trust_remote_code: bool = False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row {"id", "row"} with the columns that the engine's stage reads."""
        made = {"id": row["id"], "tokenized_prompt": [0], "sampling_params": self.defaults,
                ERROR: ""}  # fmt: skip
        try:
            given = json.loads(row["row"])
            if not isinstance(given, dict):
                raise ValueError(f"is {type(given).__name__}, no JSON object")
            wanted = sampling(given.get("sampling_params") or {}, self.defaults)
            made |= {"tokenized_prompt": self._tokens(given), "sampling_params": wanted}
        except Exception as error:
            made[ERROR] = f"{type(error).__name__}: {error}"
        return made

    def _tokens(self, row: dict[str, Any]) -> list[int]:
        tokenizer = _tokenizer(self.model, self.trust_remote_code)
        if isinstance(messages := row.get("messages"), list):
            tokens = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        elif isinstance(prompt := row.get("prompt"), str):
            tokens = tokenizer(prompt).input_ids
        else:
            raise ValueError(f"has neither a text 'prompt' nor 'messages', but {', '.join(row)}")
        if not tokens:
            raise ValueError("the prompt has no token")
        return list(tokens)


@lru_cache
def _tokenizer(model: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
