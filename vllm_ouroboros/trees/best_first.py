"""Trees that grow where they promise most (compiled).

From the root on, the node most likely to be accepted is taken next, whoever proposed it: the draft
model's chain, its other choices beside the chain, and phrases of the pool anywhere. So the nodes of
a tree stand in descending order of their probability, and its first n are the best tree of n
nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import CONTEXTS, key_of
from vllm_ouroboros.phrases.eviction import find
from vllm_ouroboros.trees.draft_tree import ROOT, NodeSource
from vllm_ouroboros.trees.node_kinds import (
    ALONE,
    BEYOND,
    COUNTS,
    OTHERWISE,
    SHARES,
    START,
    UNLIKELY,
    Evidence,
    grade,
    kind_of,
)

_DRAFT, _SUFFIX = int(NodeSource.DRAFT), int(NodeSource.SUFFIX)
_WINDOW = int(PhraseSource.WINDOW)
_GUESS, _GUESS_ON = int(Evidence.GUESS), int(Evidence.GUESS_GOES_ON)
_SAID, _ON = int(Evidence.SAID), int(Evidence.GOES_ON)
_NONE, _COUNTED = int(Evidence.NONE), int(Evidence.COUNTED)
FRONT = 256  # nodes that wait to be taken, at most
CHILDREN = 32  # of a node, at most
TIE = 1e-6  # what a share counts beside a rate: between children of one kind
LEAST_LEFT = 1e-6  # of the draft model's odds, where all were given away
DRAWN = (0.45, 0.25, 0.15, 0.1)
"""What branches of a request that samples are taken for, by rank; the last one also for what
follows them."""


class Ranked(NamedTuple):
    """Trees of R requests with up to B nodes, best nodes first."""

    kinds: np.ndarray  # int32 [R, B]
    probabilities: np.ndarray  # float64 [R, B]


class _Front(NamedTuple):
    """Nodes that wait: one column each."""

    probability: np.ndarray  # float64 [F]
    columns: np.ndarray  # int32 [F, 9], see the constants below


# columns of a waiting node; the children of a node have the same ones
_TOKEN, _GRADE, _EVIDENCE, _CHAIN, _FOLLOW, _SLOT, _PHRASE, _PLACE, _PARENT = range(9)


@njit(cache=True)
def _offer(children, count, token, grade_, evidence, slot, phrase, place):
    """Add a child, or what the pool says for one that is there; returns how many there are."""
    for i in range(count):
        if children[i, _TOKEN] == token:
            if evidence > children[i, _EVIDENCE]:
                children[i, _EVIDENCE] = evidence
                children[i, _SLOT], children[i, _PHRASE] = slot, phrase
                children[i, _PLACE] = place
            return count
    if count == children.shape[0]:
        return count
    children[count, _TOKEN], children[count, _GRADE] = token, grade_
    children[count, _EVIDENCE] = evidence
    children[count, _CHAIN] = children[count, _FOLLOW] = -1
    children[count, _SLOT], children[count, _PHRASE] = slot, phrase
    children[count, _PLACE] = place
    return count + 1


@njit(cache=True)
def _from_draft(req, s, chain_at, follow, children, odds):
    """The draft model's children of a node: its own token, then its other choices.

    ``odds`` gets its probability of each; below zero where there is none.
    """
    count = 0
    odds[:] = -1.0
    at = chain_at + 1
    if 0 <= at < req.chain_len[s]:
        count = _offer(children, 0, req.chain[s, at], 0, 0, -1, 0, 0)
        children[0, _CHAIN], odds[0] = at, req.confidence[s, at]
        for k in range(req.others.shape[2]):
            if req.others[s, at, k] >= 0:
                before = count
                count = _offer(children, count, req.others[s, at, k], 0, 0, -1, 0, 0)
                if count > before:
                    odds[before] = req.odds[s, at, k]
        if at < req.branches.shape[1]:
            for k in range(req.branches.shape[2]):
                if req.branches[s, at, k] >= 0:
                    before = count
                    count = _offer(
                        children, count, req.branches[s, at, k], grade(DRAWN[k]), 0, -1, 0, 0
                    )
                    if count > before:
                        children[before, _FOLLOW] = req.follow[s, at, k]
    elif follow >= 0:
        count = _offer(children, 0, follow, grade(DRAWN[0]), 0, -1, 0, 0)
    return count


@njit(cache=True)
def _from_pool(pool, scope, context, unknown, going, children, shares, count):
    """The pool's children of a node that the tokens ``context`` lead to.

    ``going`` is the slot, number and next place of the phrase that led here, slot -1 for none.
    ``shares`` gets what was counted for each child, its evidence the class of that.
    """
    slot, g, place = going
    if slot >= 0 and place < pool.lengths[slot, g]:
        evidence = _GUESS_ON if pool.sources[slot, g] == _WINDOW else _ON
        token = pool.tokens[slot, g, place]
        count = _offer(children, count, token, unknown, evidence, slot, g, place + 1)
    shares[:] = START
    counted = False
    for long in range(len(CONTEXTS)):
        slot = -1
        if len(context) >= CONTEXTS[long]:
            slot = find(pool, scope, key_of(context, len(context), long))
        if slot >= 0:
            for g in range(pool.counts[slot]):
                evidence = _COUNTED if pool.times[slot, g] > 0 else _SAID
                if pool.sources[slot, g] == _WINDOW:
                    evidence = _GUESS
                token = pool.tokens[slot, g, 0]
                count = _offer(children, count, token, unknown, evidence, slot, g, 1)
            counted |= _count(pool, slot, OTHERWISE[long], children, count, shares)
    for i in range(count):
        evidence = children[i, _EVIDENCE]
        if counted and evidence in (_COUNTED, _NONE):
            children[i, _EVIDENCE] = _COUNTED + np.searchsorted(SHARES, shares[i])
    return count


@njit(cache=True)
def _count(pool, slot, otherwise, children, count, shares):
    """Blend ``shares`` with what was counted in a slot, which stands for a longer context.

    A child goes on along the newest phrase of the longest context. Returns whether anything was
    counted.
    """
    times, total = np.zeros(shares.shape[0]), 0.0
    for g in range(pool.counts[slot] - 1, -1, -1):  # backwards: the newest speaks last
        if pool.sources[slot, g] == _WINDOW or pool.times[slot, g] == 0:
            continue
        total += pool.times[slot, g]
        for i in range(count):
            if children[i, _TOKEN] == pool.tokens[slot, g, 0]:
                times[i] += pool.times[slot, g]
                children[i, _SLOT], children[i, _PHRASE], children[i, _PLACE] = slot, g, 1
    weight = min(1.0, COUNTS / max(total, 1.0))
    for i in range(shares.shape[0]):
        seen = weight * times[i] + otherwise * shares[i]
        shares[i] = seen / (weight * total + otherwise)
    return total > 0


@njit(cache=True)
def _context(tokens, parents, node, text, known, tail):
    """Fill ``tail`` from its end with the tokens that lead to a node, it included; how many."""
    held = 0
    while held < tail.shape[0]:
        held += 1
        if node >= 0:
            tail[-held] = tokens[node]
            node = parents[node]
        elif known > 0:
            known -= 1
            tail[-held] = text[known]
        else:
            return held - 1
    return held


@njit(cache=True)
def _wait(front, waiting, children, shares, odds, count, parent, reached, rates, least):
    """Put the children of a node among those that wait: the likeliest one first, then by what that
    leaves for the others.
    """
    left, unsaid = reached, 1.0
    taken = np.zeros(count, np.bool_)
    for _ in range(count):
        best, most = -1, 0.0
        for i in range(count):
            if taken[i]:
                continue
            if odds[i] >= 0:
                children[i, _GRADE] = grade(odds[i] / max(unsaid, odds[i], LEAST_LEFT))
            rate = rates[kind_of(children[i, _GRADE], children[i, _EVIDENCE])]
            if best < 0 or rate + TIE * shares[i] > most + TIE * shares[best]:
                best, most = i, rate
        probability = left * most
        if probability < least or waiting == front.probability.shape[0]:
            break
        taken[best] = True
        left -= probability
        unsaid -= max(0.0, odds[best])
        front.probability[waiting] = probability
        front.columns[waiting] = children[best]
        front.columns[waiting, _PARENT] = parent
        waiting += 1
    return waiting


@njit(cache=True)
def grow_best(req, pool, slots, rows, token_ids, rates, least, stops, alone, ranked):
    """Fill the trees of ``slots``: see the module, and `Requests` for where they go.

    Args:
        req: chains, what the draft model thought of, and the trees.
        pool: phrases.
        slots: int64 [R].
        rows: int64 [R], their rows in ``token_ids``.
        token_ids: int32 [*, max_model_len].
        rates: float64 [R, KINDS].
        least: probability below which no node is worth a row.
        stops: ids that end a text.
        alone: whether the pool has to do without the draft model.
        ranked: gets kinds and probabilities.
    """
    front = _Front(np.empty(FRONT), np.empty((FRONT, 9), np.int32))
    children = np.empty((CHILDREN, 9), np.int32)
    shares, odds = np.empty(CHILDREN), np.empty(CHILDREN)
    tail = np.empty(CONTEXTS[-1], np.int32)
    for r in range(slots.shape[0]):
        s = slots[r]
        known = req.known[s]
        tokens, parents, sources = req.tokens[s], req.parents[s], req.sources[s]
        token = np.int64(token_ids[rows[r], known - 1])
        chain_at, follow, node, reached = -1, -1, ROOT, 1.0
        going = (-1, 0, 0)
        size, waiting = 0, 0
        while size < req.limit[s]:
            ended = False
            for stop in stops:
                ended = ended or (node != ROOT and token == stop)
            if not ended:
                on_chain = (node == ROOT or chain_at >= 0) and not alone
                place = chain_at if on_chain else -2
                count = _from_draft(req, s, place, follow, children, odds)
                held = _context(tokens, parents, node, token_ids[rows[r]], known, tail)
                context = tail[tail.shape[0] - held :]
                unknown = BEYOND
                if alone or req.chain_len[s] == 0:
                    unknown = ALONE
                elif on_chain and chain_at + 1 < req.chain_len[s]:
                    unknown = UNLIKELY
                count = _from_pool(
                    pool, req.scope[s], context, unknown, going, children, shares, count
                )
                waiting = _wait(
                    front, waiting, children, shares, odds, count, node, reached, rates[r], least
                )
            if waiting == 0:
                break
            best = 0
            for i in range(1, waiting):
                if front.probability[i] > front.probability[best]:
                    best = i
            taken = front.columns[best].copy()
            reached = front.probability[best]
            waiting -= 1
            front.columns[best] = front.columns[waiting]
            front.probability[best] = front.probability[waiting]
            if req.narrow[s]:
                waiting = 0
            parent = taken[_PARENT]
            token = np.int64(taken[_TOKEN])
            chain_at, follow, node = taken[_CHAIN], taken[_FOLLOW], size
            going = (taken[_SLOT], taken[_PHRASE], taken[_PLACE])
            tokens[size], parents[size] = taken[_TOKEN], parent
            sources[size] = _DRAFT if taken[_GRADE] < UNLIKELY else _SUFFIX
            ranked.kinds[r, size] = kind_of(taken[_GRADE], taken[_EVIDENCE])
            ranked.probabilities[r, size] = reached
            size += 1
        req.size[s] = size
