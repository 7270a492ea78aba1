"""Kinds of nodes: what speaks for a node's token."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numba import njit

EDGES = np.array([0.06, 0.14, 0.28, 0.45, 0.62, 0.78, 0.92], np.float32)
"""Bounds between the draft model's grades: its probability of a token, those before it being
wrong."""
UNLIKELY, BEYOND, ALONE = range(len(EDGES) + 1, len(EDGES) + 4)
"""Grades of a token that is none of the draft model's first ones, that stands where the draft model
was not asked, and that stands in a tree without any draft."""
GRADES = ALONE + 1


class Evidence(IntEnum):
    """What the pool says for a token; what it counted behind the tokens before it comes after these
    (see `SHARES`)."""

    NONE = 0  # nothing at all
    GUESS = 1  # a phrase of the Jacobi window begins with it
    GUESS_GOES_ON = 2  # it continues one whose tokens before it are on the path
    SAID = 3  # the target said so where a draft went wrong
    GOES_ON = 4  # it continues a phrase of text
    COUNTED = 5  # with the least share


START = 0.3
"""Share of a token where nothing was counted."""
OTHERWISE = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Times that the share by shorter contexts weighs against what was counted behind one of
`CONTEXTS`: the share of a token is its part of what was counted, smoothed from context to context
(the Dirichlet prior of hierarchical language models)."""
COUNTS = 3.0  # times that what was counted behind a context weighs, at most
SHARES = 1 / (1 + np.exp(-np.array(
    [-3.0, -2.0, -1.3, -0.7, -0.2, 0.3, 0.8, 1.3, 1.8, 2.4, 3.0, 3.7, 4.5, 5.5]
)))  # fmt: skip
"""Bounds between classes of shares."""
EVIDENCES = int(Evidence.COUNTED) + len(SHARES) + 1
KINDS = GRADES * EVIDENCES


@njit(cache=True)
def grade(probability):
    """Grade of a token by the draft model's probability."""
    found = 0
    for edge in EDGES:
        if probability >= edge:
            found += 1
    return found


@njit(cache=True)
def kind_of(grade, evidence):
    """Kind of a node."""
    return grade * EVIDENCES + evidence
