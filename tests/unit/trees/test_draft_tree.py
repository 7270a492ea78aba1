"""Draft trees against brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.trees.draft_tree import (
    ROOT,
    DraftTree,
    NodeSource,
    ancestor_mask,
    depths,
    grow,
    walk,
)

PATHS = st.lists(
    st.lists(st.integers(0, 2), max_size=6).map(tuple), max_size=8
)  # a small alphabet, so that paths share prefixes


class Growing:
    """A tree under construction."""

    def __init__(self, budget: int) -> None:
        self.budget, self.size = budget, 0
        self.tokens, self.parents, self.sources = (np.full(budget, -7, np.int32) for _ in range(3))

    def grow(self, path, parent=ROOT, source=NodeSource.DRAFT, start=0) -> int:
        phrase = np.array([99] * start + list(path) + [98], np.int32)
        self.size, end = grow(
            self.tokens, self.parents, self.sources, self.size, self.budget,
            parent, phrase, start, len(path), int(source),
        )  # fmt: skip
        return end

    def path_to(self, node: int) -> tuple[int, ...]:
        path: tuple[int, ...] = ()
        while node != ROOT:
            path = (int(self.tokens[node]), *path)
            node = int(self.parents[node])
        return path


@given(paths=PATHS, budget=st.integers(0, 16), start=st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_grow_makes_a_trie_of_the_paths(paths, budget, start) -> None:
    tree = Growing(budget)
    wanted: list[tuple[int, ...]] = []  # prefixes in the order in which a trie meets them
    for path in paths:
        before = tree.size
        end = tree.grow(path, start=start)
        for length in range(1, len(path) + 1):
            if path[:length] not in wanted:
                wanted.append(path[:length])
        # the end is the deepest node of the path that the budget had room for
        present = [path[:n] for n in range(len(path) + 1) if not n or path[:n] in wanted[:budget]]
        assert tree.path_to(end) == present[-1]
        assert before <= tree.size <= budget
        if tree.size < budget:
            assert tree.path_to(end) == path
    nodes = [tree.path_to(node) for node in range(tree.size)]
    assert nodes == wanted[:budget]  # shared prefixes once, no more than the budget, in order
    for node in range(tree.size):
        assert ROOT <= tree.parents[node] < node  # parent first: every prefix is a tree
    assert (tree.tokens[tree.size :] == -7).all()


@given(head=st.lists(st.integers(0, 2), min_size=1, max_size=5), tails=PATHS)
@settings(max_examples=100, deadline=None)
def test_grow_below_a_node(head, tails) -> None:
    tree = Growing(64)
    end = tree.grow(head)
    chain = tree.size
    for tail in tails:
        tip = tree.grow(tail, parent=end, source=NodeSource.SUFFIX)
        assert tree.path_to(tip) == (*head, *tail)
    assert len({tree.path_to(n) for n in range(tree.size)}) == tree.size
    assert (tree.sources[:chain] == NodeSource.DRAFT).all()
    assert (tree.sources[chain : tree.size] == NodeSource.SUFFIX).all()
    assert (tree.parents[chain : tree.size] >= chain - 1).all()


def test_a_shared_node_keeps_its_first_source() -> None:
    tree = Growing(8)
    tree.grow((1, 2), source=NodeSource.DRAFT)
    tree.grow((1, 3), source=NodeSource.SUFFIX)
    assert tree.sources[: tree.size].tolist() == [1, 1, 2]
    assert tree.parents[: tree.size].tolist() == [-1, 0, 0]


@st.composite
def trees(draw, max_nodes=24, vocab=3, distinct=True):
    """A tree; with ``distinct`` no two siblings have the same token."""
    size = draw(st.integers(0, max_nodes))
    parents, tokens = [], []
    for node in range(size):
        parent = draw(st.integers(-1, node - 1))
        taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
        free = [t for t in range(vocab) if t not in taken]
        if distinct and not free:
            parent, free = node - 1, list(range(vocab))  # the node before has no child yet
        parents.append(parent)
        tokens.append(draw(st.sampled_from(free if distinct else range(vocab))))
    return DraftTree(
        np.array(tokens, np.int32), np.array(parents, np.int32), np.ones(size, np.int32)
    )


def brute_walk(tree: DraftTree, predicted, node: int = ROOT) -> list[int]:
    for child in range(len(tree.tokens)):
        if tree.parents[child] == node and tree.tokens[child] == predicted[node + 1]:
            return [child, *brute_walk(tree, predicted, child)]
    return []


@given(tree=trees(), data=st.data())
@settings(max_examples=200, deadline=None)
def test_walk_follows_the_target(tree, data) -> None:
    size = len(tree.tokens)
    predicted = np.array(
        data.draw(st.lists(st.integers(0, 2), min_size=size + 1, max_size=size + 1)), np.int64
    )
    path = np.full(size, -7, np.int32)
    length = walk(tree.tokens, tree.parents, size, predicted, path)
    assert path[:length].tolist() == brute_walk(tree, predicted)
    assert (path[length:] == -7).all()
    for cut in range(size + 1):  # the scheduler may cut the list anywhere
        part = tree.prefix(cut)
        shorter = np.empty(cut, np.int32)
        n = walk(part.tokens, part.parents, cut, predicted, shorter)
        assert shorter[:n].tolist() == [node for node in path[:length] if node < cut]


def test_walk_takes_one_of_two_equal_siblings() -> None:
    tokens, parents = np.array([5, 5, 6], np.int32), np.array([-1, -1, 1], np.int32)
    path = np.empty(3, np.int32)
    assert walk(tokens, parents, 3, np.array([5, 6, 6, 0]), path) == 1
    assert path[0] == 0


@st.composite
def forests(draw):
    """Row parents of some requests, long ones included, and the first row of each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 5, 31, 32, 33, 64, 65, 130]), max_size=5))
    back = draw(st.sampled_from([1, 3, 200]))  # 1: chains
    parents = []
    for size in sizes:
        for row in range(size):
            lonely = row == 0 or rng.random() < 0.05
            parents.append(-1 if lonely else rng.integers(max(0, row - back), row))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return np.array(parents, np.int32), starts


@given(forest=forests())
@settings(max_examples=40, deadline=None)
def test_ancestor_mask_is_the_transitive_closure(forest) -> None:
    parents, starts = forest
    widest = int(np.diff(starts).max(initial=0))
    words = -(-widest // 32) + 1
    mask = np.zeros((len(parents), words), np.int32)
    ancestor_mask(parents, starts, mask)
    bits = np.unpackbits(mask.view(np.uint8), axis=1, bitorder="little").astype(bool)
    depth = np.full(len(parents), -7, np.int64)
    depths(parents, starts, depth)
    for first, end in pairwise(starts):
        n = end - first
        if n == 0:
            continue
        closure = np.zeros((n, n), bool)
        for row in range(n):
            at = row
            while at >= 0:
                closure[row, at] = True
                at = parents[first + at]
        assert (bits[first:end, :n] == closure).all()
        assert not bits[first:end, n:].any()
        assert (depth[first:end] == closure.sum(1) - 1).all()


def test_chain_and_prefix() -> None:
    chain = DraftTree.chain([4, 5, 6])
    assert chain.tokens.tolist() == [4, 5, 6]
    assert chain.parents.tolist() == [-1, 0, 1]
    assert chain.sources.tolist() == [NodeSource.DRAFT] * 3
    assert [a.dtype for a in chain[:3]] == [np.int32] * 3
    assert chain.kinds is chain.prefix(2).kinds is None
    assert chain.is_chain
    assert DraftTree.chain([]).is_chain
    assert [a.tolist() for a in chain.prefix(2)[:3]] == [[4, 5], [-1, 0], [1, 1]]
    assert chain._replace(kinds=np.array([7, 8, 9])).prefix(2).kinds.tolist() == [7, 8]


@given(tree=trees())
@settings(max_examples=100, deadline=None)
def test_is_chain_means_no_branch(tree) -> None:
    children = [tree.parents.tolist().count(node) for node in range(-1, len(tree.parents))]
    # parent first and one child each: the only such tree of n nodes is the chain
    assert tree.is_chain == (max(children) <= 1)
    for size in range(len(tree.parents) + 1):
        cut = tree.prefix(size)
        assert [len(a) for a in cut[:3]] == [size] * 3
        assert (cut.parents < np.arange(size)).all()
