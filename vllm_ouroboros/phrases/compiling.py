"""How loops are compiled.

Numba makes ways to call a function from C and from Python beside the loop itself, which take much
of its time where arguments hold many arrays. Nothing here is called from C, and parts of loops not
from Python.
"""

from __future__ import annotations

from numba import njit
from numba.extending import register_jitable

compiled = njit(cache=True, no_cfunc_wrapper=True)
"""A loop that Python calls."""
compiled_inner = register_jitable(cache=True, no_cfunc_wrapper=True)
"""A part of other loops; from Python it runs uncompiled."""
