"""The union of pool rows, against dictionaries."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.phrases.merging import union, unknown

PHRASES = st.lists(
    st.tuples(
        st.integers(-9, 5), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 9)
    ),
    max_size=30,
    unique_by=lambda row: (row[0], tuple(row[1])),
)


def rows_of(phrases, width: int) -> dict[str, np.ndarray]:
    tokens = np.zeros((len(phrases), width), np.int32)
    for row, (_, phrase, _) in enumerate(phrases):
        tokens[row, : len(phrase)] = phrase
    return {
        "keys": np.array([key for key, _, _ in phrases], np.int32),
        "lengths": np.array([len(phrase) for _, phrase, _ in phrases], np.int32),
        "sources": np.zeros(len(phrases), np.int8),
        "times": np.array([times for _, _, times in phrases], np.uint8),
        "tokens": tokens,
    }


def phrases_of(rows) -> list[tuple[int, tuple[int, ...], int]]:
    return [
        (int(key), tuple(tokens[:length].tolist()), int(times))
        for key, length, times, tokens in zip(
            rows["keys"], rows["lengths"], rows["times"], rows["tokens"], strict=True
        )
    ]


@given(PHRASES, PHRASES, st.booleans())
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_and_nothing_counts_twice(ours, theirs, news) -> None:
    """With room for all; what this engine has keeps its order."""
    found = phrases_of(union(rows_of(ours, 3), rows_of(theirs, 5), 99, 99, news=news))
    seen: dict[tuple, int] = {}
    for key, phrase, times in (*ours, *theirs):
        seen[key, tuple(phrase)] = max(times, seen.get((key, tuple(phrase)), 0))
    assert {(key, phrase): times for key, phrase, times in found} == seen
    assert len(found) == len(seen)
    own = [(key, tuple(phrase)) for key, phrase, _ in ours]
    order = [one for one in ((key, phrase) for key, phrase, _ in found) if one in own]
    assert order == own
    if not news:
        assert [one[:2] for one in found][len(found) - len(own) :] == own
    new = phrases_of(unknown(rows_of(ours, 3), rows_of(theirs, 5)))
    assert new == [
        (key, tuple(phrase), times)
        for key, phrase, times in theirs
        if (key, tuple(phrase)) not in own
    ]


@given(PHRASES, PHRASES, st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_what_was_used_last_is_kept(ours, theirs, keys, phrases) -> None:
    given = rows_of(ours, 3), rows_of(theirs, 3)
    everything = phrases_of(union(*given, 99, 99, news=True))
    last: dict[int, list] = {}
    for row in reversed(everything):
        if row[0] in last or len(last) < keys:
            last.setdefault(row[0], []).append(row)
    wanted = [row for row in everything if row in last.get(row[0], [])[:phrases]]
    assert phrases_of(union(*given, keys, phrases, news=True)) == wanted
