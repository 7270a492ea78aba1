"""Corpus of the tiny pair: functions of Python files, exclusion, split and tokenizer."""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import site
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS_ID, EOS_ID = 0, 1
SPECIAL_TOKENS = ["<s>", "</s>"]
MIN_LINES, MAX_LINES = 3, 50
MAX_FILE_BYTES = 1_000_000  # larger files are generated tables
# One token for a line break with its indentation: with separate tokens a small model falls into
# endless spaces under greedy decoding.
SPLIT_PATTERN = r"\n+ *| ?[A-Za-z_]+| ?[0-9]| ?[^\sA-Za-z0-9_]+|[^\S\n]+"


class PairError(Exception):
    """A user's mistake; the message names the option, its value and what to do."""


@dataclass(frozen=True, slots=True)
class Function:
    """One dedented function; `prompt` is its signature and docstring, "" without a docstring."""

    text: str
    prompt: str


def default_sources() -> list[Path]:
    """Standard libraries of every pyenv and system Python 3; this environment's site-packages."""
    found = [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]
    for pattern in (".pyenv/versions/3*/lib/python3*", ".local/share/uv/python/*/lib/python3*"):
        found += sorted(Path.home().glob(pattern))
    found += sorted(Path("/usr/lib").glob("python3.*"))
    return list(dict.fromkeys(path.resolve() for path in found if path.is_dir()))


def extract_functions(source: str) -> list[Function]:
    """Functions of 3 to 50 lines in a file's text: methods too, functions in functions not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # Python 2, templates, files made to be broken
    lines = source.split("\n")
    found: list[Function] = []
    scopes: list[ast.AST] = [tree]
    while scopes:
        for node in ast.iter_child_nodes(scopes.pop()):
            if isinstance(node, ast.ClassDef | ast.If | ast.Try):
                scopes.append(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                function = _cut(node, lines)
                if function is not None:
                    found.append(function)
    return found


def _cut(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function | None:
    end = node.end_lineno or node.lineno
    if not MIN_LINES <= end - node.lineno + 1 <= MAX_LINES:
        return None
    indent = " " * node.col_offset
    kept = [line.removeprefix(indent).rstrip() for line in lines[node.lineno - 1 : end]]
    text = "\n".join(kept)
    if "\t" in text or "\r" in text or not text.startswith(("def ", "async def ")):
        return None
    # Test functions without a docstring repeat themselves by design: good teachers of loops.
    has_docstring = ast.get_docstring(node, clean=False) is not None and len(node.body) > 1
    if text.startswith("def test_") and not has_docstring:
        return None
    doc_end = (node.body[0].end_lineno or end) - node.lineno + 1 if has_docstring else 0
    return Function(text, "\n".join(kept[:doc_end]))


def _functions_of_file(path: Path) -> list[Function]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return []
        return extract_functions(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []


def read_functions(sources: Sequence[Path], workers: int = 2) -> Iterator[Function]:
    """Yields the distinct functions of all `*.py` files under `sources`."""
    for source in sources:
        if not source.is_dir():
            raise PairError(f"--sources: '{source}' is not a directory; name one with Python files")
    paths = sorted({path for source in sources for path in source.rglob("*.py")})
    seen: set[bytes] = set()
    for functions in _parsed(paths, workers):
        for function in functions:
            digest = hashlib.blake2b(function.text.encode(errors="replace"), digest_size=12)
            if digest.digest() not in seen:
                seen.add(digest.digest())
                yield function


def _parsed(paths: Sequence[Path], workers: int) -> Iterator[list[Function]]:
    if workers == 1:
        yield from map(_functions_of_file, paths)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_functions_of_file, paths, chunksize=64)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


class Exclusion:
    """Tells which functions share signature and docstring with a benchmark prompt."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self._by_name: dict[str, list[str]] = {}
        for prompt in prompts:
            start = max(prompt.find("def "), 0)  # a prompt may open with imports
            squeezed = _squeeze(prompt[start:])
            self._by_name.setdefault(self._name(squeezed), []).append(squeezed)

    @staticmethod
    def _name(text: str) -> str:
        return text.partition("(")[0]

    @classmethod
    def from_files(cls, files: Sequence[Path]) -> Exclusion:
        return cls(prompt for file in files for prompt in read_prompts(file))

    def __contains__(self, function: Function) -> bool:
        text = function.text.removeprefix("async ")
        prompts = self._by_name.get(self._name(_squeeze(text)))
        if not prompts:
            return False
        squeezed = _squeeze(text)
        own = _squeeze(function.prompt.removeprefix("async "))
        return any(squeezed.startswith(p) or (own and p.startswith(own)) for p in prompts)


def read_prompts(file: Path) -> list[str]:
    """The "prompt" fields of a JSON-lines file."""
    try:
        lines = file.read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PairError(
            f"'{file}' is no readable prompt file ({type(error).__name__}: {error}); "
            'it needs one JSON object with a "prompt" field per line'
        ) from error


def is_held_out(function: Function, one_in: int = 200) -> bool:
    """Splits by hash of signature and docstring, so that versions of a function stay together."""
    key = _squeeze(function.prompt or function.text)
    digest = hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % one_in == 0


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE whose ids 0 and 1 are `<s>` and `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def add_bos(tokenizer: Tokenizer) -> Tokenizer:
    """Makes the tokenizer open every text with `<s>`, as the models saw it in training."""
    bos = SPECIAL_TOKENS[BOS_ID]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, BOS_ID)]
    )
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory, opening every text with `<s>`."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise PairError(f"'{path}' does not exist; run the corpus command, or name another pair")
    return add_bos(Tokenizer.from_file(str(path)))
