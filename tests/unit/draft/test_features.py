"""Features that wait for a draft head, against a dictionary of all there ever were."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.draft.expansion import MAX_PATHS
from vllm_ouroboros.draft.features import MAX_BYTES, HeadFeatures
from vllm_ouroboros.trees.request_state import NUM_FOLLOWING


def make(requests: int = 1, longest: int = 60, hidden: int = 2) -> HeadFeatures:
    return HeadFeatures(requests, longest, 5, hidden, torch.float32, "cpu")


def add(features: HeadFeatures, slot: int, first: int, rows: torch.Tensor) -> None:
    every = np.arange(len(rows))
    places = features.place(np.array([slot]), np.array([first]), np.array([len(rows)]), every)
    features.store(rows, *places)


def before(features: HeadFeatures, slot: int, first: int, end: int) -> list[float]:
    places = np.arange(first, end)
    slots = np.full(len(places), slot)
    rows = torch.from_numpy(features.before(slots, places))
    return features.read_text(rows, features.beyond(slots, places))[:, 0].tolist()


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_features_are_those_of_the_places_before(data) -> None:
    """Of two requests, in rings of 60 and of few places."""
    features = make(2, data.draw(st.sampled_from((4, 60))))
    known: tuple[dict[int, int], dict[int, int]] = ({}, {})
    place = np.array(data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9))))
    read = place.copy()  # a cached prefix has no features
    value, rng = 0, np.random.default_rng(0)
    for _ in range(data.draw(st.integers(1, 8))):
        slots = np.array(data.draw(st.sampled_from(([0], [1], [0, 1], [1, 0]))))
        counts = np.array([data.draw(st.integers(1, 7)) for _ in slots])
        rows = value + 1 + torch.arange(counts.sum())[:, None].expand(-1, 2).float()
        order = rng.permutation(len(rows))  # in whatever rows of a forward they are
        places = features.place(slots, place[slots], counts, order)
        features.store(rows[np.argsort(order)], *places)
        for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
            for i in range(count):
                value += 1
                known[slot][int(place[slot]) + i] = value
            for old in [
                p for p in known[slot] if p < min(place[slot], place[slot] + count - features.most)
            ]:
                del known[slot][old]
            place[slot] += count
        slot = data.draw(st.integers(0, 1))
        if slot in slots and data.draw(st.booleans()):  # the head reads what it may
            end = data.draw(st.integers(int(read[slot]), int(place[slot]) + 1))
            wanted = [float(known[slot].get(p - 1, 0)) for p in range(read[slot], end)]
            assert before(features, slot, int(read[slot]), end) == wanted
            read[slot] = end
            features.trim(slot, end)
            oldest = max(end - 1, min(known[slot]))
            assert features.waiting(slot) == place[slot] - oldest
    features.forget(0)
    assert not any(before(features, 0, 0, 99)) and features.waiting(0) == 0


def test_places_that_come_again_have_the_new_features() -> None:
    """After a preemption, and of a new request in a slot."""
    features = make()
    add(features, 0, 0, torch.ones(6, 2))
    add(features, 0, 4, torch.full((3, 2), 2.0))
    assert before(features, 0, 1, 8) == [1, 1, 1, 1, 2, 2, 2]
    add(features, 0, 20, torch.full((2, 2), 3.0))  # not where the others end
    assert before(features, 0, 19, 23) == [0, 0, 3, 3]
    add(features, 0, 0, torch.ones(1, 2))
    assert before(features, 0, 0, 4) == [0, 1, 0, 0]


def test_a_text_that_nobody_reads_keeps_its_last_features() -> None:
    features = HeadFeatures(2**9, 2**20, 5, 2**10, torch.float32, "cpu")
    assert features.most == MAX_BYTES // 2**21
    for place in range(100):
        add(features, 7, place, torch.full((1, 2**10), float(place)))
    assert features.waiting(7) == features.most
    assert before(features, 7, 99, 101) == [98, 99]


def test_each_place_of_chains_and_paths_has_a_row() -> None:
    """Of three requests with chains of up to 5; places that none can have share one."""
    features = make(3)
    slots, places = (a.ravel() for a in np.meshgrid(np.arange(3), np.arange(6)))
    of_chains = features.of_chain(slots, places)
    every = np.meshgrid(np.arange(3), np.arange(MAX_PATHS), np.arange(NUM_FOLLOWING - 1))
    of_paths = features.of_paths(*(a.ravel() for a in every))
    of_text = features.before(np.zeros(1, np.int64), np.zeros(1, np.int64))
    rows = np.concatenate([of_chains, of_paths, of_text, [features.nowhere]])
    assert len(set(rows.tolist())) == len(rows) and rows.min() >= 3 * features.most
    slot = np.zeros(2, np.int64)
    assert (features.of_chain(slot, np.array([-1, 6])) == features.nowhere).all()
    far = features.of_paths(slot, slot, np.array([-1, NUM_FOLLOWING - 1]))
    assert (far == features.nowhere).all()
    features.keep(torch.from_numpy(of_chains), torch.arange(18.0)[:, None].expand(-1, 2))
    assert features.read(torch.from_numpy(of_chains))[:, 0].tolist() == [*range(18)]
