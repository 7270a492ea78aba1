"""What commands read: models and prompts, the shipped ones by default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import vllm_ouroboros

ASSETS = Path(vllm_ouroboros.__file__).parent / "assets"
PAIR = ASSETS / "tiny-code"
TARGET, DRAFT = PAIR / "target", PAIR / "draft"
PROMPTS = ASSETS / "prompts.jsonl"


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
