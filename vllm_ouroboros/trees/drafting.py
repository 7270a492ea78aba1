"""Drafting without an engine: the drafts of all requests, and the pool that feeds them.

One call of the proposer runs a few rounds (`round_rows`) that grow a chain for each request, makes
trees of the chains (`lengthening`), and after verification learns from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource, PoolFault
from vllm_ouroboros.phrases.insertion import insert_texts
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.best_first import Ranked, grow_best
from vllm_ouroboros.trees.draft_tree import DraftTree, are_trees
from vllm_ouroboros.trees.learning import learn_all
from vllm_ouroboros.trees.lengthening import build_trees
from vllm_ouroboros.trees.request_state import BRANCHES, RequestState
from vllm_ouroboros.trees.round_rows import Round, absorb_round, plan_branches, plan_round

FEW_PHRASES = 4
"""Phrases of a round that carries few."""


class RoundWidth(IntEnum):
    """What a round of drafting carries beside the chain."""

    CHAIN = 0
    PHRASES = 1  # the first few of the pool
    FULL = 2  # all, and the Jacobi window


class Drafting:
    """Drafts of up to ``max_requests`` requests, and the pool that feeds them.

    Sizes are those of `OuroborosConfig`; ``budget`` is the node budget of a tree, ``max_len`` the
    positions that the draft model knows, ``stops`` the ids after which no draft goes on, tokens are
    below ``vocab_size``; with
    ``contexts`` above 1 keys of the pool are also several tokens in a row (`CONTEXTS`);
    ``keeps_chain_kv`` is false where a chain's draft KV is worth less than that of the same text.
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
        vocab_size: int = 2**31 - 1,
        contexts: int = 1,
        keeps_chain_kv: bool = True,
    ) -> None:
        size, beta = max_requests, pool.arrays.tokens.shape[2]
        self.pool, self.max_len, self.contexts = pool, max_len, contexts
        self.vocab_size, self.keeps_chain_kv = vocab_size, keeps_chain_kv
        self.budget, self.draft_tokens, self.num_suffixes = budget, draft_tokens, num_suffixes
        self.stops = np.asarray(stops, np.int32)
        self.state = RequestState.empty(size, budget, beta, window_size)
        self._free = list(range(size - 1, -1, -1))
        self._admitted = 0
        self._faults = 0  # of the pool, that were told

    def carried(self, width: RoundWidth) -> tuple[int, int]:
        """Columns of the window and phrases of the pool that a round carries for a request."""
        columns, phrases = self.state.window.shape[2], self.pool.arrays.tokens.shape[1]
        if width == RoundWidth.FULL:
            return columns, phrases
        return 0, min(FEW_PHRASES, phrases) if width == RoundWidth.PHRASES else 0

    def rows_of(self, width: RoundWidth) -> int:
        """Rows of a request in a round beside its chain, at most."""
        return sum(self.carried(width)) * self.state.window.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of all request state; fixed for the life of the engine."""
        return sum(array.nbytes for array in self.state)

    def add(self, scope: int = 0, learns: bool = True) -> int:
        """A slot for a new request, which shares phrases within ``scope`` (see `Scopes`); its text
        becomes phrases if it ``learns``.
        """
        slot = self._free.pop()
        state = self.state
        for array in (state.committed, state.in_pool, state.window_levels, state.predicted_len):
            array[slot] = 0
        state.scope[slot], state.learns[slot] = scope, learns
        state.owner[slot] = self._admitted = self._admitted % (2**31 - 1) + 1
        self.reset(slot, 0)
        return slot

    def reset(self, slot: int, cached: int) -> None:
        """Forget a draft; ``cached`` tokens of the request have draft KV in its blocks."""
        self.state.cached[slot] = cached
        self.state.chain_len[slot] = 0
        self.state.size[slot] = 0

    def predict(self, slot: int, tokens: np.ndarray, prompt: int) -> None:
        """Expect a request to say ``tokens`` int32 [n] behind a prompt of so many."""
        known = self.state.predicted
        if len(tokens) > known.shape[1]:
            longer = np.zeros((len(known), max(len(tokens), 2 * known.shape[1])), np.int32)
            longer[:, : known.shape[1]] = known
            self.state = self.state._replace(predicted=longer)
        state = self.state
        state.predicted[slot, : len(tokens)] = tokens
        state.predicted_len[slot], state.predicted_seen[slot] = len(tokens), prompt
        state.predicted_at[slot] = state.predicted_run[slot] = 0

    def release(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)

    def commit(self, texts, slots, rows, lengths, source: PhraseSource) -> None:
        """Feed the pool what requests have committed since the last call.

        Args:
            texts: int32 [*, max_model_len].
            slots: int64 [R].
            rows: int64 [R], their rows in ``texts``.
            lengths: int64 [R], committed tokens of each.
            source: of the phrases.
        """
        insert_texts(
            self.pool.arrays, self.state.scope, self.state.owner, self.state.learns,
            self.state.in_pool, slots, texts, rows, lengths, int(source), self.contexts,
        )  # fmt: skip

    def start(
        self, slot: int, committed: int, limit: int, kv_capacity: int, chain_only: bool = False
    ) -> None:
        """Begin a draft after ``committed`` tokens.

        Args:
            slot: of the request.
            committed: tokens of its text.
            limit: nodes of its tree, at most.
            kv_capacity: positions that have a draft KV slot.
            chain_only: keep the tree a chain.
        """
        state = self.state
        state.committed[slot] = committed
        state.cached[slot] = min(state.cached[slot], committed - 1)
        state.node_limit[slot] = min(limit, self.budget)
        state.kv_capacity[slot] = kv_capacity
        state.chain_len[slot] = 0
        state.done[slot] = state.node_limit[slot] <= 0
        state.chain_only[slot] = chain_only
        state.branches[slot] = state.branch_next[slot] = -1

    def plan(
        self, slots, rows, token_ids, width: RoundWidth = RoundWidth.FULL
    ) -> tuple[Round, int, int]:
        """Rows of the next round.

        Args:
            slots: int64 [R], requests that still draft.
            rows: int64 [R], their rows in ``token_ids``.
            token_ids: int32 [*, max_model_len], committed tokens.
            width: what the round carries beside the chain.

        Returns:
            The round (its arrays may be longer than needed), the number of rows T, and the
            number M of rows whose prediction is needed.

        Raises:
            PoolFault: a phrase of the pool has tokens that no model knows.
        """
        uncached = self.state.committed[slots] + self.state.chain_len[slots]
        uncached -= self.state.cached[slots]
        columns, phrases = self.carried(width)
        most = int(uncached.sum()) + len(slots) * self.rows_of(width)
        out = Round.empty(most, len(slots), columns, phrases)
        total, wanted = plan_round(
            self.state, self.pool.arrays, slots, rows, token_ids, self.max_len, out
        )
        tokens = out.tokens[:total]
        if total and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise PoolFault("a round has tokens that cannot be")
        return out, total, wanted

    def plan_branches(self, slots) -> tuple[Round, int, np.ndarray]:
        """Rows of a last forward, which asks what follows the branches of int64 [R] requests.

        Returns:
            The round, the number of rows T, and int32 [M, 3]: request, place and rank of the row
            behind each of ``logits_rows[:M]``.
        """
        most = len(BRANCHES) * (1 + max(BRANCHES))
        out = Round.empty(len(slots) * most, len(slots))
        which = np.empty((len(slots) * most, 3), np.int32)
        out.writes.fill(-1)
        total, wanted = plan_branches(self.state, slots, out, which)
        return out, total, which[:wanted]

    def absorb(self, slots, out: Round, predicted) -> None:
        """Extend the chains by the predictions int64 [T] of a round."""
        absorb_round(
            self.state, self.pool.arrays, slots, out, predicted, self.draft_tokens, self.stops
        )

    def build(self, slots, rows, token_ids) -> None:
        """Make the trees of ``slots`` from their chains and the pool."""
        build_trees(
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

    def grow(
        self, slots, rows, token_ids, rates, min_probability: float, without_draft: bool = False
    ) -> tuple[list[DraftTree], list[np.ndarray]]:
        """Make the trees of ``slots``, best nodes first; see `grow_best`.

        Returns:
            The trees, and float64 [n] for each: probabilities of its nodes, descending.
        """
        ranked = Ranked(
            np.empty((len(slots), self.budget), np.int32), np.empty((len(slots), self.budget))
        )
        grow_best(
            self.state, self.pool.arrays, slots, rows, token_ids, rates, min_probability,
            self.stops, without_draft,
            ranked,
        )  # fmt: skip
        sizes = self.state.size[slots].tolist()
        trees = [
            self.tree(slot)._replace(kinds=kinds[:n])
            for slot, kinds, n in zip(slots.tolist(), ranked.kinds, sizes, strict=True)
        ]
        return trees, [p[:n] for p, n in zip(ranked.probabilities, sizes, strict=True)]

    def check_trees(self, slots) -> None:
        """Check what was made for ``slots`` int64 [R].

        Raises:
            PoolFault: these are no trees of tokens, or the pool held what it cannot.
        """
        state = self.state
        trees = state.tokens[slots], state.parents[slots], state.size[slots]
        if not are_trees(*trees, self.vocab_size):
            raise PoolFault("a tree has tokens or nodes that cannot be")
        faults = int(self.pool.arrays.faults[0])
        if faults > self._faults:
            self._faults = faults
            raise PoolFault("slots of the pool held what they cannot")

    def drop_drafts(self, slots, keep_kv: bool) -> None:
        """Forget the drafts of ``slots`` int64 [R], after a fault in the middle of one.

        Args:
            slots: int64 [R].
            keep_kv: whether what the draft model has read of their texts is sound.
        """
        state = self.state
        state.chain_len[slots] = state.size[slots] = 0
        state.cached[slots] = np.minimum(state.cached[slots], state.committed[slots] * keep_kv)

    def learn(self, slots, roots, trees: Sequence[DraftTree], predicted) -> None:
        """Turn verified trees of requests that learn into phrases.

        Args:
            slots: list of R slots.
            roots: list of R tokens, the last committed one of each before its tree.
            trees: of R requests.
            predicted: R arrays int [n + 1], the target's token after each row.
        """
        if not trees:
            return
        sizes = [len(tree.tokens) for tree in trees]
        learn_all(
            self.pool.arrays, self.state.scope, self.state.owner, self.state.learns,
            np.array(slots, np.int64),
            np.array(roots, np.int64), np.array(sizes, np.int64),
            np.concatenate([tree.tokens for tree in trees]),
            np.concatenate([tree.parents for tree in trees]),
            np.concatenate([tree.sources for tree in trees]),
            np.concatenate(predicted).astype(np.int64),
        )  # fmt: skip

    def settle(self, slot: int, emitted: list[int]) -> None:
        """After verification: keep the draft KV of those chain tokens that were committed."""
        state = self.state
        agreed = 0
        kept = state.chain_len[slot] if self.keeps_chain_kv else 0
        for token in state.chain[slot, :kept].tolist():
            if agreed == len(emitted) or emitted[agreed] != token:
                break
            agreed += 1
        if state.chain_len[slot]:
            state.cached[slot] = min(state.cached[slot], state.committed[slot] + agreed)
            state.chain_len[slot] = 0
