"""Random completion requests: request ``index`` of a seed is the same in every run."""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MODULES = (
    "argparse", "ast", "bisect", "calendar", "configparser", "csv", "difflib", "fractions",
    "gzip", "heapq", "inspect", "ipaddress", "json.decoder", "logging", "mailbox", "os",
    "pathlib", "pickle", "posixpath", "queue", "random", "shutil", "statistics", "tempfile",
    "textwrap", "tokenize", "typing", "unittest.case", "uuid", "zipfile",
)  # fmt: skip
CONTEXT = 512
"""Tokens of prompt and output together (--max-model-len)."""
FIRST_WORD, COMMON_IDS = 2, 600
"""Ids below the first are special; those below the second are frequent tokens."""
STOPS = ("\n\n", "return", ":", "self", "):", "if ", "None", "\n    ", "def")
WORDS = ("return", " self", "if", " None", " in", "for", "def")
SCHEMAS: tuple[dict[str, Any], ...] = (
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 10},
            "size": {"type": "integer", "minimum": 0, "maximum": 500},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "size", "ok"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 6},
)
REGEXES = (r"(\n    [a-z]{1,8} = [0-9]{1,4}){1,3}", r"[A-Z][a-z]{2,9}( [a-z]{1,7}){0,5}\.")
CHOICES = (["yes", "no"], ["def", "class", "return None", "return self"])
GRAMMARS = (
    ('root ::= "[" item ("," item)* "]"\nitem ::= [1-9] [0-9]?\n', r"\[[1-9]\d?(,[1-9]\d?)*\]"),
    ('root ::= "    return " name "." name\nname ::= [a-z]+\n', r"    return [a-z]+\.[a-z]+"),
)
"""Grammars, with a regular expression of the same language."""


@dataclass(frozen=True)
class Request:
    """A request and when its client leaves, if it does.

    Attributes:
        index: its number; -1 for one that is not random.
        body: JSON of ``/v1/completions``.
        leave_after_pieces: drop a stream's connection after so many pieces.
        leave_after_seconds: drop the connection after so long.
        pause_seconds: wait so long after each piece of a stream, as a slow reader does.
    """

    index: int
    body: dict[str, Any]
    leave_after_pieces: int | None = None
    leave_after_seconds: float | None = None
    pause_seconds: float | None = None

    @property
    def sampled(self) -> bool:
        return self.body["temperature"] > 0

    @property
    def deterministic(self) -> bool:
        return not self.sampled or "seed" in self.body

    @property
    def leaves(self) -> bool:
        return self.leave_after_pieces is not None or self.leave_after_seconds is not None


class PromptSource(Protocol):
    """Makes prompts; ``vocabulary`` is the number of token ids."""

    vocabulary: int

    def draw(self, rng: random.Random, tokens: int) -> str | list[int]:
        """A prompt of about so many tokens."""


class Prompts:
    """Token ids of functions of the standard library: signatures, docstrings, bodies."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.vocabulary = self._tokenizer.get_vocab_size()
        self._functions = [self._tokenizer.encode(text).ids for text in _functions()]

    def draw(self, rng: random.Random, tokens: int) -> str | list[int]:
        """A prompt of about so many tokens."""
        ids: list[int] = []
        if rng.random() < 0.15:
            # an end in the middle of a character would come back at the beginning of the output
            ids = [rng.randrange(FIRST_WORD, self.vocabulary) for _ in range(tokens)]
            return ids + self._functions[0][:2]
        at = rng.randrange(len(self._functions))
        while len(ids) < tokens:  # neighbours are of one module, as in a file
            ids += self._functions[at % len(self._functions)]
            at += 1
        if rng.random() < 0.3:
            return ids[:tokens]
        return self._tokenizer.decode(ids[:tokens]) or "def "


def _functions() -> list[str]:
    found = []
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        lines = source.split("\n")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                found.append(text.rstrip() + "\n\n")
    return found


def last_request() -> Request:
    """A plain greedy request, to see that the server still answers as it should."""
    prompt = 'def mean(values):\n    """Returns the arithmetic mean of the values."""'
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 64, "return_token_ids": True}
    return Request(-1, body)


def random_request(
    index: int, seed: int, prompts: PromptSource, without: frozenset[str] = frozenset()
) -> Request:
    """The request of an index; ``without`` names fields of the body that are left out."""
    rng = random.Random(f"{seed}:{index}")
    body: dict[str, Any] = {
        "max_tokens": rng.choice((1, 2, 8)) if rng.random() < 0.15 else rng.randint(4, 96),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    low, high = rng.choices(((1, 40), (40, 160), (160, 400)), (30, 50, 20))[0]
    tokens = min(rng.randint(low, high), CONTEXT - body["max_tokens"] - 16)
    body["prompt"] = prompts.draw(rng, tokens)
    body["temperature"] = 0.0
    if rng.random() < 0.5:
        body |= _sampling(rng)
    if rng.random() < 0.15:
        body["structured_outputs"] = _structure(rng)
    if rng.random() < 0.6:
        body |= _extras(rng, prompts.vocabulary, body)
    if rng.random() < 0.5:
        body |= _stream(rng, body)
    body = {key: value for key, value in body.items() if key not in without}
    pieces = seconds = None
    if rng.random() < 0.12 and "abort" not in without:
        if body.get("stream") and rng.random() < 0.6:
            pieces = rng.randint(1, 12)
        else:
            seconds = rng.uniform(0.0, 2.0)
    return Request(index, body, pieces, seconds)


def _some(rng: random.Random, fields: dict[str, tuple[float, Any]]) -> dict[str, Any]:
    """Those of the fields that their probability lets in; values are made when drawn."""
    return {name: make() for name, (chance, make) in fields.items() if rng.random() < chance}


def _sampling(rng: random.Random) -> dict[str, Any]:
    fields = {
        "top_p": (0.4, lambda: round(rng.uniform(0.3, 0.99), 3)),
        "top_k": (0.35, lambda: rng.choice((1, 2, 5, 20, 50, 200))),
        "min_p": (0.25, lambda: round(rng.uniform(0.01, 0.4), 3)),
        "seed": (0.85, lambda: rng.randrange(2**31)),
        "n": (0.15, lambda: rng.randint(2, 3)),
    }
    return {"temperature": round(rng.uniform(0.2, 1.3), 3), **_some(rng, fields)}


def _structure(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(("json", "regex", "choice", "grammar"))
    if kind == "grammar":
        return {kind: rng.choice(GRAMMARS)[0]}
    structure: dict[str, Any] = {
        kind: rng.choice({"json": SCHEMAS, "regex": REGEXES, "choice": CHOICES}[kind])
    }
    if kind == "json" and rng.random() < 0.5:
        structure["disable_any_whitespace"] = True
    return structure


def _extras(rng: random.Random, vocabulary: int, body: dict[str, Any]) -> dict[str, Any]:
    """What any request may have; a structured one has no second say in which tokens may come."""

    def ids(count: int, below: int) -> list[int]:
        return sorted(rng.sample(range(FIRST_WORD, below), count))

    fields: dict[str, tuple[float, Any]] = {
        "repetition_penalty": (0.15, lambda: round(rng.uniform(0.8, 1.5), 3)),
        "presence_penalty": (0.12, lambda: round(rng.uniform(-0.5, 1.5), 3)),
        "frequency_penalty": (0.12, lambda: round(rng.uniform(-0.3, 1.0), 3)),
        "logprobs": (0.25, lambda: rng.randint(0, 5)),
        "prompt_logprobs": (0.08, lambda: rng.randint(0, 3)),
        "cache_salt": (0.12, lambda: rng.choice(("salt-a", "salt-b"))),
        "priority": (0.15, lambda: -abs(rng.randint(-2, 2))),  # above 0 may starve: no hang
        "skip_special_tokens": (0.05, lambda: False),
    }
    if "structured_outputs" not in body:
        fields |= {
            "logit_bias": (
                0.15,
                lambda: {
                    str(i): round(rng.uniform(-8, 4), 2)
                    for i in ids(rng.randint(1, 12), COMMON_IDS)
                },
            ),
            "min_tokens": (0.15, lambda: rng.randint(1, body["max_tokens"])),
            "stop": (0.2, lambda: rng.sample(STOPS, rng.randint(1, 3))),
            "stop_token_ids": (0.12, lambda: ids(rng.randint(1, 4), COMMON_IDS)),
            "ignore_eos": (0.12, lambda: True),
            "bad_words": (0.12, lambda: rng.sample(WORDS, rng.randint(1, 3))),
            "allowed_token_ids": (0.08, lambda: ids(rng.randint(100, 1500), vocabulary)),
            "echo": (0.08, lambda: True),
        }
    extras = _some(rng, fields)
    if "stop" in extras and rng.random() < 0.4:
        extras["include_stop_str_in_output"] = True
    return extras


def _stream(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    if "prompt_logprobs" in body or (body.get("echo") and "logprobs" in body):
        return {}  # vLLM has no logprobs of the prompt in a stream
    stream: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    if rng.random() < 0.1:
        stream["stream_interval"] = rng.randint(2, 10)
    return stream


def reference_body(body: dict[str, Any]) -> dict[str, Any]:
    """The same request for the comparison: at once, and without what says nothing of the text."""
    left_out = ("stream", "stream_options", "stream_interval", "priority", "cache_salt")
    return {key: value for key, value in body.items() if key not in left_out}


def violations(structure: dict[str, Any], text: str) -> list[str]:
    """How a complete text breaks its structure."""
    import json

    import jsonschema

    if "json" in structure:
        try:
            jsonschema.validate(json.loads(text), structure["json"])
        except (ValueError, jsonschema.ValidationError) as error:
            return [f"{text!r} breaks its schema: {str(error).splitlines()[0]}"]
    elif "choice" in structure and text not in structure["choice"]:
        return [f"{text!r} is none of {structure['choice']}"]
    elif "regex" in structure or "grammar" in structure:
        pattern = structure.get("regex") or dict(GRAMMARS)[structure["grammar"]]
        if not re.fullmatch(pattern, text):
            return [f"{text!r} does not match {pattern!r}"]
    return []
