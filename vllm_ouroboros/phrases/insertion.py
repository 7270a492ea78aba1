"""Putting phrases into a pool (compiled)."""

from __future__ import annotations

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.compiling import compiled
from vllm_ouroboros.phrases.contexts import CONTEXTS, key_of
from vllm_ouroboros.phrases.eviction import claim

MAX_TIMES = 255
"""Times that a phrase is counted up to; then those of its key count half."""
_WINDOW = int(PhraseSource.WINDOW)


@compiled
def insert(pool, scope, token, phrase, start, length, source, times, owner):
    """Put ``phrase[start:start+length]``, seen so many ``times``, among the phrases of ``token``.

    It becomes the first, and that of request ``owner``; a guess of the window only the first of the
    guesses. A phrase that repeats, extends or is the beginning of one already there takes its
    place, and its times come on top: the longer of the two is kept, and a guess never moves a
    phrase that is none. A new phrase pushes out the last one when the slot is full, unless it is a
    guess and the slot holds none.
    """
    length = min(length, pool.tokens.shape[2])
    if length <= 0:
        return
    slot = claim(pool, scope, token)
    count = pool.counts[slot]
    place = -1
    for g in range(count):
        shared = min(length, pool.lengths[slot, g])
        same = True
        for i in range(shared):
            if pool.tokens[slot, g, i] != phrase[start + i]:
                same = False
                break
        if same:
            place = g
            break
    target = 0
    if source == _WINDOW:
        while target < count and pool.sources[slot, target] != _WINDOW:
            target += 1
        if (place >= 0 and place < target) or target == pool.tokens.shape[1]:
            return
    kept = length
    seen = times
    if place < 0:
        if count < pool.tokens.shape[1]:
            pool.counts[slot] = count + 1
        place = pool.counts[slot] - 1
    else:
        kept = max(length, pool.lengths[slot, place])
        seen += pool.times[slot, place]
    # element by element, which compiles to far less than slices do; column by column, so that one
    # token is all there is to save
    for i in range(pool.tokens.shape[2]):
        token_i = phrase[start + i] if i < length else pool.tokens[slot, place, i]
        for g in range(place, target, -1):
            pool.tokens[slot, g, i] = pool.tokens[slot, g - 1, i]
        pool.tokens[slot, target, i] = token_i
    for g in range(place, target, -1):
        pool.lengths[slot, g] = pool.lengths[slot, g - 1]
        pool.sources[slot, g] = pool.sources[slot, g - 1]
        pool.times[slot, g] = pool.times[slot, g - 1]
        pool.owners[slot, g] = pool.owners[slot, g - 1]
    pool.lengths[slot, target] = kept
    pool.sources[slot, target] = source
    if seen > MAX_TIMES:
        for g in range(pool.counts[slot]):
            pool.times[slot, g] //= 2
        seen //= 2
    pool.times[slot, target] = seen
    pool.owners[slot, target] = owner
    pool.inserted[source] += 1


@compiled
def insert_text(pool, scope, text, fed, end, source, owner, contexts=1):
    """Feed ``text[:end]``, whose first ``fed`` tokens were fed before.

    Each token becomes a key of what follows it, and so do the tokens before it, for the first
    ``contexts`` of `CONTEXTS`. Phrases that the end of the text cut short last time grow to β
    tokens.
    """
    beta = pool.tokens.shape[2]
    for i in range(max(0, fed - beta), end - 1):
        length = min(beta, end - 1 - i)
        for context in range(contexts):
            if i + 1 >= CONTEXTS[context]:
                key = key_of(text, i + 1, context)
                times = np.int64(i + 1 >= fed)  # of one type wherever `insert` is called
                insert(pool, scope, key, text, i + 1, length, source, times, owner)


@compiled
def insert_texts(pool, scopes, owners, learns, fed, slots, texts, rows, ends, source, contexts):
    """`insert_text` for some requests: up to ``ends`` int64 [R] tokens of their rows of ``texts``.

    ``scopes``, ``owners``, ``learns`` and ``fed`` are by slot; ``fed`` is written.
    """
    for r in range(slots.shape[0]):
        slot = slots[r]
        if learns[slot]:
            insert_text(
                pool, scopes[slot], texts[rows[r]], fed[slot], ends[r], source, owners[slot],
                contexts,
            )  # fmt: skip
        fed[slot] = ends[r]
