"""Loops and their parts."""

from __future__ import annotations

from vllm_ouroboros.phrases.compiling import compiled, compiled_inner


@compiled_inner
def doubled(number):
    return 2 * number


@compiled
def quadrupled(number):
    return doubled(doubled(number))


def test_loops_have_parts_which_python_may_call_too() -> None:
    assert quadrupled(3) == 12
    assert quadrupled.signatures, "compiled"
    assert doubled(3) == 6
