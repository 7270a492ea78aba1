"""Requests of rows: what is wrong with a row becomes its error."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm import SamplingParams

from vllm_ouroboros.cli.batch.requests import ERROR, KEYS, Requests, sampling
from vllm_ouroboros.cli.inputs import TARGET

DEFAULTS = {key: getattr(SamplingParams(max_tokens=9), key) for key in KEYS}


def request(row: Any) -> dict[str, Any]:
    text = row if isinstance(row, str) else json.dumps(row)
    return Requests(str(TARGET), DEFAULTS)({"id": "x", "row": text})


def test_a_prompt_becomes_tokens() -> None:
    made = request({"prompt": "def f(x):", "sampling_params": {"max_tokens": 3, "stop": "\n"}})
    assert made[ERROR] == ""
    assert made["tokenized_prompt"] == AutoTokenizer.from_pretrained(TARGET).encode("def f(x):")
    assert made["sampling_params"] == {**DEFAULTS, "max_tokens": 3, "stop": ["\n"]}
    SamplingParams(**made["sampling_params"])


def test_messages_go_through_the_chat_template(monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }};{% endfor %}"
    monkeypatch.setattr("vllm_ouroboros.cli.batch.requests._tokenizer", lambda *_: tokenizer)
    made = request({"messages": [{"role": "user", "content": "a = 1"}]})
    assert made[ERROR] == ""
    assert tokenizer.decode(made["tokenized_prompt"]).endswith("a = 1;")


@pytest.mark.parametrize(
    "row, error",
    [
        ("no JSON", "JSONDecodeError"),
        ([1], "is list, no JSON object"),
        ({"text": "x"}, "neither a text 'prompt' nor 'messages', but text"),
        ({"prompt": 3}, "neither a text"),
        ({"prompt": "x", "sampling_params": {"n": 2}}, "sampling_params.n is none of"),
        ({"prompt": "x", "sampling_params": {"top_k": 1.5}}, "sampling_params.top_k = 1.5"),
        ({"prompt": "x", "sampling_params": {"temperature": "hot"}}, "temperature = 'hot'"),
        ({"prompt": "x", "sampling_params": {"ignore_eos": 1}}, "ignore_eos = 1"),
        ({"prompt": "x", "sampling_params": {"stop": [1]}}, "stop = [1]"),
        ({"prompt": "x", "sampling_params": {"seed": 2**64}}, "seed = 18446744073709551616"),
        ({"prompt": "x", "sampling_params": {"max_tokens": math.inf}}, "max_tokens = inf"),
        ({"prompt": "x", "sampling_params": {"top_k": math.nan}}, "top_k = nan"),
        ({"prompt": "x", "sampling_params": {"stop_token_ids": [2**63]}}, "stop_token_ids"),
        ({"prompt": "x", "sampling_params": [1]}, "must be an object"),
        ({"messages": [{"role": "user", "content": "x"}]}, "chat_template"),  # it has none
    ],
)
def test_what_is_wrong_with_a_row_is_its_error(row, error) -> None:
    made = request(row)
    assert error in made[ERROR]
    assert made["sampling_params"].keys() == DEFAULTS.keys()  # rows have one schema
    assert made["id"] == "x"


def test_parameters_have_the_types_of_their_columns() -> None:
    found = sampling({"temperature": 1, "top_k": 3.0, "seed": None, "stop_token_ids": [4]}, {})
    assert [type(found["temperature"]), type(found["top_k"])] == [float, int]
    assert found["seed"] is None
    assert found["stop_token_ids"] == [4]
