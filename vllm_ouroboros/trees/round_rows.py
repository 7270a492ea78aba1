"""The rows of a draft forward, and what its predictions mean (compiled).

In each round every request that still drafts carries, in one masked batch of rows (section 3 of
the paper):

* *uncached* rows: tokens that the draft model's KV cache lacks; the last is the current token;
* *guess* rows: the pool's phrases of the current token, merged into a tree;
* *window* rows: the Jacobi window of lookahead decoding, L levels of W columns. Column 0 starts at
  the current token, so level 0 has W - 1 rows; cell (l, j) continues (l - 1, j), and (0, j)
  continues (0, j - 1). Full, it yields W phrases a round.

Each row has one parent row, so the attention mask of a step is that of a tree. The state of all
requests lives in arrays indexed by slot.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.compiling import compiled, compiled_inner
from vllm_ouroboros.phrases.eviction import find
from vllm_ouroboros.phrases.insertion import insert
from vllm_ouroboros.trees.draft_tree import ROOT, NodeSource, grow, walk

_SUFFIX = int(NodeSource.SUFFIX)
_WINDOW = int(PhraseSource.WINDOW)


class Round(NamedTuple):
    """Rows of one draft forward: T rows of R requests."""

    tokens: np.ndarray  # int32 [T]
    parents: np.ndarray  # int32 [T], parent row within the request, -1 for the first
    positions: np.ndarray  # int64 [T]
    writes: np.ndarray  # int64 [T], position whose KV slot the row fills, or -1
    guesses: np.ndarray  # int32 [T], parent of a guess row among the guess rows
    logits_rows: np.ndarray  # int64 [T], rows whose prediction is needed (first M are valid)
    query_start_loc: np.ndarray  # int32 [R + 1]
    context_lens: np.ndarray  # int32 [R], tokens in the KV cache before the step
    num_uncached: np.ndarray  # int32 [R]
    num_guesses: np.ndarray  # int32 [R]
    columns: int  # of the window: W or 0
    phrases: int  # of the pool that a request guesses with, at most

    @classmethod
    def empty(cls, rows: int, requests: int, columns: int = 0, phrases: int = 0) -> Round:
        """Room for the rows of a round."""
        return cls(
            tokens=np.empty(rows, np.int32),
            parents=np.empty(rows, np.int32),
            positions=np.empty(rows, np.int64),
            writes=np.empty(rows, np.int64),
            guesses=np.empty(rows, np.int32),
            logits_rows=np.empty(rows, np.int64),
            query_start_loc=np.empty(requests + 1, np.int32),
            context_lens=np.empty(requests, np.int32),
            num_uncached=np.empty(requests, np.int32),
            num_guesses=np.empty(requests, np.int32),
            columns=columns,
            phrases=phrases,
        )


@compiled
def plan_round(req, pool, slots, rows, token_ids, max_len, out):
    """Lay out the rows of a round in ``out``; returns T and M, see `Round`."""
    beta, columns = req.window.shape[1], out.columns
    total = 0
    wanted = 0
    scratch = np.empty(out.tokens.shape[0], np.int32)
    for r in range(slots.shape[0]):
        s, b = slots[r], rows[r]
        first = total
        out.query_start_loc[r] = first
        out.context_lens[r] = req.cached[s]
        length = req.committed[s] + req.chain_len[s]
        uncached = length - req.cached[s]
        out.num_uncached[r] = uncached
        for i in range(uncached):
            p = req.cached[s] + i
            out.tokens[first + i] = (
                token_ids[b, p] if p < req.committed[s] else req.chain[s, p - req.committed[s]]
            )
            out.parents[first + i] = i - 1
            out.positions[first + i] = p
            out.writes[first + i] = p if p < req.kv_capacity[s] else -1
        current = uncached - 1
        g0 = first + uncached
        slot = find(pool, req.scope[s], out.tokens[first + current])
        guesses = 0
        if slot >= 0:
            budget = pool.tokens.shape[1] * beta
            for g in range(min(out.phrases, pool.counts[slot])):
                guesses, _ = grow(
                    out.tokens[g0:], out.guesses[g0:], scratch, guesses, budget,
                    ROOT, pool.tokens[slot, g], 0, pool.lengths[slot, g], _SUFFIX,
                )  # fmt: skip
        out.num_guesses[r] = guesses
        for i in range(guesses):
            parent = out.guesses[g0 + i] + uncached if out.guesses[g0 + i] >= 0 else current
            out.parents[g0 + i] = parent
            out.positions[g0 + i] = out.positions[first + parent] + 1
            out.writes[g0 + i] = -1
        for i in range(guesses + 1):
            out.logits_rows[wanted] = first + current + i
            wanted += 1
        row = g0 + guesses
        if columns > 0:
            if req.window_levels[s] == 0:
                start = max(0, req.committed[s] - columns)
                for j in range(columns):
                    req.window[s, 0, j] = token_ids[b, start + j % (req.committed[s] - start)]
                req.window_levels[s] = 1
            for level in range(req.window_levels[s]):
                for j in range(columns):
                    if level == 0 and j == 0:
                        continue
                    if level == 0:
                        parent = current if j == 1 else row - first - 1
                    elif level == 1:
                        parent = current if j == 0 else uncached + guesses + j - 1
                    else:
                        parent = row - first - columns
                    out.tokens[row] = req.window[s, level, j]
                    out.parents[row] = parent
                    out.positions[row] = out.positions[first + parent] + 1
                    out.writes[row] = -1
                    if level == req.window_levels[s] - 1:
                        out.logits_rows[wanted] = row
                        wanted += 1
                    row += 1
        total = row
    out.query_start_loc[slots.shape[0]] = total
    for i in range(total):
        out.positions[i] = min(out.positions[i], max_len - 1)
    return total, wanted


@compiled
def plan_branches(req, slots, out, which):
    """Lay out chains and their branches, to ask for the token after each branch; returns (T, M).

    ``which`` int32 [M, 3] gets the request, place and rank of each row that is asked for. The
    context is the committed text: a branch must not see the chain beyond its place.
    """
    row = 0
    wanted = 0
    for r in range(slots.shape[0]):
        s = slots[r]
        first = row
        out.query_start_loc[r] = first
        out.context_lens[r] = req.committed[s]
        depth = min(req.chain_len[s], req.branches.shape[1] - 1)
        for i in range(depth):
            out.tokens[row] = req.chain[s, i]
            out.parents[row] = i - 1
            out.positions[row] = req.committed[s] + i
            row += 1
        for place in range(depth + 1):
            for rank in range(req.branches.shape[2]):
                if req.branches[s, place, rank] < 0:
                    continue
                out.tokens[row] = req.branches[s, place, rank]
                out.parents[row] = place - 1
                out.positions[row] = req.committed[s] + place
                out.logits_rows[wanted] = row
                which[wanted, 0] = r
                which[wanted, 1] = place
                which[wanted, 2] = rank
                wanted += 1
                row += 1
    out.query_start_loc[slots.shape[0]] = row
    return row, wanted


@compiled_inner
def _extend(req, s, token, row, stops):
    """Append one token to a chain; False when the chain takes no more."""
    if req.done[s]:
        return False
    req.chain[s, req.chain_len[s]] = token
    req.predicted_row[s, req.chain_len[s]] = row
    req.chain_len[s] += 1
    for stop in stops:
        if token == stop:
            req.done[s] = True
    if req.chain_len[s] >= req.node_limit[s]:
        req.done[s] = True
    return True


@compiled
def absorb_round(req, pool, slots, out, predicted, draft_tokens, stops):
    """Extend the chains by the predictions of a round, and take phrases from the window.

    Tokens of accepted guess rows get their KV as uncached rows of the next forward: a row more
    there is cheaper than moving entries layer by layer.
    """
    beta, columns = req.window.shape[1], out.columns
    path = np.empty(pool.tokens.shape[1] * beta + 1, np.int32)
    fresh = np.empty(columns, np.int32)
    phrase = np.empty(beta, np.int32)
    for r in range(slots.shape[0]):
        s = slots[r]
        first = out.query_start_loc[r]
        current = first + out.num_uncached[r] - 1
        g0 = current + 1
        accepted = walk(
            out.tokens[g0:], out.guesses[g0:], out.num_guesses[r], predicted[current:], path
        )
        req.cached[s] = min(req.committed[s] + req.chain_len[s], req.kv_capacity[s])
        node = ROOT
        for i in range(accepted):
            if not _extend(req, s, out.tokens[g0 + path[i]], current + 1 + node, stops):
                break
            node = path[i]
        _extend(req, s, predicted[current + 1 + node], current + 1 + node, stops)
        if req.chain_len[s] >= draft_tokens:
            req.done[s] = True

        levels = req.window_levels[s]
        if levels == 0 or columns == 0:
            continue
        tail = out.query_start_loc[r + 1]
        for j in range(columns):
            if levels == 1 and j == 0:
                fresh[j] = predicted[current]
            else:
                fresh[j] = predicted[tail - columns + j]
        if levels < beta:
            for j in range(columns):
                req.window[s, levels, j] = fresh[j]
            req.window_levels[s] = levels + 1
            continue
        for j in range(columns if req.learns[s] else 0):
            for level in range(1, beta):
                phrase[level - 1] = req.window[s, level, j]
            phrase[beta - 1] = fresh[j]
            key = out.tokens[current] if j == 0 else req.window[s, 0, j]
            insert(pool, req.scope[s], key, phrase, 0, beta, _WINDOW, 0, req.owner[s])
        for j in range(columns):  # element by element, see `insert`
            for level in range(beta - 1):
                req.window[s, level, j] = req.window[s, level + 1, j]
            req.window[s, beta - 1, j] = fresh[j]
