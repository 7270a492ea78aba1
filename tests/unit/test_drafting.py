"""Drafting against a fake model whose every prediction depends on what a row really sees."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.drafting import Drafting, Width
from vllm_ouroboros.phrases import PhrasePool, PhraseSource
from vllm_ouroboros.tree import DraftTree, NodeSource

from .fakes import Language, ancestors, node_paths, trie

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
            assert out.num_known[r] == len(text) - context
            life.check_kv()
            parents = out.parents[first:end]
            assert (parents < np.arange(end - first)).all()
            most = out.num_known[r] + drafting.rows_of(Width.FULL)
            assert end - first <= most
            known, guesses = int(out.num_known[r]), int(out.num_guesses[r])
            for i in range(end - first):
                path = ancestors(parents, i)
                row = first + i
                sequence = (*text[:context], *(int(out.tokens[first + a]) for a in path))
                seen[row] = sequence
                assert out.positions[row] == min(len(sequence), self.max_len) - 1
                if i < known:
                    assert sequence == text[: context + i + 1]
                    wrote = len(sequence) - 1
                    fits = wrote < state.capacity[life.slot]
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
            assert life.cached == min(lengths[r], state.capacity[life.slot])
            assert len(life.chain) > len(before[r]), "a round without progress"
            assert life.cached <= state.capacity[life.slot]
            life.check_kv()
            levels = int(state.levels[life.slot])
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
    life: Life, limit: int, draft_tokens: int, num_suffixes: int, stops, narrow: bool = False
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
    if num_suffixes and narrow:  # one path: the chain with its best suffix
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
        narrow=draw(st.booleans()),
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


@given(shape=shapes())
@settings(max_examples=250, deadline=None)
def test_requests_from_prompt_to_end(shape) -> None:
    """Steps of several requests: draft, verify by another model, learn, settle, go on."""
    rng = np.random.default_rng(shape.seed)
    target = Language(shape.seed, surprise=shape.surprise)
    model = Language(shape.seed, surprise=shape.surprise, twist=shape.twist)
    drafting = make(shape)
    world = World(model, drafting, shape.max_len)

    def narrow(life: Life) -> bool:
        return shape.narrow and life.row % 2 == 0

    lives = []
    for row in rng.permutation(4)[: shape.lives].tolist():
        prompt = rng.integers(0, 8, rng.integers(1, 12)).tolist()
        lives.append(Life(drafting, row, prompt, shape.scopes[row]))
        # half of the pool's first phrases are true here, so that guesses are accepted
        scope = int(drafting.state.scope[lives[-1].slot])
        for at in range(12):
            true = model.greedy(prompt, at + shape.beta)
            false = rng.integers(0, 8, rng.integers(1, shape.beta + 1))
            key = ([*prompt, *true])[len(prompt) - 1 + at]
            drafting.pool.insert(key, true[at:] if rng.random() < 0.5 else false, 0, scope)
    for _step in range(5):
        lives = [life for life in lives if len(life.text) < shape.max_len - 1]
        if not lives:
            break
        some = [life for life in lives if rng.random() < 0.8] or lives
        limits = {}
        for life in some:
            world.show(life)
            drafting.commit(
                life.slot, world.token_ids[life.row], len(life.text), PhraseSource.HISTORY
            )
            room = shape.max_len - len(life.text) - 1
            limits[life.slot] = limit = int(min(rng.integers(0, shape.budget + 3), room))
            # the engine has slots for all committed tokens but the last, at least
            slack = int(rng.choice([0, 1, 2, 5, shape.budget + 1]))
            capacity = len(life.text) - 1 + slack
            drafting.start(life.slot, len(life.text), limit, capacity, narrow(life))
        world.draft(some)
        for life in some:
            limit = min(limits[life.slot], shape.budget)
            if len(life.text) + shape.budget < shape.max_len:
                check_chain(life, model, limit, shape.draft_tokens, shape.stops)
            else:
                assert life.chain == []
        trees = world.build(some)
        for life, tree in zip(some, trees, strict=True):
            limit = min(limits[life.slot], shape.budget)
            nodes, drafted = expected_tree(
                life, limit, shape.draft_tokens, shape.num_suffixes, shape.stops, narrow(life)
            )
            assert node_paths(tree) == nodes
            assert tree.is_chain or not narrow(life)
            rest = len(tree.tokens) - drafted
            assert tuple(life.chain) == tuple(tree.tokens[:drafted].tolist())
            assert len(set(node_paths(tree))) == len(tree.tokens) <= limit
            sources = tree.sources.tolist()
            assert sources == [NodeSource.DRAFT] * drafted + [NodeSource.SUFFIX] * rest
        for life, tree in zip(some, trees, strict=True):
            nodes = node_paths(tree)
            cut = tree.prefix(int(rng.integers(0, len(nodes) + 1)) if rng.random() < 0.3 else 99)
            paths = [(), *node_paths(cut)]
            predicted = np.array([target([*life.text, *path]) for path in paths], np.int64)
            emitted = [target(life.text)]
            while tuple(emitted) in paths:
                emitted.append(target([*life.text, *emitted]))
            # what drafting leaves behind never depends on which KV the target has
            drafting.learn(life.slot, life.text[-1], cut, predicted)
            drafting.settle(life.slot, emitted)
            life.text += emitted[: shape.max_len - len(life.text)]
            assert life.chain == []
            life.check_kv()
    a = drafting.pool.arrays
    for slot in np.nonzero(a.keys >= 0)[0]:
        for g in range(a.counts[slot]):
            phrase = tuple(a.tokens[slot, g, : a.lengths[slot, g]].tolist())
            assert min(phrase) >= 0, "an unasked prediction"
            if a.sources[slot, g] == PhraseSource.WINDOW:
                key = int(a.keys[slot])
                assert (key >> 32, key & 0xFFFFFFFF, phrase) in world.window_phrases


@pytest.mark.parametrize("beta, columns", [(1, 1), (1, 4), (2, 1), (3, 2), (4, 6)])
def test_the_window_yields_what_the_model_predicts(beta, columns) -> None:
    """From the round that fills the window on, W phrases a round, each an n-gram of the model."""
    model = Language(5, surprise=10**9)  # Markov: a phrase of the model is true anywhere
    pool = PhrasePool(1024, 64, beta)
    drafting = Drafting(
        pool, max_requests=1, budget=60, draft_tokens=1, num_suffixes=0,
        window_size=columns, max_len=500,
    )  # fmt: skip
    world = World(model, drafting, 500)
    life = Life(drafting, 0, [1, 2, 3])
    world.show(life)
    for step in range(3 * beta + columns):
        drafting.start(life.slot, len(life.text), 1, 400)
        world.draft([life])
        assert world.rounds == step + 1
        assert pool.inserted()["window"] == columns * max(0, world.rounds - beta + 1)
        life.text += life.chain
        drafting.settle(life.slot, life.chain)
        world.show(life)
    for i, (_, key, phrase) in enumerate(world.window_phrases):
        assert list(phrase[1:]) == model.greedy([phrase[0]], beta - 1)
        if i % columns:  # column 0 was predicted after a token that was current some rounds ago
            assert phrase[0] == model([key])


def test_without_a_window_only_known_and_guess_rows() -> None:
    drafting = make(
        SimpleNamespace(
            beta=3, guesses=2, columns=0, budget=6, draft_tokens=3, num_suffixes=1, max_len=50,
            stops=(),
        )
    )  # fmt: skip
    drafting.pool.insert(5, [6, 7], PhraseSource.PROMPT)
    drafting.pool.insert(5, [6, 8, 9], PhraseSource.PROMPT)
    slot = drafting.add()
    drafting.start(slot, 3, 6, 50)
    ids = np.array([[3, 4, 5, 77, 77]], np.int32)
    out, total, wanted = drafting.plan(np.array([slot]), np.array([0]), ids)
    assert out.tokens[:total].tolist() == [3, 4, 5, 6, 8, 9, 7]
    assert out.parents[:total].tolist() == [-1, 0, 1, 2, 3, 4, 3]
    assert out.positions[:total].tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert out.writes[:total].tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert out.logits_rows[:wanted].tolist() == [2, 3, 4, 5, 6]
    assert [out.num_known[0], out.num_guesses[0], out.context_lens[0]] == [3, 4, 0]


def test_accepted_guesses_make_a_chain_in_one_round() -> None:
    model = Language(9, surprise=10**9)
    drafting = make(
        SimpleNamespace(
            beta=6, guesses=2, columns=0, budget=20, draft_tokens=7, num_suffixes=0, max_len=90,
            stops=(),
        )
    )  # fmt: skip
    world, life = World(model, drafting, 90), Life(drafting, 0, [4, 2])
    drafting.pool.insert(2, model.greedy([4, 2], 6), PhraseSource.PROMPT)
    world.show(life)
    drafting.start(life.slot, 2, 20, 90)
    world.draft([life])
    assert world.rounds == 1
    assert life.chain == model.greedy([4, 2], 7)
    assert life.cached == 2  # accepted guesses get their KV in the next forward


def test_no_slots_no_kv() -> None:
    """Without capacity the chain is still right; it is computed anew in every round."""
    model = Language(3, surprise=3)
    drafting = make(
        SimpleNamespace(
            beta=2, guesses=2, columns=3, budget=9, draft_tokens=6, num_suffixes=0, max_len=90,
            stops=(),
        )
    )  # fmt: skip
    world, life = World(model, drafting, 90), Life(drafting, 0, [4, 2, 1])
    world.show(life)
    drafting.start(life.slot, 3, 9, 2)
    world.draft([life])
    check_chain(life, model, 9, 6, ())
    assert life.cached == 2
    assert set(life.kv) <= {0, 1}


@pytest.mark.parametrize("draft", [True, False])
def test_a_stop_ends_the_draft(draft) -> None:
    """Nothing is drafted behind an id that ends the text, by the model or from the pool."""
    stop = 7

    def model(sequence):
        return (sequence[-1] + 1) % 8  # 5, 6, 7 | 0, ...

    drafting = make(
        SimpleNamespace(
            beta=4, guesses=2, columns=0, budget=12, draft_tokens=6, num_suffixes=2, max_len=90,
            stops=(stop,),
        )
    )  # fmt: skip
    for token in range(8):
        drafting.pool.insert(token, [(token + i) % 8 for i in range(1, 5)], PhraseSource.PROMPT)
    world, life = World(model, drafting, 90), Life(drafting, 0, [4, 5])
    world.show(life)
    drafting.start(life.slot, 2, 12, 90)
    if draft:
        world.draft([life])
        assert life.chain == [6, 7]
    [tree] = world.build([life])
    assert tree.tokens[:2].tolist() == [6, 7]
    assert not [path for path in node_paths(tree) if stop in path[:-1]]


def test_suffixes_hang_at_the_end_of_the_chain_best_first() -> None:
    drafting = make(
        SimpleNamespace(
            beta=2, guesses=4, columns=0, budget=9, draft_tokens=2, num_suffixes=2, max_len=90,
            stops=(),
        )
    )  # fmt: skip
    pool = drafting.pool
    for phrase in ([30, 31], [40, 41], [50, 51]):
        pool.insert(2, phrase, PhraseSource.PROMPT)
    for phrase in ([1, 9], [60, 61]):
        pool.insert(0, phrase, PhraseSource.PROMPT)
    slot = drafting.add()
    drafting.start(slot, 1, 9, 9)
    drafting.state.chain[slot, :2], drafting.state.chain_len[slot] = [1, 2], 2
    ids = np.zeros((1, 4), np.int32)
    drafting.build(np.array([slot]), np.array([0]), ids)
    assert node_paths(drafting.tree(slot)) == [
        (1,), (1, 2),
        (1, 2, 50), (1, 2, 50, 51), (1, 2, 40), (1, 2, 40, 41),  # K = 2, newest first
        (60,), (60, 61), (1, 9),  # what is left goes to the root's phrases
    ]  # fmt: skip


def test_a_pool_alone_drafts_phrase_after_phrase() -> None:
    drafting = make(
        SimpleNamespace(
            beta=2, guesses=2, columns=0, budget=9, draft_tokens=5, num_suffixes=0, max_len=90,
            stops=(),
        )
    )  # fmt: skip
    for token, phrase in ((0, [1, 2]), (2, [3, 4]), (4, [5, 6]), (6, [7])):
        drafting.pool.insert(token, phrase, PhraseSource.PROMPT)
    slot = drafting.add()
    drafting.start(slot, 1, 9, 0)
    drafting.build(np.array([slot]), np.array([0]), np.zeros((1, 4), np.int32))
    tree = drafting.tree(slot)
    assert tree.tokens.tolist() == [1, 2, 3, 4, 5, 6]  # whole phrases, until γ is reached
    assert tree.is_chain
    assert (tree.sources == NodeSource.SUFFIX).all()


# -- learning ------------------------------------------------------------------------------------


def learner(beta=4, guesses=4) -> tuple[Drafting, int]:
    drafting = make(
        SimpleNamespace(
            beta=beta, guesses=guesses, columns=0, budget=32, draft_tokens=4, num_suffixes=3,
            max_len=90, stops=(),
        )
    )  # fmt: skip
    return drafting, drafting.add()


def with_suffixes(chain, phrases) -> DraftTree:
    nodes = trie([tuple(chain), *((*chain, *p) for p in phrases)], 10**9)
    index = {(): -1, **{path: i for i, path in enumerate(nodes)}}
    sources = [NodeSource.DRAFT if len(p) <= len(chain) else NodeSource.SUFFIX for p in nodes]
    return DraftTree(
        np.array([p[-1] for p in nodes], np.int32),
        np.array([index[p[:-1]] for p in nodes], np.int32),
        np.array(sources, np.int32),
    )


def predictions(tree: DraftTree, target: dict[tuple[int, ...], int]) -> np.ndarray:
    """The target's token after each path; 999 where the test does not care."""
    return np.array([target.get(p, 999) for p in [(), *node_paths(tree)]], np.int64)


def test_learn_puts_the_corrected_suffix_before_the_wrong_one() -> None:
    drafting, slot = learner()
    for phrase in ([30, 31, 32], [20, 21, 22]):
        drafting.pool.insert(11, phrase, PhraseSource.HISTORY)
    tree = with_suffixes([10, 11], [[20, 21, 22], [30, 31, 32]])
    target = {
        (): 10, (10,): 11, (10, 11): 20,
        (10, 11, 20): 99, (10, 11, 20, 21): 50, (10, 11, 20, 21, 22): 60,
        (10, 11, 30): 31, (10, 11, 30, 31): 32,
    }  # fmt: skip
    drafting.learn(slot, 1, tree, predictions(tree, target))
    # the second one corrected at its start; the wrong ones stay behind until they are pushed out
    corrected = [(20, 99, 50), (20, 31, 32)]
    assert drafting.pool.lookup(11) == [*corrected, (20, 21, 22), (30, 31, 32)]


def test_learn_keeps_a_suffix_that_was_right_and_moves_it_to_the_front() -> None:
    drafting, slot = learner()
    for phrase in ([20, 21], [77, 78]):
        drafting.pool.insert(11, phrase, PhraseSource.HISTORY)
    tree = with_suffixes([11], [[20, 21]])
    target = {(): 11, (11,): 20, (11, 20): 21, (11, 20, 21): 22}
    drafting.learn(slot, 1, tree, predictions(tree, target))
    assert drafting.pool.lookup(11) == [(20, 21, 22), (77, 78)]  # with the target's own bonus


def test_learn_corrects_a_suffix_that_the_budget_cut() -> None:
    """The pool's phrase is longer than what was tried of it; it is wrong all the same."""
    drafting, slot = learner()
    drafting.pool.insert(11, [20, 21, 22, 23], PhraseSource.HISTORY)
    tree = with_suffixes([11], [[20, 21]])
    drafting.learn(slot, 1, tree, predictions(tree, {(): 11, (11,): 20, (11, 20): 99}))
    assert drafting.pool.lookup(11) == [(20, 99), (20, 21, 22, 23)]


def test_learn_takes_up_agreement_after_a_rejection() -> None:
    drafting, slot = learner()
    tree = DraftTree.chain([1, 2, 3, 4])
    predicted = np.array([1, 9, 3, 4, 5], np.int64)  # 2 is rejected; 3 and 4 follow all the same
    drafting.learn(slot, 0, tree, predicted)
    assert drafting.pool.lookup(2) == [(3, 4, 5)]
    assert drafting.pool.lookup(3) == [(4, 5)]
    assert drafting.pool.lookup(1) == []


def test_learn_corrects_the_phrases_of_a_draft_from_the_pool_alone() -> None:
    """Two phrases one after the other: the first is wrong, and the corrected one comes first."""
    drafting, slot = learner(beta=3)
    drafting.pool.insert(7, [1, 2, 3], PhraseSource.HISTORY)
    drafting.pool.insert(3, [4, 5, 6], PhraseSource.HISTORY)
    drafting.start(slot, 1, 6, 0)
    drafting.build(np.array([slot]), np.array([0]), np.full((1, 4), 7, np.int32))
    tree = drafting.tree(slot)
    assert tree.tokens.tolist()[:6] == [1, 2, 3, 4, 5, 6]
    predicted = predictions(tree, {(): 1, (1,): 9, (1, 2): 8, (1, 2, 3): 4})
    drafting.learn(slot, 7, tree, predicted)
    assert drafting.pool.lookup(7)[:2] == [(1, 9, 8), (1, 2, 3)]


@given(seed=st.integers(0, 2**32 - 1), beta=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_what_is_learned_was_predicted(seed, beta) -> None:
    """Each phrase starts with what the target put after a node that holds its key."""
    rng = np.random.default_rng(seed)
    drafting, slot = learner(beta, guesses=16)
    chain = rng.integers(0, 5, rng.integers(0, 6)).tolist()
    phrases = [
        rng.integers(0, 5, rng.integers(1, beta + 1)).tolist() for _ in range(rng.integers(0, 4))
    ]
    tree = with_suffixes(chain, phrases)
    tree = tree.prefix(int(rng.integers(0, len(tree.tokens) + 1)))
    predicted = rng.integers(0, 5, len(tree.tokens) + 1)
    drafting.learn(slot, 4, tree, predicted)
    tokens = [4, *tree.tokens.tolist()]
    parents = [-1, *(tree.parents + 1).tolist()]
    for key in range(5):
        for phrase in drafting.pool.lookup(key):
            assert phrase[0] in {int(predicted[i]) for i, t in enumerate(tokens) if t == key}
            # and each of its tokens was predicted one level below the one before it
            level = [i for i, t in enumerate(tokens) if t == key and predicted[i] == phrase[0]]
            for token in phrase[1:]:
                level = [i for i, p in enumerate(parents) if p in level and predicted[i] == token]
                assert level
    if len(tree.tokens) > len(chain) or beta == 1:
        return  # a suffix that fails may take away what the chain confirmed elsewhere
    for node in range(len(tree.tokens) - 1):  # every agreement of the draft is taken up
        if tokens[node + 2] == predicted[node + 1]:
            pair = (int(predicted[node + 1]), int(predicted[node + 2]))
            assert any(p[:2] == pair for p in drafting.pool.lookup(tokens[node + 1]))


# -- life cycle ----------------------------------------------------------------------------------


def small(**changes) -> Drafting:
    shape = {
        "beta": 2, "guesses": 2, "columns": 2, "budget": 4, "draft_tokens": 2, "num_suffixes": 1,
        "max_len": 40, "stops": (),
    }  # fmt: skip
    return make(SimpleNamespace(**{**shape, **changes}))


def test_slots_are_handed_out_once_and_come_back_clean() -> None:
    drafting = small()
    slots = [drafting.add() for _ in range(4)]
    assert sorted(slots) == [0, 1, 2, 3]
    with pytest.raises(IndexError):
        drafting.add()
    world, life = World(Language(1), drafting, 40), Life.__new__(Life)
    life.drafting, life.row, life.text, life.slot, life.kv = drafting, 0, [1, 2], slots[2], {}
    life.window = Window(2, 2)
    world.show(life)
    drafting.commit(life.slot, world.token_ids[0], 2, PhraseSource.HISTORY)
    drafting.start(life.slot, 2, 4, 20)
    world.draft([life])
    world.build([life])
    drafting.release(slots[2])
    again = drafting.add(9)
    state = drafting.state
    assert again == slots[2]
    assert [a[again] for a in (state.known, state.cached, state.fed, state.levels)] == [0] * 4
    assert [a[again] for a in (state.chain_len, state.size)] == [0, 0]
    assert state.scope[again] == 9
    assert not state.narrow[again]
    drafting.release(again)
    assert state.scope[drafting.add()] == 0
    assert len(drafting.tree(again).tokens) == 0


def test_scopes_share_nothing() -> None:
    drafting = small()
    text = np.array([1, 2, 3, 4], np.int32)
    one, two, shared, friend = (drafting.add(scope) for scope in (5, 6, 0, 5))
    assert drafting.state.scope[[one, two, shared, friend]].tolist() == [5, 6, 0, 5]
    drafting.commit(one, text, 4, PhraseSource.PROMPT)
    assert [drafting.pool.lookup(1, scope) for scope in (5, 6, 0)] == [[(2, 3)], [], []]
    for slot in (two, shared, friend):
        drafting.start(slot, 1, 4, 0)
    slots = np.array([two, shared, friend])
    drafting.build(slots, np.zeros(3, np.int64), np.array([[1]], np.int32))
    trees = [drafting.tree(slot).tokens.tolist() for slot in slots]
    assert trees[:2] == [[], []]
    assert trees[2][:2] == [2, 3]


def test_reset_forgets_the_draft_and_takes_the_engines_word_for_the_cache() -> None:
    drafting = small()
    slot = drafting.add()
    drafting.state.chain_len[slot] = drafting.state.size[slot] = 2
    drafting.reset(slot, 17)
    assert drafting.state.cached[slot] == 17
    assert len(drafting.tree(slot).tokens) == 0
    assert drafting.state.chain_len[slot] == 0


@pytest.mark.parametrize(
    "chain, emitted, cached, expected",
    [
        ([5, 6, 7], [5, 6, 9], 13, 12),  # two of the chain were committed
        ([5, 6, 7], [9], 13, 10),
        ([5, 6, 7], [5, 6, 7, 8], 12, 12),  # the last was never cached
        ([5, 6, 7], [5, 6, 7, 8, 9], 13, 13),  # a suffix went on
        ([5, 6, 7], [5], 13, 11),
        ([], [5, 6], 9, 9),
    ],
)
def test_settle_keeps_the_committed_part_of_the_chain(chain, emitted, cached, expected) -> None:
    drafting = small()
    slot = drafting.add()
    drafting.start(slot, 10, 4, 40)
    drafting.state.chain[slot, : len(chain)] = chain
    drafting.state.chain_len[slot], drafting.state.cached[slot] = len(chain), cached
    drafting.settle(slot, emitted)
    assert drafting.state.cached[slot] == expected
    assert drafting.state.chain_len[slot] == 0


@pytest.mark.parametrize("limit, done", [(0, True), (-3, True), (1, False), (99, False)])
def test_start_clamps_the_limit_and_the_cache(limit, done) -> None:
    drafting = small()
    slot = drafting.add()
    drafting.reset(slot, 12)
    drafting.start(slot, 8, limit, 20)
    assert drafting.state.limit[slot] == min(limit, 4)
    assert bool(drafting.state.done[slot]) is done
    assert drafting.state.cached[slot] == 7  # the last token must run to be continued


def test_state_has_a_fixed_size() -> None:
    drafting = small()
    before = drafting.bytes
    slots = [drafting.add() for _ in range(4)]
    for slot in slots:
        drafting.release(slot)
    assert drafting.bytes == before == sum(a.nbytes for a in drafting.state)


def test_commit_returns_for_what_was_cut_short() -> None:
    drafting = small(beta=3)
    slot = drafting.add()
    text = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.int32)
    for length in (2, 3, 3, 6, 8):
        drafting.commit(slot, text, length, PhraseSource.HISTORY)
    assert [drafting.pool.lookup(t) for t in range(1, 9)] == [
        [(2, 3, 4)], [(3, 4, 5)], [(4, 5, 6)], [(5, 6, 7)], [(6, 7, 8)], [(7, 8)], [(8,)], [],
    ]  # fmt: skip


def test_no_requests_no_rows() -> None:
    drafting = small()
    none = np.empty(0, np.int64)
    out, total, wanted = drafting.plan(none, none, np.zeros((1, 4), np.int32))
    assert (total, wanted) == (0, 0)
    assert out.query_start_loc.tolist() == [0]
    drafting.absorb(none, out, np.empty(0, np.int64))
