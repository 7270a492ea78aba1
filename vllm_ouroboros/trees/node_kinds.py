"""Kinds of nodes: what the draft model and the phrase pool say for a node's token.

A kind is a grade (the draft model's probability, in classes) and an evidence (what the pool says).
The policy estimates an acceptance rate for each kind.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from vllm_ouroboros.phrases.compiling import compiled

GRADE_BOUNDS = np.array([0.06, 0.14, 0.28, 0.45, 0.62, 0.78, 0.92], np.float32)
"""Bounds between the draft model's grades: its probability of a token, given that the siblings
before it are wrong."""
NOT_IN_TOP_K, BEYOND_CHAIN, WITHOUT_DRAFT = range(len(GRADE_BOUNDS) + 1, len(GRADE_BOUNDS) + 4)
"""Grades of a token that is none of the draft model's top-k alternatives, that stands behind the
end of the chain, and that stands in a tree without any draft."""
NUM_GRADES = WITHOUT_DRAFT + 1


class Evidence(IntEnum):
    """What the pool says for a token; from `COUNTED` on, one class for each of `SHARE_BOUNDS`."""

    NONE = 0  # nothing at all
    WINDOW_GUESS = 1  # a phrase of the Jacobi window begins with it
    CONTINUES_GUESS = 2  # it continues such a phrase, whose tokens before it are on the path
    CORRECTION = 3  # the target chose it where a draft was rejected
    CONTINUES_PHRASE = 4  # it continues a phrase of text
    COUNTED = 5  # it was counted behind the tokens before it; the smallest share


BASE_SHARE = 0.1
"""Share of a token that was not counted behind any context."""
BACKOFF_WEIGHTS = (4.0, 3.0, 2.0, 1.0, 0.5)
"""Pseudo-counts of the share by shorter contexts, for each of `CONTEXTS`: a token's share is its
part of what was counted behind a context, smoothed with that of the next shorter context (the
Dirichlet prior of hierarchical language models)."""
MAX_COUNT_WEIGHT = 3.0
"""Observations that the counts behind one context weigh, at most."""
OWN_WEIGHT = 2.0
"""Observations that a phrase counts for on top where the request itself wrote it, or its prompt: a
text is more like itself than like others. It and the three above were tuned by scripts/simulate on
traces of SmolLM2-135M-Instruct (54 chat prompts in eight tasks) and of the shipped pair (HumanEval
prompts), at batch 1 and 8, with figures of the shipped task set in view."""
SHARE_BOUNDS = 1 / (1 + np.exp(-np.array(
    [-3.0, -2.0, -1.3, -0.7, -0.2, 0.3, 0.8, 1.3, 1.8, 2.4, 3.0, 3.7, 4.5, 5.5]
)))  # fmt: skip
"""Bounds between classes of shares, evenly spread in log-odds."""
PREDICTION_GUESS = int(Evidence.COUNTED) + len(SHARE_BOUNDS) + 1
"""Evidence of a token that the request's prediction has next, where the text has hardly followed
it yet."""
PREDICTION = PREDICTION_GUESS + 1
"""The same where the text has followed it for some tokens."""
NUM_EVIDENCES = PREDICTION + 1
NUM_KINDS = NUM_GRADES * NUM_EVIDENCES


@compiled
def grade(probability):
    """Grade of a token by the draft model's probability."""
    found = 0
    for bound in GRADE_BOUNDS:
        if probability >= bound:
            found += 1
    return found


@compiled
def kind_of(grade, evidence):
    """Kind of a node."""
    return grade * NUM_EVIDENCES + evidence
