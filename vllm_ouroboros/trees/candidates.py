"""Candidates for the children of a node: what draft model and pool offer there (compiled)."""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.compiling import compiled_inner
from vllm_ouroboros.phrases.contexts import CONTEXTS, key_of
from vllm_ouroboros.phrases.eviction import find
from vllm_ouroboros.trees.node_kinds import (
    BACKOFF_WEIGHTS,
    BASE_SHARE,
    MAX_COUNT_WEIGHT,
    OWN_WEIGHT,
    PREDICTION,
    PREDICTION_GUESS,
    SHARE_BOUNDS,
    Evidence,
    grade,
)
from vllm_ouroboros.trees.prediction import SURE_RUN

_WINDOW = int(PhraseSource.WINDOW)
_WINDOW_GUESS, _CONTINUES_GUESS = int(Evidence.WINDOW_GUESS), int(Evidence.CONTINUES_GUESS)
_CORRECTION, _CONTINUES_PHRASE = int(Evidence.CORRECTION), int(Evidence.CONTINUES_PHRASE)
_NONE, _COUNTED = int(Evidence.NONE), int(Evidence.COUNTED)
BRANCH_PROBABILITIES = (0.45, 0.25, 0.15, 0.1)
"""Probabilities assumed for the branches of a request that samples, by rank; the first also for
the token after a branch."""
NUM_COLUMNS = 11
(
    TOKEN, GRADE, EVIDENCE, CHAIN, NEXT, NEXT_GRADE, FOLLOWING, SLOT, PHRASE, PLACE, PARENT,
) = range(NUM_COLUMNS)  # fmt: skip
"""Columns int32 of a candidate: its token, grade and evidence; its place in the chain, or -1; the
draft model's token after it if it stands beside the chain, or -1, the grade of that, and where in
`RequestState.following` the token after that is, or -1; slot, number and next place of the phrase
that goes on from it; its parent once it waits in the frontier."""
IN_PREDICTION = -2
"""In the place of a slot: what goes on is the request's prediction, from a place behind so many
tokens that came as predicted."""


@compiled_inner
def _add(children, count, token, grade_, evidence, slot, phrase, place):
    """Add a child, or what the pool says for one that is there; returns how many there are."""
    for i in range(count):
        if children[i, TOKEN] == token:
            if evidence > children[i, EVIDENCE]:
                children[i, EVIDENCE] = evidence
                children[i, SLOT], children[i, PHRASE] = slot, phrase
                children[i, PLACE] = place
            return count
    if count == children.shape[0]:
        return count
    children[count, TOKEN], children[count, GRADE] = token, grade_
    children[count, EVIDENCE] = evidence
    children[count, CHAIN] = children[count, NEXT] = children[count, FOLLOWING] = -1
    children[count, SLOT], children[count, PHRASE] = slot, phrase
    children[count, PLACE] = place
    return count + 1


@compiled_inner
def _lead_on(req, s, child, flat):
    """Let the token at place ``flat`` of a request's ``following`` come after a candidate."""
    ranks, depth = req.following.shape[2:]
    at, k, n = flat // (ranks * depth), flat // depth % ranks, flat % depth
    child[NEXT] = req.following[s, at, k, n]
    child[NEXT_GRADE] = grade(req.following_probs[s, at, k, n])
    child[FOLLOWING] = flat + 1 if n + 1 < depth else -1


@compiled_inner
def draft_candidates(req, s, chain_at, following, children, draft_probs):
    """The draft model's children of a node: the chain's token, then alternatives and branches.

    Args:
        req: see `RequestState`.
        s: slot of the request.
        chain_at: the node's place in the chain, -1 for the root, -2 for a node beside the chain.
        following: columns `NEXT`, `NEXT_GRADE` and `FOLLOWING` of the node.
        children: int32 [C, NUM_COLUMNS], written.
        draft_probs: float64 [C], the draft model's probability of each, or -1; written.

    Returns:
        How many children there are.
    """
    count = 0
    draft_probs[:] = -1.0
    at = chain_at + 1
    if 0 <= at < req.chain_len[s]:
        count = _add(children, 0, req.chain[s, at], 0, 0, -1, 0, 0)
        children[0, CHAIN], draft_probs[0] = at, req.confidence[s, at]
        for k in range(req.alternatives.shape[2]):
            if req.alternatives[s, at, k] >= 0:
                before = count
                count = _add(children, count, req.alternatives[s, at, k], 0, 0, -1, 0, 0)
                if count > before:
                    draft_probs[before] = req.alternative_probs[s, at, k]
                    ranks, depth = req.following.shape[2:]
                    _lead_on(req, s, children[before], (at * ranks + k) * depth)
        if at < req.branches.shape[1]:
            for k in range(req.branches.shape[2]):
                if req.branches[s, at, k] >= 0:
                    before = count
                    graded = grade(BRANCH_PROBABILITIES[k])
                    count = _add(children, count, req.branches[s, at, k], graded, 0, -1, 0, 0)
                    if count > before:
                        children[before, NEXT] = req.branch_next[s, at, k]
                        children[before, NEXT_GRADE] = grade(BRANCH_PROBABILITIES[0])
    elif following[0] >= 0:
        count = _add(children, 0, following[0], following[1], 0, -1, 0, 0)
        if following[2] >= 0:
            _lead_on(req, s, children[0], following[2])
    return count


@compiled_inner
def pool_candidates(
    pool, scope, owner, context, default_grade, predicted, phrase_at, children, shares, count
):
    """The children of a node by its request's prediction and by the pool, added to those of the
    draft model.

    Args:
        pool: see `PoolArrays`.
        scope: of the request.
        owner: its number; see `PoolArrays.owners`.
        context: int32 [n], the last tokens that lead to the node, it included.
        default_grade: of a token that the draft model did not propose here.
        predicted: int32 [n], what the request is predicted to say.
        phrase_at: slot, number and next place of the phrase that led here; slot -1 for none, and
            `IN_PREDICTION`.
        children: int32 [C, NUM_COLUMNS], added to; evidence becomes the class of the share.
        shares: float64 [C], each child's share of what was counted, smoothed; written.
        count: children so far.

    Returns:
        How many children there are.
    """
    slot, g, place = phrase_at
    if slot == IN_PREDICTION and place < len(predicted):
        evidence = PREDICTION if g >= SURE_RUN else PREDICTION_GUESS
        count = _add(
            children, count, predicted[place], default_grade, evidence, slot, g + 1, place + 1
        )
    if slot >= 0 and place < pool.lengths[slot, g]:
        evidence = _CONTINUES_GUESS if pool.sources[slot, g] == _WINDOW else _CONTINUES_PHRASE
        token = pool.tokens[slot, g, place]
        count = _add(children, count, token, default_grade, evidence, slot, g, place + 1)
    shares[:] = BASE_SHARE
    counted = False
    for order in range(len(CONTEXTS)):
        slot = -1
        if len(context) >= CONTEXTS[order]:
            slot = find(pool, scope, key_of(context, len(context), order))
        if slot >= 0:
            for g in range(pool.counts[slot]):
                evidence = _COUNTED if pool.times[slot, g] > 0 else _CORRECTION
                if pool.sources[slot, g] == _WINDOW:
                    evidence = _WINDOW_GUESS
                token = pool.tokens[slot, g, 0]
                count = _add(children, count, token, default_grade, evidence, slot, g, 1)
            counted |= _blend_counts(
                pool, owner, slot, BACKOFF_WEIGHTS[order], children, count, shares
            )
    for i in range(count):
        evidence = children[i, EVIDENCE]
        if counted and evidence in (_COUNTED, _NONE):
            children[i, EVIDENCE] = _COUNTED + np.searchsorted(SHARE_BOUNDS, shares[i])
    return count


@compiled_inner
def _blend_counts(pool, owner, slot, backoff, children, count, shares):
    """Smooth the counts of a slot, which stands for a longer context, with the ``shares`` so far.

    ``backoff`` is the pseudo-count of those. A child goes on along the newest phrase of the longest
    context. Returns whether anything was counted.
    """
    times, own = np.zeros(shares.shape[0]), np.zeros(shares.shape[0])
    total, own_total = 0.0, 0.0
    for g in range(pool.counts[slot] - 1, -1, -1):  # backwards: the newest comes last
        if pool.sources[slot, g] == _WINDOW or pool.times[slot, g] == 0:
            continue
        owned = OWN_WEIGHT if pool.owners[slot, g] == owner else 0.0
        total += pool.times[slot, g]
        own_total += owned
        for i in range(count):
            if children[i, TOKEN] == pool.tokens[slot, g, 0]:
                times[i] += pool.times[slot, g]
                own[i] += owned
                if children[i, SLOT] == IN_PREDICTION:
                    continue
                children[i, SLOT], children[i, PHRASE], children[i, PLACE] = slot, g, 1
    weight = min(1.0, MAX_COUNT_WEIGHT / max(total, 1.0))
    for i in range(shares.shape[0]):
        weighted = weight * times[i] + own[i] + backoff * shares[i]
        shares[i] = weighted / (weight * total + own_total + backoff)
    return total > 0


@compiled_inner
def context_of(tokens, parents, node, text, committed, tail):
    """Fill ``tail`` from its end with the tokens that lead to a node, it included.

    Returns how many there are: fewer than it holds at the beginning of a text.
    """
    filled = 0
    while filled < tail.shape[0]:
        filled += 1
        if node >= 0:
            tail[-filled] = tokens[node]
            node = parents[node]
        elif committed > 0:
            committed -= 1
            tail[-filled] = text[committed]
        else:
            return filled - 1
    return filled
