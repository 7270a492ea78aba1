"""A request's options on their way: what the front end makes of a prediction."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_ouroboros.config import KEY
from vllm_ouroboros.integration.request_options import MOST_CHARACTERS, sendable

MAX_LEN = 32


class Tokenizer:
    """A token for each character; keeps the length of what it was given."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        self.given = len(text)
        return [ord(one) % 50 for one in text]


def processor(tokenizer=None) -> SimpleNamespace:
    model = SimpleNamespace(max_model_len=MAX_LEN, get_vocab_size=lambda: 50)
    return SimpleNamespace(model_config=model, tokenizer=tokenizer)


def test_only_what_can_be_of_use_of_a_prediction_is_tokenized() -> None:
    tokenizer = Tokenizer()
    sent = sendable({KEY: {"prediction": "x" * 10**7}}, processor(tokenizer))[KEY]
    assert len(sent["prediction"]) == MAX_LEN
    assert tokenizer.given == MOST_CHARACTERS * MAX_LEN


def test_ids_are_cut_and_checked() -> None:
    assert sendable({KEY: {"prediction": [7] * 99}}, processor())[KEY] == {
        "prediction": [7] * MAX_LEN
    }
    with pytest.raises(VLLMValidationError, match="token id 50"):
        sendable({KEY: {"prediction": [7, 50]}}, processor())


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(VLLMValidationError, match="skip_tokenizer_init"):
        sendable({KEY: {"prediction": "x"}}, processor())
