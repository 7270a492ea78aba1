"""No data becomes code: no unpickling, no evaluation and no shell in what is shipped."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    file for folder in ("vllm_ouroboros", "kernels") for file in (ROOT / folder).rglob("*.py")
)
MODULES = {
    "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "pickle", "shelve",
}  # fmt: skip
CALLS = {
    "eval", "exec", "builtins.eval", "builtins.exec", "os.popen", "os.system",
    "numpy.lib.format.read_array", "pandas.read_pickle", "subprocess.getoutput",
    "subprocess.getstatusoutput", "torch.load", "torch.serialization.load", "yaml.full_load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip
FLAGS = {"allow_pickle", "shell"}
"""Arguments that must be absent or false, whoever is called."""


def names_of(tree: ast.Module) -> dict[str, str]:
    """What imported names stand for, by the name that the code uses."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                first = one.name.partition(".")[0]
                found[one.asname or first] = one.name if one.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for one in node.names:
                found[one.asname or one.name] = f"{node.module}.{one.name}"
    return found


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of what an expression names; empty for others."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def modules_in(node: ast.AST, names: dict[str, str]) -> list[str]:
    """Modules that a statement or a call imports."""
    if isinstance(node, ast.Import):
        return [one.name for one in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(one.name for one in node.names)]
    if not isinstance(node, ast.Call) or not node.args:
        return []
    imports = dotted(node.func, names) in ("importlib.import_module", "__import__")
    return [ast.unparse(node.args[0]).strip("\"'")] if imports else []


def dangers(code: str) -> Iterator[tuple[int, str]]:
    """Lines of a source that must not be there, each with what is wrong with it."""
    tree = ast.parse(code)
    names = names_of(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for module in modules_in(node, names):
            if MODULES & set(module.split(".")):
                yield line, module
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            name = dotted(node, names)
            if name in CALLS or MODULES & set(name.split(".")[:-1]):
                yield line, name
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value
                harmless = isinstance(value, ast.Constant) and not value.value
                if keyword.arg in FLAGS and not harmless:
                    yield line, f"{keyword.arg}="


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_is_shipped_runs_what_it_reads(file: Path) -> None:
    assert [f"{file}:{line}: {what}" for line, what in dangers(file.read_text())] == []


def test_all_that_is_shipped_is_looked_at() -> None:
    assert {"pool_file.py", "checkpoint.py", "tree_attention.py"} <= {one.name for one in SHIPPED}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "import cloudpickle as c", "from marshal import loads", "import shelve",
        "from some import _pickle",
        "import importlib\nimportlib.import_module('dill')", "__import__('pickle')",
        "import torch\ntorch.load('a')", "from torch import load as l\nl('a')",
        "import torch as t\nt.load('a', weights_only=True)", "import torch\nf = torch.load\nf('a')",
        "import numpy as np\nnp.load('a', allow_pickle=True)", "load('a', allow_pickle=flag)",
        "import multiprocessing\nmultiprocessing.pickle.loads(b'')",
        "eval('1')", "exec(code)", "import builtins\nbuiltins.eval('1')", "run = exec",
        "import yaml\nyaml.load(a)", "from yaml import unsafe_load\nunsafe_load(a)",
        "import subprocess\nsubprocess.run('a', shell=True)", "Popen('a', shell=flag)",
        "import os\nos.system('a')",
    ],
)  # fmt: skip
def test_what_is_looked_for_is_found(code: str) -> None:
    assert [*dangers(code)]


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()", "import numpy as np\nnp.load('a')", "np.load('a', allow_pickle=False)",
        "import yaml\nyaml.safe_load(a)", "import subprocess\nsubprocess.run(['a'], shell=False)",
        "import json\njson.load(a)", "text = 'import pickle'", "import safetensors as s\ns.load(b)",
    ],
)  # fmt: skip
def test_nothing_else_is_found(code: str) -> None:
    assert [*dangers(code)] == []
