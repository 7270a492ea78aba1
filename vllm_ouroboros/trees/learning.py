"""Phrases from verification: what a verified tree teaches the pool (compiled)."""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.compiling import compiled, compiled_inner
from vllm_ouroboros.phrases.eviction import find
from vllm_ouroboros.phrases.insertion import insert
from vllm_ouroboros.trees.draft_tree import NodeSource, child_of

_DRAFT = int(NodeSource.DRAFT)
_SUFFIX = int(NodeSource.SUFFIX)

_VERIFICATION = int(PhraseSource.VERIFICATION)


@compiled
def learn_all(
    pool, scopes, owners, learns, slots, roots, sizes, tokens, parents, sources, predicted
):
    """`learn` for the trees of a batch, one behind the other; of requests that do.

    Args:
        pool: see `PoolArrays`.
        scopes: int64 [slots], by slot; owners likewise.
        owners: int32 [slots].
        learns: bool [slots].
        slots: int64 [R].
        roots: int64 [R].
        sizes: int64 [R], nodes of each tree.
        tokens: int32 [sum of sizes]; parents and sources likewise.
        parents: int32 [sum of sizes].
        sources: int32 [sum of sizes].
        predicted: int64 [sum of sizes + R].
    """
    first = 0
    for r in range(slots.shape[0]):
        end = first + sizes[r]
        slot = slots[r]
        if learns[slot]:
            learn(
                pool, scopes[slot], owners[slot], roots[r], tokens[first:end], parents[first:end],
                sources[first:end], sizes[r], predicted[first + r : end + r + 1],
            )  # fmt: skip
        first = end


@compiled_inner
def learn(pool, scope, owner, root, tokens, parents, sources, size, predicted):
    """Turn a verified tree into phrases.

    Args:
        pool: see `PoolArrays`.
        scope: of the request.
        owner: number of the request; see `PoolArrays.owners`.
        root: the last committed token.
        tokens: int32 [n], the tree's; parents and sources likewise.
        parents: int32 [n].
        sources: int32 [n], `NodeSource`.
        size: n.
        predicted: int [n + 1], the target's token after the root and after each node.

    Along the draft: the target's continuation of a node, as far as the draft agrees with it.
    Below a node that phrases of the pool were tried at: the phrase as the target corrects it, or
    confirms it, becomes the first. One that was wrong here stays behind until it is pushed out: it
    may be right elsewhere (dropping it costs 2 % of the tokens a step on code).
    """
    beta = pool.tokens.shape[2]
    phrase = np.empty(beta, np.int32)
    tried = np.zeros(size + 1, np.bool_)  # rows below which a phrase of the pool was tried
    for node in range(size):
        if sources[node] == _SUFFIX:
            tried[parents[node] + 1] = True
    for node in range(size):
        if sources[node] == _DRAFT:
            length = 0
            at = node
            while length < beta:
                phrase[length] = predicted[at + 1]
                length += 1
                at = child_of(tokens, parents, size, at, phrase[length - 1])
                if at < 0:
                    break
            if length > 1:
                insert(pool, scope, tokens[node], phrase, 0, length, _VERIFICATION, 1, owner)
    for node in range(-1, size):
        if tried[node + 1]:
            key = tokens[node] if node >= 0 else root
            _correct(pool, scope, owner, key, node, tokens, parents, size, predicted)


@compiled_inner
def _correct(pool, scope, owner, key, start, tokens, parents, size, predicted):
    """Compare the phrases of ``key`` that the tree holds below ``start`` with the target."""
    slot = find(pool, scope, key)
    if slot < 0:
        return
    count = pool.counts[slot]
    phrases, lengths = pool.tokens[slot, :count].copy(), pool.lengths[slot, :count].copy()
    corrected = np.empty(pool.tokens.shape[2], np.int32)
    for g in range(count - 1, -1, -1):  # backwards: each becomes the first, the best at last
        node = start
        held = 0
        for i in range(lengths[g]):
            child = child_of(tokens, parents, size, node, phrases[g, i])
            if child < 0:
                break
            corrected[i] = predicted[node + 1]
            held += 1
            node = child
        insert(pool, scope, key, corrected, 0, held, _VERIFICATION, 0, owner)
