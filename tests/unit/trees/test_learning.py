"""Phrases from verified trees."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.trees.draft_tree import DraftTree, NodeSource
from vllm_ouroboros.trees.drafting import Drafting

from ..helpers.drafting_world import make
from ..helpers.fakes import node_paths, trie


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
    drafting.learn([slot], [1], [tree], [predictions(tree, target)])
    # the second one corrected at its start; the wrong ones stay behind until they are pushed out
    corrected = [(20, 99, 50), (20, 31, 32)]
    assert drafting.pool.lookup(11) == [*corrected, (20, 21, 22), (30, 31, 32)]


def test_learn_keeps_a_suffix_that_was_right_and_moves_it_to_the_front() -> None:
    drafting, slot = learner()
    for phrase in ([20, 21], [77, 78]):
        drafting.pool.insert(11, phrase, PhraseSource.HISTORY)
    tree = with_suffixes([11], [[20, 21]])
    target = {(): 11, (11,): 20, (11, 20): 21, (11, 20, 21): 22}
    drafting.learn([slot], [1], [tree], [predictions(tree, target)])
    assert drafting.pool.lookup(11) == [(20, 21, 22), (77, 78)]  # with the target's own bonus


def test_learn_corrects_a_suffix_that_the_budget_cut() -> None:
    """The pool's phrase is longer than what was tried of it; it is wrong all the same."""
    drafting, slot = learner()
    drafting.pool.insert(11, [20, 21, 22, 23], PhraseSource.HISTORY)
    tree = with_suffixes([11], [[20, 21]])
    drafting.learn([slot], [1], [tree], [predictions(tree, {(): 11, (11,): 20, (11, 20): 99})])
    assert drafting.pool.lookup(11) == [(20, 99), (20, 21, 22, 23)]


def test_learn_takes_up_agreement_after_a_rejection() -> None:
    drafting, slot = learner()
    tree = DraftTree.chain([1, 2, 3, 4])
    predicted = np.array([1, 9, 3, 4, 5], np.int64)  # 2 is rejected; 3 and 4 follow all the same
    drafting.learn([slot], [0], [tree], [predicted])
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
    drafting.learn([slot], [7], [tree], [predicted])
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
    drafting.learn([slot], [4], [tree], [predicted])
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
