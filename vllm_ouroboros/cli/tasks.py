"""The shipped task set: prompts for chat models, in nine tasks, some with several turns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ouroboros.cli.inputs import ASSETS, InputError

TASKS = ASSETS / "tasks.jsonl"


@dataclass(frozen=True)
class Task:
    """A conversation to be had with a chat model.

    Attributes:
        id: unique, such as "summary-03".
        task: what kind it is, such as "summary".
        turns: what the user says; a later turn follows the answer to those before.
    """

    id: str
    task: str
    turns: tuple[str, ...]


def read_tasks(file: Path = TASKS) -> tuple[Task, ...]:
    """The tasks of a file, in its order: JSON lines {"id", "task", "turns": ["text", ...]}.

    Raises:
        InputError: the file cannot be read, or a line is no task.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: no task set ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            turns = tuple(row["turns"])
            if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
                raise ValueError('"turns" must be a list of texts, none of them empty')
            found.append(Task(str(row["id"]), str(row["task"]), turns))
        except (ValueError, KeyError, TypeError) as error:
            shape = '{"id": "...", "task": "...", "turns": ["text", ...]}'
            raise InputError(f"{file}: line {number} is no task ({error!r}); {shape}") from None
    return tuple(found)


def one_of_each(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """The first of each kind."""
    return tuple({one.task: one for one in reversed(tasks)}.values())[::-1]


def has_chat_template(model: str) -> bool:
    """Whether a model in a folder says how a conversation becomes its prompt."""
    folder = Path(model)
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        return bool(config.get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def encode_chat(tokenizer: Any, said: Sequence[tuple[str, str]]) -> list[int]:
    """Token ids of a conversation, (role, text) each, up to where the answer begins."""
    text = chat_text(tokenizer, said)
    return list(tokenizer.encode(text, add_special_tokens=False))  # the template has them


def chat_text(tokenizer: Any, said: Sequence[tuple[str, str]]) -> str:
    """A conversation in the model's chat template, up to where the answer begins."""
    messages = [{"role": role, "content": text} for role, text in said]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
