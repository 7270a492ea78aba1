"""What overrides a method of vLLM's takes all that vLLM may pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
from our_classes import CLASSES

from vllm_ouroboros.integration.cuda_runner import OuroborosCUDARunner


def overrides(cls: type) -> Iterator[tuple[str, inspect.Signature, inspect.Signature]]:
    """Names of our methods that stand in a class of vLLM's, ours and theirs."""
    order = [base for base in cls.__mro__ if base.__module__ != "builtins"]
    for at, ours in enumerate(order):
        if not ours.__module__.startswith("vllm_ouroboros."):
            continue
        for name, method in vars(ours).items():
            method = getattr(method, "__func__", method)
            theirs = next(
                (vars(base)[name] for base in order[at + 1 :]
                 if name in vars(base) and base.__module__.startswith("vllm.")),
                None,
            )  # fmt: skip
            theirs = getattr(theirs, "__func__", theirs)
            if inspect.isfunction(method) and inspect.isfunction(theirs):
                yield name, inspect.signature(method), inspect.signature(theirs)


def missing(ours: inspect.Signature, theirs: inspect.Signature) -> list[str]:
    """Parameters that vLLM's method has and ours does not take."""
    kinds = {p.kind for p in ours.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return []
    return [name for name in theirs.parameters if name not in ours.parameters and name != "self"]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_overrides_take_what_vllm_passes(cls: type) -> None:
    assert {name: found for name, *both in overrides(cls) if (found := missing(*both))} == {}


def test_a_method_that_takes_less_is_found() -> None:
    class Less(OuroborosCUDARunner):
        def profile_run(self) -> None: ...

    Less.__module__ = "vllm_ouroboros.less"
    found = [missing(*both) for name, *both in overrides(Less) if name == "profile_run"]
    assert found[0] == ["randomize_inputs"]
