"""Phrase lengthening: fixed trees of a chain, its suffixes and phrases at the root (compiled)."""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.compiling import compiled, compiled_inner
from vllm_ouroboros.phrases.eviction import find
from vllm_ouroboros.trees.draft_tree import ROOT, NodeSource, grow
from vllm_ouroboros.trees.prediction import SURE_RUN, follow

_DRAFT = int(NodeSource.DRAFT)
_SUFFIX = int(NodeSource.SUFFIX)
_PREDICTION = int(NodeSource.PREDICTION)
_WINDOW = int(PhraseSource.WINDOW)


@compiled_inner
def _is_stop(token, stops):
    found = False
    for stop in stops:
        found = found or token == stop
    return found


@compiled_inner
def _phrase_end(pool, slot, g, stops):
    """Length of a phrase up to the token that ends the text, that one included."""
    for i in range(pool.lengths[slot, g]):
        if _is_stop(pool.tokens[slot, g, i], stops):
            return i + 1
    return pool.lengths[slot, g]


@compiled_inner
def _predicted_end(req, s, draft_tokens, stops):
    """Where a path along the prediction ends: with the text, or as long as a chain where the text
    has hardly followed it yet.
    """
    last = req.predicted_len[s]
    if req.predicted_run[s] < SURE_RUN:
        last = min(last, req.predicted_at[s] + draft_tokens)
    for i in range(req.predicted_at[s], last):
        if _is_stop(req.predicted[s, i], stops):
            return i + 1
    return last


@compiled_inner
def _predict(req, s, size, limit, draft_tokens, stops):
    """Grow a tree of ``size`` nodes along the prediction; its new size, and the last node of it."""
    at = req.predicted_at[s]
    length = max(0, _predicted_end(req, s, draft_tokens, stops) - at)
    return grow(
        req.tokens[s], req.parents[s], req.sources[s], size, limit,
        ROOT, req.predicted[s], at, length, _PREDICTION,
    )  # fmt: skip


@compiled
def build_trees(req, pool, slots, rows, token_ids, draft_tokens, num_suffixes, stops):
    """Fill the trees: the chain with its branches, up to K suffixes at its end, phrases at the root
    with the rest. A request that is `chain_only` gets a chain: its own with the best suffix.

    Phrases that stood in text or that the target confirmed come before guesses of the window, at
    either place.

    A request without a drafted chain gets one from its prediction, or from the pool: the best
    phrase, then the best phrase of its last token, and so on. Beside a drafted chain the prediction
    is a branch at the root; where the text has followed it for a while, it comes first, and the
    chain takes what is left.
    """
    branch = np.empty(2, np.int32)
    for r in range(slots.shape[0]):
        s = slots[r]
        tokens, parents, sources = req.tokens[s], req.parents[s], req.sources[s]
        limit, scope = req.node_limit[s], req.scope[s]
        root = token_ids[rows[r], req.committed[s] - 1]
        size, end, predicted, sure = 0, ROOT, req.predicted_len[s] > 0, False
        if predicted:
            follow(req, s, token_ids[rows[r]], req.committed[s])
            sure = req.predicted_run[s] >= SURE_RUN and req.predicted_at[s] < req.predicted_len[s]
        if sure:
            size, end = _predict(req, s, size, limit, draft_tokens, stops)
        chained = req.chain_len[s] > 0 and not (sure and req.chain_only[s])
        if chained:
            size, end = grow(
                tokens, parents, sources, size, limit,
                ROOT, req.chain[s], 0, req.chain_len[s], _DRAFT,
            )  # fmt: skip
        if not sure:
            for place in range(min(size, req.branches.shape[1] - 1) + 1):
                for rank in range(req.branches.shape[2]):
                    if req.branches[s, place, rank] >= 0:
                        branch[0] = req.branches[s, place, rank]
                        branch[1] = req.branch_next[s, place, rank]
                        length = 1 if branch[1] < 0 or _is_stop(branch[0], stops) else 2
                        size, _ = grow(
                            tokens, parents, sources, size, limit,
                            place - 1, branch, 0, length, _DRAFT,
                        )  # fmt: skip
        if predicted and not sure and not (chained and req.chain_only[s]):
            size, last_predicted = _predict(req, s, size, limit, draft_tokens, stops)
            if not chained:
                end = last_predicted
        while not chained and size < min(limit, draft_tokens):
            last = tokens[end] if end >= 0 else root
            slot = find(pool, scope, last)
            if slot < 0 or pool.counts[slot] == 0 or (end >= 0 and _is_stop(last, stops)):
                break
            before = size
            size, end = grow(
                tokens, parents, sources, size, limit,
                end, pool.tokens[slot, 0], 0, _phrase_end(pool, slot, 0, stops), _SUFFIX,
            )  # fmt: skip
            if size == before:
                break
        last = tokens[end] if end >= 0 else root
        ended = end >= 0 and _is_stop(last, stops)
        for guessed in (False, True):
            for at, key in ((end, last), (ROOT, root)):
                slot = find(pool, scope, key)
                if num_suffixes == 0 or slot < 0 or (at == end and ended):
                    continue
                count = pool.counts[slot]
                if req.chain_only[s]:
                    count = min(count, 1) if at == end == size - 1 else 0
                elif at == end:
                    count = min(count, num_suffixes)
                for g in range(count):
                    if (pool.sources[slot, g] == _WINDOW) == guessed:
                        size, _ = grow(
                            tokens, parents, sources, size, limit,
                            at, pool.tokens[slot, g], 0, _phrase_end(pool, slot, g, stops), _SUFFIX,
                        )  # fmt: skip
        req.size[s] = size
