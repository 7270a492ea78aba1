"""A world of requests and a model for `Drafting`, and the trees it should build."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.draft_tree import DraftTree
from vllm_ouroboros.trees.drafting import Drafting, RoundWidth

from .fakes import Language, ancestors, trie

UNASKED = -5  # stands where no prediction was asked for; must never turn up anywhere


class Window:
    """The Jacobi window of one request, straight from its definition."""

    def __init__(self, beta: int, columns: int) -> None:
        self.beta, self.columns = beta, columns
        self.cells: list[list[int]] = []

    def begin(self, text: list[int]) -> None:
        start = max(0, len(text) - self.columns)
        tail = text[start:]
        self.cells = [[tail[j % len(tail)] for j in range(self.columns)]]

    def round(self, model: Language, text: list[int]) -> list[tuple[int, tuple[int, ...]]]:
        """Advance by one round; the new phrases with their keys, if the window is full."""
        keys = [text[-1], *self.cells[0][1:]]
        fresh = []
        for j in range(self.columns):
            above = [level[j] for level in self.cells[1:]]
            fresh.append(model([*text, *self.cells[0][1 : j + 1], *above]))
        phrases = []
        if len(self.cells) == self.beta:
            phrases = [
                (keys[j], (*(level[j] for level in self.cells[1:]), fresh[j]))
                for j in range(self.columns)
            ]
            del self.cells[0]
        self.cells.append(fresh)
        return phrases


class Life:
    """One request: its text, its slot, and its draft KV by position.

    The KV of a position is the whole sequence that was visible to the row that wrote it: what a
    real key and value are a function of.
    """

    def __init__(self, drafting: Drafting, row: int, prompt: list[int], scope: int = 0) -> None:
        self.drafting, self.row, self.text = drafting, row, list(prompt)
        self.slot = drafting.add(scope)
        self.kv: dict[int, tuple[int, ...]] = {}
        size = drafting.state.window.shape
        self.window = Window(size[1], size[2])

    @property
    def chain(self) -> list[int]:
        state = self.drafting.state
        return state.chain[self.slot, : state.chain_len[self.slot]].tolist()

    @property
    def cached(self) -> int:
        return int(self.drafting.state.cached[self.slot])

    def check_kv(self) -> None:
        text = (*self.text, *self.chain)
        assert self.cached <= len(text)
        for position in range(self.cached):
            assert self.kv[position] == text[: position + 1], "draft KV of another text"


class World:
    """Some requests, a draft model, and rounds as the proposer runs them."""

    def __init__(self, model: Language, drafting: Drafting, max_len: int) -> None:
        self.model, self.drafting, self.max_len = model, drafting, max_len
        self.token_ids = np.full((4, max_len), 77, np.int32)
        self.rounds = 0
        self.window_phrases: list[tuple[int, int, tuple[int, ...]]] = []

    def show(self, life: Life) -> None:
        self.token_ids[life.row] = 77
        self.token_ids[life.row, : len(life.text)] = life.text

    def round(self, lives: list[Life]) -> None:
        drafting, model = self.drafting, self.model
        state, self.rounds = drafting.state, self.rounds + 1
        slots = np.array([life.slot for life in lives], np.int64)
        rows = np.array([life.row for life in lives], np.int64)
        for life in lives:
            if not life.window.cells and life.window.columns:
                life.window.begin(life.text)
        pooled = [
            drafting.pool.lookup(([*life.text, *life.chain])[-1], int(state.scope[life.slot]))
            for life in lives
        ]
        out, total, wanted = drafting.plan(slots, rows, self.token_ids)
        starts = out.query_start_loc.tolist()
        asked = set(out.logits_rows[:wanted].tolist())
        assert len(asked) == wanted
        assert starts[0] == 0
        assert starts[-1] == total
        predicted = np.full(total, UNASKED, np.int64)
        seen: dict[int, tuple[int, ...]] = {}
        for r, life in enumerate(lives):
            first, end = starts[r], starts[r + 1]
            text = (*life.text, *life.chain)
            context = life.cached
            assert out.context_lens[r] == context
            assert out.num_uncached[r] == len(text) - context
            life.check_kv()
            parents = out.parents[first:end]
            assert (parents < np.arange(end - first)).all()
            most = out.num_uncached[r] + drafting.rows_of(RoundWidth.FULL)
            assert end - first <= most
            known, guesses = int(out.num_uncached[r]), int(out.num_guesses[r])
            for i in range(end - first):
                path = ancestors(parents, i)
                row = first + i
                sequence = (*text[:context], *(int(out.tokens[first + a]) for a in path))
                seen[row] = sequence
                assert out.positions[row] == min(len(sequence), self.max_len) - 1
                if i < known:
                    assert sequence == text[: context + i + 1]
                    wrote = len(sequence) - 1
                    fits = wrote < state.kv_capacity[life.slot]
                    assert out.writes[row] == (wrote if fits else -1)
                else:
                    assert out.writes[row] == -1
                    assert sequence[: len(text)] == text  # all hang below the current token
                if row in asked:
                    predicted[row] = model(sequence)
            # guess rows are the phrases of the current token, merged
            found = [seen[first + known + i][len(text) :] for i in range(guesses)]
            assert found == trie(pooled[r], 10**9)
            assert first + known - 1 in asked
            assert asked >= {first + known + i for i in range(guesses)}
            for i in range(known):
                if out.writes[first + i] >= 0:
                    life.kv[int(out.writes[first + i])] = seen[first + i]
        before = [life.chain for life in lives]
        expected = [
            life.window.round(model, [*life.text, *life.chain]) if life.window.columns else []
            for life in lives
        ]
        lengths = [len(life.text) + len(life.chain) for life in lives]
        drafting.absorb(slots, out, predicted)
        for r, life in enumerate(lives):
            # what was known is cached; accepted guesses are known rows of the next round
            assert life.cached == min(lengths[r], state.kv_capacity[life.slot])
            assert len(life.chain) > len(before[r]), "a round without progress"
            assert life.cached <= state.kv_capacity[life.slot]
            life.check_kv()
            levels = int(state.window_levels[life.slot])
            mine = state.window[life.slot, :levels].tolist()
            theirs = [list(level) for level in life.window.cells]
            if mine:
                mine[0][0] = theirs[0][0] = 0  # the current token stands in its place
            assert mine == theirs
            for key, phrase in expected[r]:
                scope = int(state.scope[life.slot])
                held = drafting.pool.lookup(key, scope)
                full = len(held) == drafting.pool.arrays.tokens.shape[1]
                assert full or any(p[: len(phrase)] == phrase[: len(p)] for p in held)
                self.window_phrases.append((scope, key, phrase))

    def draft(self, lives: list[Life]) -> None:
        """All rounds of a step."""
        state = self.drafting.state
        lives = [life for life in lives if len(life.text) + self.drafting.budget < self.max_len]
        while active := [life for life in lives if not state.done[life.slot]]:
            self.round(active)
            lives = active

    def build(self, lives: list[Life]) -> list[DraftTree]:
        slots = np.array([life.slot for life in lives], np.int64)
        rows = np.array([life.row for life in lives], np.int64)
        self.drafting.build(slots, rows, self.token_ids)
        return [self.drafting.tree(life.slot) for life in lives]


def check_chain(life: Life, model: Language, limit: int, draft_tokens: int, stops) -> None:
    """The chain is the draft model's own greedy text: no longer and no shorter than it may be."""
    greedy = model.greedy(life.text, limit, stops)
    chain = life.chain
    assert chain == greedy[: len(chain)]
    assert len(chain) <= limit
    ended = bool(chain) and chain[-1] in stops
    assert ended or len(chain) >= min(limit, draft_tokens)


def expected_tree(
    life: Life, limit: int, draft_tokens: int, num_suffixes: int, stops, chain_only: bool = False
):
    """Nodes of the tree and the number of those that are no suffix, from the pool's lookups."""
    pool, scope = life.drafting.pool, int(life.drafting.state.scope[life.slot])

    def phrases(key):
        """Phrases of a key, best first, and whether each is a guess of the window; no phrase
        goes on behind an id that ends the text.
        """
        found = pool.lookup(key, scope)
        slot = np.nonzero(pool.arrays.keys == (scope << 32 | key))[0]
        sources = pool.arrays.sources[slot[0], : len(found)] if len(slot) else []
        ends = [next((i + 1 for i, t in enumerate(p) if t in stops), len(p)) for p in found]
        return [
            (p[:end], int(s) == PhraseSource.WINDOW)
            for p, end, s in zip(found, ends, sources, strict=True)
        ]

    chain, root = tuple(life.chain), life.text[-1]
    drafted = len(chain)
    while not drafted and len(chain) < min(limit, draft_tokens):
        last = chain[-1] if chain else root
        found = phrases(last)
        if not found or (chain and last in stops):
            break
        chain = (*chain, *found[0][0])[:limit]
    key = chain[-1] if chain else root
    paths = [chain]
    if num_suffixes and chain_only:  # one path: the chain with its best suffix
        best = [] if chain and key in stops else phrases(key)[:1]
        paths += [(*chain, *phrase) for phrase, _ in best]
    elif num_suffixes:
        suffixes = [] if chain and key in stops else phrases(key)[:num_suffixes]
        for guess in (False, True):
            paths += [(*chain, *phrase) for phrase, guessed in suffixes if guessed == guess]
            paths += [phrase for phrase, guessed in phrases(root) if guessed == guess]
    return trie(paths, limit), drafted


@st.composite
def shapes(draw):
    """Sizes of everything."""
    budget = draw(st.integers(1, 14))
    return SimpleNamespace(
        beta=draw(st.integers(1, 4)),
        guesses=draw(st.integers(1, 4)),
        columns=draw(st.sampled_from([0, 1, 2, 5])),
        budget=budget,
        draft_tokens=draw(st.integers(1, budget)),
        num_suffixes=draw(st.integers(0, 3)),
        stops=draw(st.sampled_from([(), (), (3,), (1, 6)])),
        max_len=draw(st.sampled_from([24, 48, 160])),
        seed=draw(st.integers(0, 2**32 - 1)),
        surprise=draw(st.sampled_from([1, 3, 9, 10**9])),
        twist=draw(st.sampled_from([0, 2, 6])),
        scopes=draw(st.sampled_from([(0, 0, 0, 0), (1, 2, 3, 4), (7, 0, 7, 2**31 - 1)])),
        chain_only=draw(st.booleans()),
        lives=draw(st.integers(1, 3)),
    )


def make(shape, capacity=256) -> Drafting:
    return Drafting(
        PhrasePool(capacity, shape.guesses, shape.beta),
        max_requests=4,
        budget=shape.budget,
        draft_tokens=shape.draft_tokens,
        num_suffixes=shape.num_suffixes,
        window_size=shape.columns,
        max_len=shape.max_len,
        stops=shape.stops,
    )
