"""Engines, prompts and vanilla outputs shared by the end-to-end tests.

Engines are slow to start, so tests say what they need by settings, and an engine lives until others
are asked for: at most two with Ouroboros and two vanilla. Vanilla outputs are computed once per
(prompts, parameters).
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import inspect
import json
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

import vllm_ouroboros

from .adapters import adapters  # noqa: F401

sys.path.append(str(Path(__file__).parent / "forked"))
import engine_processes

PAIR = Path(vllm_ouroboros.__file__).parent / "assets" / "tiny-code"
PROPOSER = "vllm_ouroboros.OuroborosProposer"
MODULES = (
    "argparse", "textwrap", "json.decoder", "json.encoder", "shutil", "tempfile", "random",
    "statistics", "difflib", "heapq", "bisect", "calendar", "configparser", "csv", "dataclasses",
    "fractions", "glob", "gzip", "inspect", "ipaddress", "logging", "mailbox", "mimetypes",
    "os", "pathlib", "pickle", "platform", "posixpath", "pprint", "queue",
)  # fmt: skip
BASE: dict[str, Any] = {
    "model": str(PAIR / "target"),
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 2**27,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
}
"""Engine arguments of every engine, unless a test says otherwise."""
ONE_PROCESS = {"distributed_executor_backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor"}
"""vLLM's executor for one device, of which vanilla engines make do: they start sooner than with the
one for several ranks, which it takes on the CPU."""
ALL_PROMPTS = "ALL_PROMPTS" in os.environ
"""As many prompts, seeds and draws as losslessness was judged by; else fewer of them."""

Ids = list[int]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is an end-to-end test."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


def stdlib_signatures() -> list[str]:
    """Signature and docstring of functions of the standard library, dedented; one module each
    in turn, in the order of their files.
    """
    by_module: list[list[str]] = []
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        lines = source.split("\n")
        found = []
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
                continue
            end = node.body[0].end_lineno or node.lineno
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).rstrip()
            found.append(text)
        by_module.append(found)
    depth = max(map(len, by_module))
    return [found[i] for i in range(depth) for found in by_module if i < len(found)]


@pytest.fixture(scope="session", autouse=True)
def _models() -> None:
    """This process starts no others only to look at a class of models."""
    engine_processes.look_at_models_in_this_process()


@pytest.fixture(scope="session")
def pair() -> Path:
    """Folder of the shipped pair: ``target`` and ``draft``."""
    return PAIR


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(PAIR / "target"))


@pytest.fixture(scope="session")
def texts(tokenizer) -> list[str]:
    """60 prompts of 24 to 200 tokens."""
    fitting = [t for t in stdlib_signatures() if 24 <= len(tokenizer.encode(t)) <= 200]
    assert len(fitting) >= 60
    return fitting[:60]


@pytest.fixture(scope="session")
def prompts(texts, tokenizer) -> list[Ids]:
    """The same as token ids, after the beginning-of-sequence token that the pair learned."""
    return [
        [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        for text in texts
    ]


@pytest.fixture(scope="session")
def judged(prompts) -> list[Ids]:
    """All 60 prompts with ``ALL_PROMPTS``, else the first 24."""
    return prompts if ALL_PROMPTS else prompts[:24]


def generate(llm, prompts: Sequence[Ids], params, one_by_one: bool = False) -> list:
    """Request outputs in the order of the prompts; ``params`` one, or one for each prompt."""
    given = [{"prompt_token_ids": ids} for ids in prompts]
    if not one_by_one:
        return llm.generate(given, params, use_tqdm=False)
    each = params if isinstance(params, list) else [params] * len(given)
    return [
        llm.generate([prompt], one, use_tqdm=False)[0]
        for prompt, one in zip(given, each, strict=True)
    ]


def tokens_of(outputs: Sequence) -> list[Ids]:
    """Token ids of the first completion of each request."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def shut_down(llm) -> None:
    """End an engine's process now, not when Python gets around to it.

    One in twenty sleeps on: the kernel hands its SIGTERM to a thread that does not wake the main
    one. Another signal does.
    """
    core = llm.llm_engine.engine_core
    again = threading.Timer(4, terminate, [core.resources.engine_manager.processes])
    again.start()
    try:
        core.shutdown(timeout=20)  # seconds; five by default, then it is killed
    finally:
        again.cancel()
    del llm, core
    gc.collect()


def terminate(processes: Sequence) -> None:
    """Ask processes to end, those that have not."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)


class Engines:
    """A few live engines; the one that was asked for longest ago gives way to another one."""

    def __init__(self, most: int = 2) -> None:
        self._most = most
        self._live: dict[str, Any] = {}  # by their arguments, the last one last

    def get(self, **arguments):
        from vllm import LLM

        key = json.dumps(arguments, sort_keys=True)
        if key in self._live:
            self._live[key] = self._live.pop(key)
        else:
            while len(self._live) >= self._most:
                shut_down(self._live.pop(next(iter(self._live))))
            self._live[key] = LLM(**arguments)
        return self._live[key]

    def close(self) -> None:
        while self._live:
            shut_down(self._live.popitem()[1])


class Vanilla:
    """Outputs of vLLM without speculation, computed once."""

    def __init__(self) -> None:
        self.engines = Engines()
        self._known: dict[str, list] = {}

    def __call__(self, prompts: Sequence[Ids], params, **arguments) -> list:
        each = params if isinstance(params, list) else [params]
        # the repr of SamplingParams leaves fields out
        key = repr((list(prompts), [msgspec.structs.asdict(one) for one in each], arguments))
        if key not in self._known:
            self._known[key] = generate(self.engine(**arguments), prompts, params)
        return self._known[key]

    def engine(self, **arguments):
        """A live engine."""
        return self.engines.get(**{**BASE, **ONE_PROCESS, **arguments})


@pytest.fixture(scope="session")
def vanilla() -> Iterator[Vanilla]:
    """Call with prompts and parameters (and engine arguments other than BASE)."""
    outputs = Vanilla()
    yield outputs
    outputs.engines.close()


@pytest.fixture(scope="session")
def _ouroboros_engines() -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture(scope="session")
def ouroboros(_ouroboros_engines):
    """Call with ``nodes``, ``options`` and engine arguments; returns a live ``LLM``.

    It drafts and verifies all it may, unless the options say otherwise: for models as small as
    these it would not pay, and what is tested must not depend on what forwards cost here.
    """

    def start(nodes: int = 26, options: dict | None = None, **arguments):
        fixed = {"draft_model": str(PAIR / "draft"), "adaptive": False}
        options = {**fixed, **(options or {})}
        return _ouroboros_engines.get(
            **{
                **BASE,
                "speculative_config": {"model": PROPOSER, "num_speculative_tokens": nodes},
                "additional_config": {"ouroboros": options},
                **arguments,
            }
        )

    return start


class Used:
    """Counters of what an engine did inside a ``with`` block."""

    def __init__(self, llm) -> None:
        self.llm = llm

    def __enter__(self) -> Used:
        self.before = vllm_ouroboros.stats(self.llm)
        return self

    def __exit__(self, *exc) -> None:
        after = vllm_ouroboros.stats(self.llm)
        self.counts = {key: after[key] - self.before[key] for key in after}

    def __getitem__(self, key: str) -> int:
        return self.counts[key]


def metric(llm, name: str) -> float:
    """Value of one of vLLM's own counters."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


class Tools:
    """The helpers above: test modules cannot import each other in importlib mode."""

    ALL_PROMPTS = ALL_PROMPTS
    BASE = BASE
    PROPOSER = PROPOSER
    Engines = Engines
    Used = Used
    generate = staticmethod(generate)
    tokens_of = staticmethod(tokens_of)
    metric = staticmethod(metric)


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
