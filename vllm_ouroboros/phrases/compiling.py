"""How loops are compiled.

Numba makes ways to call a function from C and from Python beside the loop itself, which take a
third of its time where arguments hold many arrays. Nothing here is called from C.
"""

from __future__ import annotations

from numba import njit

compiled = njit(cache=True, no_cfunc_wrapper=True)
"""A loop that Python calls."""
compiled_inner = njit(cache=True, no_cfunc_wrapper=True, no_cpython_wrapper=True)
"""A part of other loops, which Python cannot call."""
