"""Triton's interpreter in half of its time."""

from __future__ import annotations


def patch_once() -> None:
    """Replace what is in ``triton.language`` once for each function that a kernel calls. The launch
    has done so for the kernel, and doing it again at each call takes nearly half of the time.
    """
    from triton.runtime import interpreter

    called = set()

    def call(self, *args, **named):
        if self.fn not in called:
            called.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **named)

    interpreter.InterpretedFunction.__call__ = call
