"""A plain-Python reading of the trees that grow best nodes first."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import CONTEXTS, key_of
from vllm_ouroboros.trees.best_first import TIE_BREAK
from vllm_ouroboros.trees.candidates import BRANCH_PROBABILITIES
from vllm_ouroboros.trees.draft_tree import ROOT, NodeSource
from vllm_ouroboros.trees.node_kinds import (
    BACKOFF_WEIGHTS,
    BASE_SHARE,
    BEYOND_CHAIN,
    MAX_COUNT_WEIGHT,
    NOT_IN_TOP_K,
    NUM_EVIDENCES,
    OWN_WEIGHT,
    PREDICTION,
    PREDICTION_GUESS,
    SHARE_BOUNDS,
    WITHOUT_DRAFT,
    Evidence,
    grade,
)
from vllm_ouroboros.trees.prediction import SURE_RUN
from vllm_ouroboros.trees.request_state import NUM_ALTERNATIVES

GUESSES = (Evidence.WINDOW_GUESS, Evidence.CONTINUES_GUESS)


class Child(NamedTuple):
    """A node that may be taken: what speaks for it, and what leads on from it."""

    token: int
    grade: int
    evidence: int = Evidence.NONE
    rest: tuple[int, ...] = ()  # of the phrase that speaks for it most
    place: int | None = None  # in the chain
    follow: int = -1
    odds: float | None = None  # the draft model's probability
    share: float = BASE_SHARE  # of what was counted
    ahead: tuple[int, int] | None = None  # tokens that came as predicted, place of the next one


def from_draft(world, slot: int, node: Child) -> list[Child]:
    """The draft model's children of a node."""
    state = world.drafting.state
    if node.follow >= 0:
        return [Child(node.follow, grade(BRANCH_PROBABILITIES[0]))]
    if world.alone or node.place is None or node.place + 1 >= state.chain_len[slot]:
        return []
    at = node.place + 1
    sure = float(state.confidence[slot, at])
    found = [Child(int(state.chain[slot, at]), 0, place=at, odds=sure)]
    for k in range(NUM_ALTERNATIVES):
        token, odds = (
            int(state.alternatives[slot, at, k]),
            float(state.alternative_probs[slot, at, k]),
        )
        found.append(Child(token, 0, odds=odds))
    for k in range(state.branches.shape[2] if at < state.branches.shape[1] else 0):
        token, follow = int(state.branches[slot, at, k]), int(state.branch_next[slot, at, k])
        found.append(Child(token, grade(BRANCH_PROBABILITIES[k]), follow=follow))
    return [child for child in found if child.token >= 0]


def from_prediction(world, slot: int, node: Child, grade: int) -> list[Child]:
    """What a request is predicted to say behind a node."""
    state = world.drafting.state
    if node.ahead is None or node.ahead[1] >= state.predicted_len[slot]:
        return []
    run, place = node.ahead
    evidence = PREDICTION if run >= SURE_RUN else PREDICTION_GUESS
    token = int(state.predicted[slot, place])
    return [Child(token, grade, evidence, ahead=(run + 1, place + 1))]


class Phrase(NamedTuple):
    tokens: tuple[int, ...]
    guess: bool
    times: int
    own: bool  # the request wrote it last


def phrases_of(world, slot: int, text: list[int]) -> list[list[Phrase]]:
    """What the pool holds behind the end of a text, by context."""
    pool, scope = world.drafting.pool, int(world.drafting.state.scope[slot])
    tokens, held = np.array(text, np.int32), []
    for context in [i for i, n in enumerate(CONTEXTS) if n <= len(text)]:
        key = key_of(tokens, len(text), context)
        [at] = np.nonzero(pool.arrays.keys == (scope << 32 | key))
        found = pool.lookup(key, scope)
        owner, arrays = int(world.drafting.state.owner[slot]), pool.arrays
        columns = (
            column[at].ravel().tolist() for column in (arrays.sources, arrays.times, arrays.owners)
        )
        rows = zip(found, *columns, strict=False)
        held.append(
            [Phrase(p, source == PhraseSource.WINDOW, n, o == owner) for p, source, n, o in rows]
        )
    return held


def share_of(token: int, held: list[list[Phrase]]) -> float:
    """The share of a token of what was counted, from the shortest context to the longest."""
    share = BASE_SHARE
    for otherwise, phrases in zip(BACKOFF_WEIGHTS, held, strict=False):
        counted, own = Counter(), Counter()
        for phrase in phrases:
            if not phrase.guess and phrase.times:
                counted[phrase.tokens[0]] += phrase.times
                own[phrase.tokens[0]] += OWN_WEIGHT * phrase.own
        total = counted.total()
        weight = min(total, MAX_COUNT_WEIGHT) / total if total else 0
        share = weight * counted[token] + own[token] + otherwise * share
        share /= weight * total + own.total() + otherwise
    return share


def children(world, slot: int, node: Child, text: list[int]) -> list[Child]:
    """All that may stand behind a node, at the end of ``text``."""
    thought = from_draft(world, slot, node)
    unknown = NOT_IN_TOP_K if thought and node.place is not None else BEYOND_CHAIN
    if world.alone or not world.drafting.state.chain_len[slot]:
        unknown = WITHOUT_DRAFT
    on = Evidence.CONTINUES_GUESS if node.evidence in GUESSES else Evidence.CONTINUES_PHRASE
    known = [(on, node.rest)] if node.rest else []
    held = phrases_of(world, slot, text)
    for phrase in (phrase for phrases in held for phrase in phrases):
        said = Evidence.COUNTED if phrase.times else Evidence.CORRECTION
        known.append((Evidence.WINDOW_GUESS if phrase.guess else said, phrase.tokens))
    found: dict[int, Child] = {}
    predicted = from_prediction(world, slot, node, unknown)
    for child in [
        *thought,
        *predicted,
        *(Child(token, unknown, e, (*rest,)) for e, (token, *rest) in known),
    ]:
        there = found.setdefault(child.token, child)
        if child.evidence > there.evidence:
            found[child.token] = there._replace(
                evidence=child.evidence, rest=child.rest, ahead=child.ahead
            )
    for token, child in found.items():
        leads = [p for phrases in reversed(held) for p in phrases if p.times and not p.guess]
        rest = next((p.tokens[1:] for p in leads if p.tokens[0] == token), child.rest)
        rest = child.rest if child.ahead else rest
        share, evidence = share_of(token, held), child.evidence
        if leads and evidence in (Evidence.NONE, Evidence.COUNTED):
            evidence = Evidence.COUNTED + int((share > SHARE_BOUNDS).sum())
        found[token] = child._replace(rest=rest, share=share, evidence=evidence)
    return list(found.values())


def ranked(world, r: int, found: list[Child]) -> list[tuple[float, int, Child]]:
    """Rates and kinds of children: the likeliest first, then by what that leaves for the others."""
    order, left, unsaid = [], [*found], 1.0
    while left:
        graded = []
        for child in left:
            if child.odds is not None:
                child = child._replace(grade=grade(child.odds / max(unsaid, child.odds, 1e-6)))
            kind = child.grade * NUM_EVIDENCES + child.evidence
            graded.append((world.rates[r, kind], kind, child))
        best = max(range(len(left)), key=lambda i: graded[i][0] + TIE_BREAK * graded[i][2].share)
        order.append(graded[best])
        unsaid -= left.pop(best).odds or 0.0
    return order


def reference(world, r: int, like) -> list[tuple]:
    """A tree as `grown` gives it; ``like`` decides between what only rounding tells apart."""
    state, slot = world.drafting.state, int(world.slots[r])
    text = world.token_ids[world.rows[r], : state.committed[slot]].tolist()
    waiting, taken = [], []
    ahead = None
    if state.predicted_len[slot]:
        ahead = int(state.predicted_run[slot]), int(state.predicted_at[slot])
    node, parent, left = Child(-1, 0, place=-1, ahead=ahead), ROOT, 1.0
    while len(taken) < state.node_limit[slot]:
        found = [] if node.token in world.drafting.stops else children(world, slot, node, text)
        for rate, kind, child in ranked(world, r, found):
            probability = left * rate
            left -= probability
            if probability < world.least:
                break
            waiting.append((probability, parent, kind, child, text))
        if not waiting:
            break
        hint = like[len(taken) :][:1]
        nudged = [one[0] * (1 + 1e-9 * ((one[3].token, one[1]) in hint)) for one in waiting]
        left, above, kind, node, text = waiting.pop(int(np.argmax(nudged)))
        waiting = [] if state.chain_only[slot] else waiting
        parent, text = len(taken), [*text, node.token]
        source = NodeSource.PREDICTION if node.ahead else NodeSource.SUFFIX
        source = NodeSource.DRAFT if node.grade < NOT_IN_TOP_K else source
        taken.append((node.token, above, source, kind, left))
    return taken
