"""Best-first trees: they grow where acceptance is most likely (compiled).

From the root on, the node most likely to be accepted is taken next, whoever proposed it: the draft
model's chain, its top-k alternatives beside the chain, what the request's sender predicts, and
phrases of the pool anywhere. So the
nodes of a tree stand in descending order of their probability, and its first n are the best tree of
n nodes (the expansion of EAGLE-2's dynamic trees, arXiv 2406.16858, over several proposers).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ouroboros.phrases.compiling import compiled, compiled_inner
from vllm_ouroboros.phrases.contexts import CONTEXTS
from vllm_ouroboros.trees.candidates import (
    CHAIN,
    EVIDENCE,
    FOLLOWING,
    GRADE,
    IN_PREDICTION,
    NEXT,
    NEXT_GRADE,
    NUM_COLUMNS,
    PARENT,
    PHRASE,
    PLACE,
    SLOT,
    TOKEN,
    context_of,
    draft_candidates,
    pool_candidates,
)
from vllm_ouroboros.trees.draft_tree import ROOT, NodeSource
from vllm_ouroboros.trees.node_kinds import (
    BEYOND_CHAIN,
    NOT_IN_TOP_K,
    WITHOUT_DRAFT,
    grade,
    kind_of,
)
from vllm_ouroboros.trees.prediction import follow

_DRAFT, _SUFFIX = int(NodeSource.DRAFT), int(NodeSource.SUFFIX)
_PREDICTION = int(NodeSource.PREDICTION)
MAX_FRONTIER = 256  # nodes that wait to be taken, at most
MAX_CHILDREN = 32  # of a node, at most
TIE_BREAK = 1e-6  # what a share counts beside a rate: between children of one kind
MIN_REMAINING = 1e-6  # of the draft model's probability, where all was given to siblings


class Ranked(NamedTuple):
    """Trees of R requests with up to B nodes, best nodes first."""

    kinds: np.ndarray  # int32 [R, B]
    probabilities: np.ndarray  # float64 [R, B]


class _Frontier(NamedTuple):
    """Nodes that wait to be taken."""

    probability: np.ndarray  # float64 [F]
    columns: np.ndarray  # int32 [F, NUM_COLUMNS], see `candidates`


@compiled_inner
def _push(
    frontier, pending, children, shares, draft_probs, count, parent, path_probability, rates,
    min_probability,
):  # fmt: skip
    """Put the ``count`` children of a node into the frontier, the likeliest first; each gets its
    rate's part of the probability that is left by those before it. Returns how many nodes wait.
    """
    remaining, draft_left = path_probability, 1.0
    taken = np.zeros(count, np.bool_)
    for _ in range(count):
        best, most = -1, 0.0
        for i in range(count):
            if taken[i]:
                continue
            if draft_probs[i] >= 0:
                left = max(draft_left, draft_probs[i], MIN_REMAINING)
                children[i, GRADE] = grade(draft_probs[i] / left)
            rate = rates[kind_of(children[i, GRADE], children[i, EVIDENCE])]
            if best < 0 or rate + TIE_BREAK * shares[i] > most + TIE_BREAK * shares[best]:
                best, most = i, rate
        probability = remaining * most
        if probability < min_probability or pending == frontier.probability.shape[0]:
            break
        taken[best] = True
        remaining -= probability
        draft_left -= max(0.0, draft_probs[best])
        frontier.probability[pending] = probability
        for column in range(NUM_COLUMNS):  # element by element, see `insert`
            frontier.columns[pending, column] = children[best, column]
        frontier.columns[pending, PARENT] = parent
        pending += 1
    return pending


@compiled
def grow_best(
    req, pool, slots, rows, token_ids, rates, min_probability, stops, without_draft, ranked
):  # fmt: skip
    """Fill the trees of ``slots``: see the module, and `RequestState` for where they go.

    Args:
        req: chains, the draft model's alternatives, and the trees.
        pool: phrases.
        slots: int64 [R].
        rows: int64 [R], their rows in ``token_ids``.
        token_ids: int32 [*, max_model_len].
        rates: float64 [R, NUM_KINDS].
        min_probability: probability below which no node is worth a row.
        stops: ids that end a text.
        without_draft: grow trees of phrases alone.
        ranked: kinds and probabilities of the nodes, written.
    """
    frontier = _Frontier(np.empty(MAX_FRONTIER), np.empty((MAX_FRONTIER, NUM_COLUMNS), np.int32))
    children = np.empty((MAX_CHILDREN, NUM_COLUMNS), np.int32)
    shares, draft_probs = np.empty(MAX_CHILDREN), np.empty(MAX_CHILDREN)
    tail = np.empty(CONTEXTS[-1], np.int32)
    for r in range(slots.shape[0]):
        s = slots[r]
        committed = req.committed[s]
        tokens, parents, sources = req.tokens[s], req.parents[s], req.sources[s]
        token = np.int64(token_ids[rows[r], committed - 1])
        chain_at, node, path_probability = -1, ROOT, 1.0
        following = (np.int32(-1), np.int32(0), np.int32(-1))
        phrase_at = (-1, 0, 0)
        predicted = req.predicted[s, : req.predicted_len[s]]
        if len(predicted) > 0:
            follow(req, s, token_ids[rows[r]], committed)
            phrase_at = (IN_PREDICTION, req.predicted_run[s], req.predicted_at[s])
        size, pending = 0, 0
        while size < req.node_limit[s]:
            ended = False
            for stop in stops:
                ended = ended or (node != ROOT and token == stop)
            if not ended:
                on_chain = (node == ROOT or chain_at >= 0) and not without_draft
                place = chain_at if on_chain else -2
                count = draft_candidates(req, s, place, following, children, draft_probs)
                filled = context_of(tokens, parents, node, token_ids[rows[r]], committed, tail)
                context = tail[tail.shape[0] - filled :]
                default_grade = BEYOND_CHAIN
                if without_draft or req.chain_len[s] == 0:
                    default_grade = WITHOUT_DRAFT
                elif on_chain and chain_at + 1 < req.chain_len[s]:
                    default_grade = NOT_IN_TOP_K
                count = pool_candidates(
                    pool, req.scope[s], req.owner[s], context, default_grade, predicted,
                    phrase_at, children, shares, count,
                )  # fmt: skip
                pending = _push(
                    frontier, pending, children, shares, draft_probs, count, node,
                    path_probability, rates[r], min_probability,
                )  # fmt: skip
            if pending == 0:
                break
            best = 0
            for i in range(1, pending):
                if frontier.probability[i] > frontier.probability[best]:
                    best = i
            taken = frontier.columns[best].copy()
            path_probability = frontier.probability[best]
            pending -= 1
            for column in range(NUM_COLUMNS):
                frontier.columns[best, column] = frontier.columns[pending, column]
            frontier.probability[best] = frontier.probability[pending]
            if req.chain_only[s]:
                pending = 0
            parent = taken[PARENT]
            token = np.int64(taken[TOKEN])
            chain_at, node = taken[CHAIN], size
            following = (taken[NEXT], taken[NEXT_GRADE], taken[FOLLOWING])
            phrase_at = (taken[SLOT], taken[PHRASE], taken[PLACE])
            tokens[size], parents[size] = taken[TOKEN], parent
            sources[size] = _PREDICTION if taken[SLOT] == IN_PREDICTION else _SUFFIX
            if taken[GRADE] < NOT_IN_TOP_K:
                sources[size] = _DRAFT
            ranked.kinds[r, size] = kind_of(taken[GRADE], taken[EVIDENCE])
            ranked.probabilities[r, size] = path_probability
            size += 1
        req.size[s] = size
