"""Features that wait for a draft head, against a dictionary of all there ever were."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.draft.features import MAX_BYTES, TextFeatures


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_features_are_those_of_the_places_before(data) -> None:
    features, known = TextFeatures(1, 2, 4), {}
    place = read = data.draw(st.integers(0, 9))  # a cached prefix has no features
    for step in range(data.draw(st.integers(1, 8))):
        rows = torch.full((data.draw(st.integers(1, 5)), 2), float(step + 1))
        features.add(0, place, rows)
        known |= {place + i: step + 1 for i in range(len(rows))}
        place += len(rows)
        if data.draw(st.booleans()):  # the head reads what it may
            end = data.draw(st.integers(read, place + 1))
            found = features.before(0, read, end)
            wanted = [float(known.get(p - 1, 0)) for p in range(read, end)]
            if any(wanted):
                assert found is not None and found[:, 0].tolist() == wanted
            else:
                assert found is None or not found.any()
            read = end
            features.trim(0, read)
            assert features.waiting(0) == place - max(read - 1, min(known))
    features.forget(0)
    assert features.before(0, 0, 99) is None
    assert features.waiting(0) == 0


def test_places_that_come_again_have_the_new_features() -> None:
    """After a preemption, and of a new request in a slot."""
    features = TextFeatures(1, 1, 4)
    features.add(0, 0, torch.ones(6, 1))
    features.add(0, 4, torch.full((3, 1), 2.0))
    assert features.before(0, 1, 8)[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 2]
    features.add(0, 20, torch.full((2, 1), 3.0))  # not where the others end
    assert features.before(0, 19, 23)[:, 0].tolist() == [0, 0, 3, 3]


def test_a_text_that_nobody_reads_keeps_its_last_features() -> None:
    features = TextFeatures(2**10, 2**10, 4)
    assert features.most == MAX_BYTES // (2**22)
    for place in range(100):
        features.add(0, place, torch.full((1, 1), float(place)))
    assert features.waiting(0) == features.most + 1
    assert features.before(0, 99, 101)[:, 0].tolist() == [98, 99]
