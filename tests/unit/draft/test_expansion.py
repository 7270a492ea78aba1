"""Alternatives beside a head's chain, and the token after the likeliest of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vllm_ouroboros.draft.expansion import MAX_EXPANDED, MAX_PATHS, Expansion
from vllm_ouroboros.trees.node_kinds import NUM_KINDS
from vllm_ouroboros.trees.request_state import RequestState

from ..helpers.fake_draft import NUM_BLOCKS, FakeDraft
from ..helpers.fake_engine import Table, bound, make
from ..helpers.fakes import Language, node_paths


def state_with_chain() -> RequestState:
    """Two requests; the second has no chain yet."""
    state = RequestState.empty(2, 6, 2, 0)
    state.committed[:] = 10
    state.cached[:] = 13, 9
    state.chain_len[0] = 3
    state.confidence[0, :3] = 0.5, 0.8, 0.9
    state.alternatives[0, :3] = [[20, 21, -1], [22, 23, 24], [25, 26, 27]]
    state.alternative_probs[0, :3] = [[0.3, 0.1, 0.0], [0.1, 0.05, 0.02], [0.06, 0.01, 0.01]]
    return state


def chosen(state: RequestState, most: int, threshold: float, stops=()) -> list[tuple[int, int]]:
    found = Expansion.choose(state, np.array([0, 1]), most, threshold, np.array(stops, np.int32))
    assert not found.requests.any() and not found.slots.any()
    assert (found.lengths == 1 + (state.following[0, found.places, found.ranks] >= 0).sum(1)).all()
    return [*zip(found.places.tolist(), found.ranks.tolist(), strict=True)]


def test_the_likeliest_are_expanded_level_by_level() -> None:
    state = state_with_chain()
    # 0.3, 0.1 at the root; 0.5 * (0.1, 0.05, 0.02); 0.5 * 0.8 * (0.06, ...)
    assert chosen(state, 3, 0.0) == [(0, 0), (0, 1), (1, 0)]
    assert chosen(state, 9, 0.04) == [(0, 0), (0, 1), (1, 0)]
    assert chosen(state, 0, 0.0) == []
    assert chosen(state, 3, 0.0, stops=[20, 22]) == [(0, 1), (1, 1), (2, 0)]
    state.following[0, 0, 0, 0] = 5
    state.following_probs[0, 0, 0, 0] = 0.3  # 0.09 in all
    assert chosen(state, 3, 0.0) == [(0, 1), (0, 0), (1, 0)]
    assert chosen(state, 3, 0.0, stops=[5]) == [(0, 1), (1, 0), (1, 1)]
    state.following[0, 0, 0] = 5
    state.following_probs[0, 0, 0] = 1.0
    assert chosen(state, 2, 0.0) == [(0, 1), (1, 0)]  # that path is as long as may be


def test_so_many_of_each_request_are_kept() -> None:
    state = state_with_chain()
    found = Expansion.choose(state, np.array([0, 1]), 3, 0.0, np.array([], np.int32))
    assert found.first(2).places.tolist() == [0, 0] and found.first(0).rows == 0


def test_no_more_alternatives_than_have_room_are_expanded() -> None:
    state = state_with_chain()
    state.expanded[0, 2, 2] = MAX_PATHS - 1 - 2
    state.following[0, 2, 2, 0] = 9
    state.following_probs[0, 2, 2, 0] = 0.1
    assert len(chosen(state, 2, 0.0)) == 2
    assert chosen(state, 3, 0.0) == [(2, 2)]


def test_the_chain_before_an_alternative_must_be_in_the_kv_cache() -> None:
    state = state_with_chain()
    state.cached[0] = 11  # the first of the chain
    assert chosen(state, 9, 0.024) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    state.cached[0] = 9  # not even all of the text
    assert chosen(state, 9, 0.0) == []


class FakeHead(FakeDraft):
    reads_features = True


@pytest.mark.parametrize("seed", range(6))
def test_a_round_asks_what_follows_alternatives(monkeypatch, seed) -> None:
    """What comes back is the model's token after text, chain up to the place, and alternative."""
    head = FakeHead(Language(seed), 80)
    proposer = make(monkeypatch, head, window_size=0, adaptive=True, eos=99)
    blocks = Table(2, 80)
    blocks.table[:, :20] = np.arange(1, 41).reshape(2, 20)
    blocks.num_blocks_per_row[:] = 20
    batch = SimpleNamespace(
        req_ids=["a", "b"], num_computed_tokens_cpu=np.zeros(2, np.int32),
        block_table=[blocks], sampling_metadata=None,
    )  # fmt: skip
    bound(proposer, input_batch=batch, scheduled_tokens={"a": 9, "b": 14})
    rounds, drafting, state = proposer.rounds, proposer.drafting, proposer.drafting.state
    rounds.cache.allocate(NUM_BLOCKS)
    rounds.policy = SimpleNamespace(
        choose_drafted=lambda slots, *_: np.ones(len(slots), bool),
        continues_drafting=lambda slots, confidence, lengths, *_: lengths < 5,
        affords_rows=lambda *_: True, acceptance_threshold=lambda _: 0.0,
        observe_round=lambda *_: None, observe_drafting=lambda *_: None,
        costs=SimpleNamespace(observe_round=lambda *_: None),
    )  # fmt: skip
    text = np.random.default_rng(seed).integers(2, 8, (2, 80)).astype(np.int32)
    slots = np.array([drafting.add(), drafting.add()])
    for slot, length in zip(slots.tolist(), (9, 14), strict=True):
        drafting.start(slot, length, 10, 80)
    rounds.run(proposer.runner, [], slots, np.arange(2), text, {}, np.zeros(2))

    levels: list[int] = []
    for row, slot in enumerate(slots.tolist()):
        told = text[row, : state.committed[slot]].tolist()
        chain = state.chain[slot, : state.chain_len[slot]].tolist()
        for place in range(len(chain)):
            probs = np.exp(head.model.logits([*told, *chain[:place]]))
            assert state.confidence[slot, place] == pytest.approx(probs.max() / probs.sum(), 1e-4)
        for place, rank, level in np.argwhere(state.following[slot, : len(chain)] >= 0):
            path = [int(state.alternatives[slot, place, rank])]
            path += state.following[slot, place, rank, :level].tolist()
            logits = head.model.logits([*told, *chain[:place], *path])
            assert state.following[slot, place, rank, level] == np.argmax(logits)
            share = np.exp(logits.max()) / np.exp(logits).sum()
            assert state.following_probs[slot, place, rank, level] == pytest.approx(share, 1e-4)
            levels.append(int(level))
        used = state.expanded[slot, : len(chain)]
        assert sorted(used[used >= 0]) == list(range((used >= 0).sum()))
        assert ((used >= 0) == (state.following[slot, : len(chain), :, 0] >= 0)).all()
    assert len(levels) >= 2 * MAX_EXPANDED and max(levels) > 0

    rates = np.ones((2, NUM_KINDS)) * 0.5
    trees, _ = drafting.grow(slots, np.arange(2), text, rates, 0.01)
    deepest = 0
    for slot, tree in zip(slots.tolist(), trees, strict=True):
        chain = state.chain[slot, : state.chain_len[slot]].tolist()
        for path in node_paths(tree):
            place = next((i for i, t in enumerate(path) if chain[i : i + 1] != [t]), len(path))
            after = path[place + 1 :]
            if after:
                ranks = np.flatnonzero(state.alternatives[slot, place] == path[place])
                found = state.following[slot, place, ranks, : len(after)] == after
                deepest = max(deepest, len(after) * int(found.all(1).any()))
    assert deepest > 1
