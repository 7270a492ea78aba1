"""From chains and phrases to trees, and from verified trees back to phrases (compiled)."""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_ouroboros.phrases import PhraseSource, find, insert, remove
from vllm_ouroboros.tree import ROOT, NodeSource, grow

_DRAFT = int(NodeSource.DRAFT)
_SUFFIX = int(NodeSource.SUFFIX)
_WINDOW = int(PhraseSource.WINDOW)
_VERIFICATION = int(PhraseSource.VERIFICATION)


@njit(cache=True)
def build_trees(req, pool, slots, rows, token_ids, draft_tokens, num_suffixes, stops):
    """Fill the trees: the chain, up to K suffixes at its end, phrases at the root with the rest.

    Phrases that stood in text or that the target confirmed come before guesses of the window, at
    either place.

    A request without a drafted chain gets one from the pool: the best phrase, then the best
    phrase of its last token, and so on.
    """
    for r in range(slots.shape[0]):
        s = slots[r]
        tokens, parents, sources = req.tokens[s], req.parents[s], req.sources[s]
        limit, scope = req.limit[s], req.scope[s]
        root = token_ids[rows[r], req.known[s] - 1]
        size, end = grow(
            tokens, parents, sources, 0, limit, ROOT, req.chain[s], 0, req.chain_len[s], _DRAFT
        )
        while req.chain_len[s] == 0 and size < min(limit, draft_tokens):
            slot = find(pool, scope, tokens[end] if end >= 0 else root)
            if slot < 0 or pool.counts[slot] == 0:
                break
            before = size
            size, end = grow(
                tokens, parents, sources, size, limit,
                end, pool.tokens[slot, 0], 0, pool.lengths[slot, 0], _SUFFIX,
            )  # fmt: skip
            if size == before:
                break
        last = tokens[end] if end >= 0 else root
        ended = False
        for stop in stops:
            ended = ended or last == stop
        for guessed in (False, True):
            for at, key in ((end, last), (ROOT, root)):
                slot = find(pool, scope, key)
                if num_suffixes == 0 or slot < 0 or (at == end and ended):
                    continue
                count = pool.counts[slot]
                if at == end:
                    count = min(count, num_suffixes)
                for g in range(count):
                    if (pool.sources[slot, g] == _WINDOW) == guessed:
                        size, _ = grow(
                            tokens, parents, sources, size, limit,
                            at, pool.tokens[slot, g], 0, pool.lengths[slot, g], _SUFFIX,
                        )  # fmt: skip
        req.size[s] = size


@njit(cache=True)
def learn(pool, scope, root, tokens, parents, sources, size, predicted):
    """Turn a verified tree into phrases; ``predicted`` [size + 1] is the target's token per row.

    Along the draft: the target's continuation of a node, as far as the draft agrees with it.
    Along the pool's phrases: the phrase as the target corrects it replaces the one that was tried.
    """
    beta = pool.tokens.shape[2]
    phrase = np.empty(beta, np.int32)
    old = np.empty(beta, np.int32)
    has_child = np.zeros(size + 1, np.bool_)
    for node in range(size):
        has_child[parents[node] + 1] = True
    for node in range(size):
        if sources[node] == _DRAFT:
            length = 0
            at = node
            while length < beta:
                phrase[length] = predicted[at + 1]
                length += 1
                child = at + 1
                if child < size and parents[child] == at and tokens[child] == phrase[length - 1]:
                    at = child
                else:
                    break
            if length > 1:
                insert(pool, scope, tokens[node], phrase, 0, length, _VERIFICATION)
        elif not has_child[node + 1]:
            length = 0
            at = node
            while at >= 0 and sources[at] == _SUFFIX and length < beta:
                length += 1
                at = parents[at]
            key = tokens[at] if at >= 0 else root
            phrase[0] = predicted[at + 1]
            same = True
            at = node
            for i in range(length - 1, -1, -1):
                old[i] = tokens[at]
                if i + 1 < length:
                    phrase[i + 1] = predicted[at + 1]
                at = parents[at]
            for i in range(length):
                same = same and old[i] == phrase[i]
            if not same:
                remove(pool, scope, key, old, 0, length)
            insert(pool, scope, key, phrase, 0, length, _VERIFICATION)
