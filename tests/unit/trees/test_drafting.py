"""Drafting against a fake model whose every prediction depends on what a row really sees."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.draft_tree import NodeSource
from vllm_ouroboros.trees.drafting import Drafting

from ..helpers.drafting_world import Life, World, check_chain, expected_tree, make, shapes
from ..helpers.fakes import Language, node_paths


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
        return shape.chain_only and life.row % 2 == 0

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
            slot, row, length = (np.array([n]) for n in (life.slot, life.row, len(life.text)))
            drafting.commit(world.token_ids, slot, row, length, PhraseSource.HISTORY)
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
            drafting.learn([life.slot], [life.text[-1]], [cut], [predicted])
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
    assert [out.num_uncached[0], out.num_guesses[0], out.context_lens[0]] == [3, 4, 0]


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
