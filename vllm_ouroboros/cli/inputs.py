"""What commands read: models and prompts, the shipped ones by default."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import vllm_ouroboros

ASSETS = Path(vllm_ouroboros.__file__).parent / "assets"
PAIR = ASSETS / "tiny-code"
TARGET, DRAFT = PAIR / "target", PAIR / "draft"
PROMPTS = ASSETS / "prompts.jsonl"
SHAPE = 'each line must be a JSON object {"prompt": "text"}'


class InputError(Exception):
    """Something the user can mend; one line with the option, its value and the fix."""


def shipped_prompts() -> tuple[tuple[str, str], ...]:
    """Ids and texts of the prompts inside the package."""
    try:
        rows = [json.loads(line) for line in PROMPTS.read_text().splitlines() if line.strip()]
        return tuple((str(row["id"]), str(row["prompt"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the shipped prompts cannot be read, reinstall ({error})") from None


def model_reference(value: str, option: str) -> str:
    """A model's folder as an absolute path, or a hub id as it is.

    Raises:
        InputError: neither; the message names ``option``.
    """
    path = Path(value).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{option} {value}: the folder has no config.json")
        return str(path.resolve())
    if path.exists():
        raise InputError(f"{option} {value}: is a file; pass the folder that has config.json")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", value):
        raise InputError(f"{option} {value}: no such folder, nor a hub id (owner/name)")
    return value


def usable_length(model: str, wanted: int) -> int:
    """Tokens of a request: as wanted, or less where the model knows fewer positions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def check_writable(path: Path, option: str) -> Path:
    """The path of a file to write, if it can be one.

    Raises:
        InputError: it is a folder, or in none.
    """
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise InputError(f"{option} {path}: is a folder or in none that exists; pass a file's path")
    return path


def json_object(text: str, option: str, example: str) -> dict[str, Any]:
    """The object of an option that takes JSON.

    Raises:
        InputError: it is something else; the message names ``option`` and an ``example``.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{option} {text}: is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{option} {text}: must be a JSON object such as {example}")
    return found


def check_files(files: Sequence[Path], what: str, kinds: Sequence[str]) -> None:
    """Whether files are there, and of kinds that can be read here, before any work.

    Args:
        files: by their paths.
        what: they are, for the message.
        kinds: endings.

    Raises:
        InputError: one is not.
    """
    for file in files:
        if not file.is_file():
            raise InputError(f"{what} {file}: no such file")
        if file.suffix not in kinds:
            raise InputError(f"{what} {file}: is none of {', '.join(kinds)}")
        if file.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise InputError(f"{what} {file}: pip install pyarrow to read it")


def read_prompts(file: Path, option: str) -> tuple[str, ...]:
    """The prompts of a file: JSON lines if its first line starts with a brace, else its lines.

    Raises:
        InputError: no such file, or a line that is no prompt.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise InputError(f"{option} {file}: {reason}; pass a text file of prompts") from None
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{option} {file}: has no prompts; {SHAPE}, or a prompt")
    if file.suffix != ".jsonl" and not rows[0][1].lstrip().startswith("{"):
        return tuple(line for _, line in rows)
    return tuple(_prompt(line, f"{option} {file}: line {number}") for number, line in rows)


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); {SHAPE}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is {line.strip()[:40]!r}; {SHAPE}")
    if "prompt" not in row:
        raise InputError(f'{where} has no "prompt", its keys are {", ".join(row)}; {SHAPE}')
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise InputError(f'{where}: "prompt" is {row["prompt"]!r}; it must be a text, not empty')
    return row["prompt"]
