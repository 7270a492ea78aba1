"""What the plugin takes for granted of vLLM is there, and as it was.

`vllm_api.txt` holds it for the supported version: names that are imported, signatures of methods
that are overridden, attributes of the base classes that are read. With another vLLM the test says
what is gone or changed. To accept that: `python tests/kernels/test_vllm_api.py > vllm_api.txt`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from difflib import unified_diff
from functools import cache
from pathlib import Path

from our_classes import CLASSES

import vllm_ouroboros

PACKAGE = Path(vllm_ouroboros.__file__).parent
KNOWN = Path(__file__).with_name("vllm_api.txt")


@cache
def parsed(module: str) -> ast.Module:
    """Source of an imported module."""
    return ast.parse(inspect.getsource(importlib.import_module(module)))


def imports() -> Iterator[str]:
    """Lines of names that our modules import from vLLM."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for name in node.names:
                    gone = "" if has(str(node.module), name.name) else " GONE"
                    yield f"import {node.module} {name.name}{gone}"


def has(module: str, name: str) -> bool:
    """Whether a module has a name, as an attribute or as a module below it."""
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


def of_vllm(cls: type) -> list[type]:
    """Classes of vLLM's among the bases."""
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] == "vllm"]


def ours(cls: type) -> list[type]:
    """Classes of the plugin's among the bases, itself included."""
    return [base for base in cls.__mro__ if base.__module__.startswith("vllm_ouroboros.")]


def overrides(cls: type) -> Iterator[str]:
    """Lines of vLLM's methods that our classes override, with their parameters."""
    for name in {name for base in ours(cls) for name in vars(base)}:
        base = next((one for one in of_vllm(cls) if name in vars(one)), None)
        if base is not None:
            method = getattr(vars(base)[name], "__func__", vars(base)[name])
            if inspect.isfunction(method) and not name.startswith("__"):
                yield f"override {base.__name__}.{name}{parameters(method)}"


def parameters(function: Callable) -> str:
    """Names of parameters, an equals sign behind those with a default."""
    found = inspect.signature(function).parameters.values()
    return f"({', '.join(p.name + ('=' * (p.default is not p.empty)) for p in found)})"


def reads(cls: type) -> Iterator[str]:
    """Lines of the attributes that our classes read of themselves and that are vLLM's."""
    own: set[str] = set()
    read: set[str] = set()
    for base in ours(cls):
        stored, loaded = attributes(base)
        own |= stored
        read |= loaded
    theirs = {name for base in of_vllm(cls) for name in attributes(base)[0]}
    for name in sorted(read):
        if name in theirs or name not in own:
            gone = "" if name in theirs else " GONE"
            yield f"attribute {of_vllm(cls)[0].__name__}.{name}{gone}"


def attributes(cls: type) -> tuple[set[str], set[str]]:
    """Names that a class has or sets on its instances, and those that it reads of them."""
    stored, read = {*vars(cls)}, set()
    for node in ast.walk(parsed(cls.__module__)):
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__:
            of_self = attributes_of_self(node)
            stored |= of_self[0]
            read |= of_self[1]
    return stored, read


def attributes_of_self(node: ast.AST) -> tuple[set[str], set[str]]:
    """Names that some code sets on ``self``, and those that it reads of it."""
    stored, read = set(), set()
    for place in ast.walk(node):
        if isinstance(place, ast.Attribute) and ast.unparse(place.value) == "self":
            (stored if isinstance(place.ctx, ast.Store) else read).add(place.attr)
    return stored, read


def lines() -> list[str]:
    """All that is taken for granted, sorted."""
    found = {*imports()}
    for cls in CLASSES:
        found |= {*overrides(cls), *reads(cls)}
    return sorted(found)


def test_vllm_is_as_it_was() -> None:
    changed = [
        line
        for line in unified_diff(KNOWN.read_text().splitlines(), lines(), lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert not changed, "\n".join(changed)


def test_what_is_gone_is_said() -> None:
    assert has("vllm.config", "VllmConfig") and has("vllm.v1.attention", "selector")
    assert not has("vllm.config", "NoSuchName") and not has("vllm.no_such_module", "x")
    code = ast.parse("self.a = self.b.c + self.d(other.e)\nself.f[0] = 1")
    assert attributes_of_self(code) == ({"a"}, {"b", "d", "f"})
    assert (
        parameters(lambda one, two=2, *more, three, **rest: 0) == "(one, two=, more, three, rest)"
    )


if __name__ == "__main__":
    print("\n".join(lines()))
