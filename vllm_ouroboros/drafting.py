"""Drafting without an engine: which rows a draft forward carries, and what its answers mean.

One call of the proposer runs a few rounds. In each round every request that still drafts carries,
in one masked batch of rows (section 3 of the paper):

* *known* rows: tokens that the draft model's KV cache lacks; the last is the current token;
* *guess* rows: the pool's phrases of the current token, merged into a tree;
* *window* rows: the Jacobi window of lookahead decoding, L levels of W columns. Column 0 starts at
  the current token, so level 0 has W - 1 rows; cell (l, j) continues (l - 1, j), and (0, j)
  continues (0, j - 1). Full, it yields W phrases a round.

Each row has one parent row, so the attention mask of a step is that of a tree. The state of all
requests lives in arrays indexed by slot, and the loops over requests are compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from vllm_ouroboros.phrases import PhrasePool, PhraseSource, find, insert, insert_text, remove
from vllm_ouroboros.tree import ROOT, DraftTree, NodeSource, grow, walk

_DRAFT = int(NodeSource.DRAFT)
_SUFFIX = int(NodeSource.SUFFIX)
_WINDOW = int(PhraseSource.WINDOW)
_VERIFICATION = int(PhraseSource.VERIFICATION)


class Requests(NamedTuple):
    """State of S requests; B is the node budget, β and W the window's levels and columns."""

    scope: np.ndarray  # int64 [S], phrases are shared within a scope
    known: np.ndarray  # int32 [S], committed tokens n
    cached: np.ndarray  # int32 [S], tokens whose draft KV is valid
    capacity: np.ndarray  # int32 [S], positions that have a KV slot
    fed: np.ndarray  # int32 [S], where the history starts that the pool has not seen whole
    limit: np.ndarray  # int32 [S], nodes that this step may draft
    window: np.ndarray  # int32 [S, β, W]
    levels: np.ndarray  # int32 [S], filled levels of the window, 0 before the first round
    chain: np.ndarray  # int32 [S, B]
    chain_len: np.ndarray  # int32 [S]
    done: np.ndarray  # bool [S], the chain is long enough or ends the text
    tokens: np.ndarray  # int32 [S, B], the tree: see DraftTree
    parents: np.ndarray  # int32 [S, B]
    sources: np.ndarray  # int32 [S, B]
    size: np.ndarray  # int32 [S]


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
    num_known: np.ndarray  # int32 [R]
    num_guesses: np.ndarray  # int32 [R]


@njit(cache=True)
def _plan(req, pool, slots, rows, token_ids, max_len, out):
    """Lay out the rows of a round; returns (T, M)."""
    beta, columns = req.window.shape[1], req.window.shape[2]
    total = 0
    wanted = 0
    scratch = np.empty(out.tokens.shape[0], np.int32)
    for r in range(slots.shape[0]):
        s, b = slots[r], rows[r]
        first = total
        out.query_start_loc[r] = first
        out.context_lens[r] = req.cached[s]
        length = req.known[s] + req.chain_len[s]
        known = length - req.cached[s]
        out.num_known[r] = known
        for i in range(known):
            p = req.cached[s] + i
            out.tokens[first + i] = (
                token_ids[b, p] if p < req.known[s] else req.chain[s, p - req.known[s]]
            )
            out.parents[first + i] = i - 1
            out.positions[first + i] = p
            out.writes[first + i] = p if p < req.capacity[s] else -1
        current = known - 1
        g0 = first + known
        slot = find(pool, req.scope[s], out.tokens[first + current])
        guesses = 0
        if slot >= 0:
            budget = pool.tokens.shape[1] * beta
            for g in range(pool.counts[slot]):
                guesses, _ = grow(
                    out.tokens[g0:], out.guesses[g0:], scratch, guesses, budget,
                    ROOT, pool.tokens[slot, g], 0, pool.lengths[slot, g], _SUFFIX,
                )  # fmt: skip
        out.num_guesses[r] = guesses
        for i in range(guesses):
            parent = out.guesses[g0 + i] + known if out.guesses[g0 + i] >= 0 else current
            out.parents[g0 + i] = parent
            out.positions[g0 + i] = out.positions[first + parent] + 1
            out.writes[g0 + i] = -1
        for i in range(guesses + 1):
            out.logits_rows[wanted] = first + current + i
            wanted += 1
        row = g0 + guesses
        if columns > 0:
            if req.levels[s] == 0:
                start = max(0, req.known[s] - columns)
                for j in range(columns):
                    req.window[s, 0, j] = token_ids[b, start + j % (req.known[s] - start)]
                req.levels[s] = 1
            for level in range(req.levels[s]):
                for j in range(columns):
                    if level == 0 and j == 0:
                        continue
                    if level == 0:
                        parent = current if j == 1 else row - first - 1
                    elif level == 1:
                        parent = current if j == 0 else known + guesses + j - 1
                    else:
                        parent = row - first - columns
                    out.tokens[row] = req.window[s, level, j]
                    out.parents[row] = parent
                    out.positions[row] = out.positions[first + parent] + 1
                    out.writes[row] = -1
                    if level == req.levels[s] - 1:
                        out.logits_rows[wanted] = row
                        wanted += 1
                    row += 1
        total = row
    out.query_start_loc[slots.shape[0]] = total
    for i in range(total):
        out.positions[i] = min(out.positions[i], max_len - 1)
    return total, wanted


@njit(cache=True)
def _extend(req, s, token, enough, stops):
    """Append one token to a chain; False when the chain takes no more."""
    if req.done[s]:
        return False
    req.chain[s, req.chain_len[s]] = token
    req.chain_len[s] += 1
    for stop in stops:
        if token == stop:
            req.done[s] = True
    if req.chain_len[s] >= req.limit[s]:
        req.done[s] = True
    return True


@njit(cache=True)
def _absorb(req, pool, slots, out, predicted, draft_tokens, stops, moves):
    """Take the predictions of a round; returns how many KV rows must move.

    ``moves`` [_, 3] receives (index into ``slots``, row, position) of accepted guess rows.
    """
    beta, columns = req.window.shape[1], req.window.shape[2]
    path = np.empty(pool.tokens.shape[1] * beta + 1, np.int32)
    fresh = np.empty(columns, np.int32)
    phrase = np.empty(beta, np.int32)
    moved = 0
    for r in range(slots.shape[0]):
        s = slots[r]
        first = out.query_start_loc[r]
        current = first + out.num_known[r] - 1
        g0 = current + 1
        accepted = walk(
            out.tokens[g0:], out.guesses[g0:], out.num_guesses[r], predicted[current:], path
        )
        length = req.known[s] + req.chain_len[s]
        cached = length
        node = ROOT
        for i in range(accepted):
            if not _extend(req, s, out.tokens[g0 + path[i]], draft_tokens, stops):
                break
            node = path[i]
            if length + i < req.capacity[s]:
                moves[moved, 0] = r
                moves[moved, 1] = g0 + node
                moves[moved, 2] = length + i
                moved += 1
                cached = length + i + 1
        _extend(req, s, predicted[current + 1 + node], draft_tokens, stops)
        req.cached[s] = min(cached, req.capacity[s])
        if req.chain_len[s] >= draft_tokens:
            req.done[s] = True

        levels = req.levels[s]
        if levels == 0:
            continue
        tail = out.query_start_loc[r + 1]
        for j in range(columns):
            if levels == 1 and j == 0:
                fresh[j] = predicted[current]
            else:
                fresh[j] = predicted[tail - columns + j]
        if levels < beta:
            req.window[s, levels] = fresh
            req.levels[s] = levels + 1
            continue
        for j in range(columns):
            for level in range(1, beta):
                phrase[level - 1] = req.window[s, level, j]
            phrase[beta - 1] = fresh[j]
            key = out.tokens[current] if j == 0 else req.window[s, 0, j]
            insert(pool, req.scope[s], key, phrase, 0, beta, _WINDOW)
        for level in range(beta - 1):
            req.window[s, level] = req.window[s, level + 1]
        req.window[s, beta - 1] = fresh
    return moved


@njit(cache=True)
def _build(req, pool, slots, rows, token_ids, draft_tokens, num_suffixes, stops):
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
def _learn(pool, scope, root, tokens, parents, sources, size, predicted):
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


class Drafting:
    """Drafts of up to ``max_requests`` requests, and the pool that feeds them.

    Sizes are those of `OuroborosConfig`; ``budget`` is the node budget of a tree, ``max_len`` the
    positions that the draft model knows, ``stops`` the ids after which no draft goes on.
    """

    def __init__(
        self,
        pool: PhrasePool,
        *,
        max_requests: int,
        budget: int,
        draft_tokens: int,
        num_suffixes: int,
        window_size: int,
        max_len: int,
        stops: tuple[int, ...] = (),
    ) -> None:
        size, beta = max_requests, pool.arrays.tokens.shape[2]
        guesses = pool.arrays.tokens.shape[1] * beta
        self.pool, self.max_len = pool, max_len
        self.budget, self.draft_tokens, self.num_suffixes = budget, draft_tokens, num_suffixes
        self.stops = np.asarray(stops, np.int32)
        self.rows_per_request = guesses + window_size * beta
        """Guess and window rows of a request in a round, at most."""
        self.state = Requests(
            scope=np.zeros(size, np.int64),
            known=np.zeros(size, np.int32),
            cached=np.zeros(size, np.int32),
            capacity=np.zeros(size, np.int32),
            fed=np.zeros(size, np.int32),
            limit=np.zeros(size, np.int32),
            window=np.zeros((size, beta, window_size), np.int32),
            levels=np.zeros(size, np.int32),
            chain=np.zeros((size, budget), np.int32),
            chain_len=np.zeros(size, np.int32),
            done=np.zeros(size, np.bool_),
            tokens=np.zeros((size, budget), np.int32),
            parents=np.zeros((size, budget), np.int32),
            sources=np.zeros((size, budget), np.int32),
            size=np.zeros(size, np.int32),
        )
        self._free = list(range(size - 1, -1, -1))
        self._next_scope = 0

    @property
    def bytes(self) -> int:
        """Bytes of all request state; fixed for the life of the engine."""
        return sum(array.nbytes for array in self.state)

    def add(self, private: bool = False) -> int:
        """A slot for a new request; ``private`` gives it a scope of its own."""
        slot = self._free.pop()
        state = self.state
        for array in (state.known, state.fed, state.levels, state.scope):
            array[slot] = 0
        self.reset(slot, 0)
        if private:
            self._next_scope = self._next_scope % (2**31 - 2) + 1
            state.scope[slot] = self._next_scope
        return slot

    def reset(self, slot: int, cached: int) -> None:
        """Forget a draft; ``cached`` tokens of the request have draft KV in its blocks."""
        self.state.cached[slot] = cached
        self.state.chain_len[slot] = 0
        self.state.size[slot] = 0

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def commit(self, slot: int, text, length: int, source: PhraseSource) -> None:
        """Feed the pool what was committed since the last call; ``text[:length]`` is all of it."""
        fed = self.state.fed
        fed[slot] = insert_text(
            self.pool.arrays, self.state.scope[slot], text, fed[slot], length, int(source)
        )

    def start(self, slot: int, known: int, limit: int, capacity: int) -> None:
        """Begin a draft of at most ``limit`` nodes after ``known`` committed tokens."""
        state = self.state
        state.known[slot] = known
        state.cached[slot] = min(state.cached[slot], known - 1)
        state.limit[slot] = min(limit, self.budget)
        state.capacity[slot] = capacity
        state.chain_len[slot] = 0
        state.done[slot] = state.limit[slot] <= 0

    def plan(self, slots, rows, token_ids) -> tuple[Round, int, int]:
        """Rows of the next round.

        Args:
            slots: int64 [R], requests that still draft.
            rows: int64 [R], their rows in ``token_ids``.
            token_ids: int32 [*, max_model_len], committed tokens.

        Returns:
            The round (its arrays may be longer than needed), the number of rows T, and the
            number M of rows whose prediction is needed.
        """
        known = self.state.known[slots] + self.state.chain_len[slots] - self.state.cached[slots]
        size = int(known.sum()) + len(slots) * self.rows_per_request
        out = Round(
            tokens=np.empty(size, np.int32),
            parents=np.empty(size, np.int32),
            positions=np.empty(size, np.int64),
            writes=np.empty(size, np.int64),
            guesses=np.empty(size, np.int32),
            logits_rows=np.empty(size, np.int64),
            query_start_loc=np.empty(len(slots) + 1, np.int32),
            context_lens=np.empty(len(slots), np.int32),
            num_known=np.empty(len(slots), np.int32),
            num_guesses=np.empty(len(slots), np.int32),
        )
        total, wanted = _plan(
            self.state, self.pool.arrays, slots, rows, token_ids, self.max_len, out
        )
        return out, total, wanted

    def absorb(self, slots, out: Round, predicted) -> np.ndarray:
        """Extend the chains by the predictions int32 [T] of a round.

        Returns:
            int64 [*, 3]: (index into ``slots``, row, position) of each accepted guess row, whose
            KV must go to the slot of that position.
        """
        moves = np.empty((len(slots) * self.rows_per_request, 3), np.int64)
        moved = _absorb(
            self.state, self.pool.arrays, slots, out, predicted,
            self.draft_tokens, self.stops, moves,
        )  # fmt: skip
        return moves[:moved]

    def build(self, slots, rows, token_ids) -> None:
        """Make the trees of ``slots`` from their chains and the pool."""
        _build(
            self.state, self.pool.arrays, slots, rows, token_ids,
            self.draft_tokens, self.num_suffixes, self.stops,
        )  # fmt: skip

    def tree(self, slot: int) -> DraftTree:
        """A copy of the tree of a request."""
        size = self.state.size[slot]
        return DraftTree(
            self.state.tokens[slot, :size].copy(),
            self.state.parents[slot, :size].copy(),
            self.state.sources[slot, :size].copy(),
        )

    def learn(self, slot: int, root: int, tree: DraftTree, predicted) -> None:
        """Turn a verified tree into phrases; ``predicted`` int32 [n + 1], the target per row."""
        _learn(
            self.pool.arrays, self.state.scope[slot], root,
            tree.tokens, tree.parents, tree.sources, len(tree.tokens), predicted,
        )  # fmt: skip

    def settle(self, slot: int, emitted: list[int]) -> None:
        """After verification: keep the draft KV of those chain tokens that were committed."""
        state = self.state
        agreed = 0
        for token in state.chain[slot, : state.chain_len[slot]].tolist():
            if agreed == len(emitted) or emitted[agreed] != token:
                break
            agreed += 1
        if state.chain_len[slot]:
            state.cached[slot] = min(state.cached[slot], state.known[slot] + agreed)
            state.chain_len[slot] = 0
