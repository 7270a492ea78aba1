"""A byte-level BPE tokenizer from the metadata of a GGUF file, with its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vllm_ouroboros.cli.inputs import InputError

CONTROL = 3
"""Type of tokens in GGUF that text never encodes to."""
DIGITS_ALONE = {"smollm": True}
"""By GGUF's name of a pre-tokenizer: whether each digit is a piece of its own."""


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        InputError: a kind of tokenizer that is not known here.
    """
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    if ggml["model"] != "gpt2" or ggml["pre"] not in DIGITS_ALONE:
        raise InputError(f"the tokenizer {ggml['model']}, {ggml['pre']} is not known here")
    tokens: list[str] = ggml["tokens"]
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=DIGITS_ALONE[ggml["pre"]]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, ggml["token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        config[f"{role}_token"] = tokens[ggml[f"{name}_token_id"]]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
