"""Keys of the pool: large ids, several tokens in a row."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import CONTEXTS, FIRST_HASH, key_of
from vllm_ouroboros.phrases.insertion import insert_text
from vllm_ouroboros.phrases.pool import PhrasePool

from ..helpers.phrase_oracle import contents, times


def test_large_token_ids_and_scopes_are_distinct_keys() -> None:
    pool = PhrasePool(4096, 2, 2)
    keys = [(s, t) for s in (0, 1, 2**31 - 2) for t in (0, 1, 2**31 - 1)]
    for i, (scope, token) in enumerate(keys):
        pool.insert(token, [i], PhraseSource.PROMPT, scope)
    assert [pool.lookup(t, s) for s, t in keys] == [[(i,)] for i in range(len(keys))]


@given(
    text=st.lists(st.integers(0, 5), max_size=40),
    beta=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    contexts=st.integers(1, len(CONTEXTS)),
)
@settings(max_examples=150, deadline=None)
def test_a_text_fed_in_pieces_gives_the_phrases_of_the_whole(text, beta, cuts, contexts) -> None:
    """With room for all phrases, feeding piece by piece ends in the same phrases."""
    tokens, source = np.array(text, np.int32), int(PhraseSource.PROMPT)
    whole, pieces = PhrasePool(1024, 64, beta), PhrasePool(1024, 64, beta)
    insert_text(whole.arrays, 0, tokens, 0, len(text), source, 1, contexts)
    fed = 0
    for end in [*sorted(c for c in cuts if c < len(text)), len(text)]:
        insert_text(pieces.arrays, 0, tokens, fed, end, source, 1, contexts)
        fed = end
    expected = {key: sorted(phrases) for key, phrases in contents(whole).items()}
    assert {key: sorted(phrases) for key, phrases in contents(pieces).items()} == expected
    for i in range(len(text) - beta):
        phrase = tuple(text[i + 1 : i + 1 + beta])
        for context in range(contexts):
            if i + 1 >= CONTEXTS[context]:
                assert phrase in expected[0, key_of(tokens, i + 1, context)]
    seen = Counter(
        (key_of(tokens, i, context), text[i])
        for i in range(1, len(text))
        for context in range(contexts)
        if i >= CONTEXTS[context]
    )
    for pool in (whole, pieces):
        counted: Counter[tuple[int, int]] = Counter()
        for (_, key), phrases in contents(pool).items():
            for phrase, count in zip(phrases, times(pool)[0, key], strict=True):
                counted[key, phrase[0]] += count
        assert counted == seen, "a token that follows was not counted once each time"


IDS = st.one_of(st.integers(0, 40), st.integers(0, 2**31 - 1))


def key(*tokens: int) -> int:
    """Key of tokens in a row, as many as a context has."""
    return key_of(np.array(tokens, np.int32), len(tokens), CONTEXTS.index(len(tokens)))


@given(text=st.lists(IDS, min_size=CONTEXTS[-1], max_size=30))
@settings(max_examples=100, deadline=None)
def test_tokens_in_a_row_have_a_key_that_no_token_has(text) -> None:
    for context, length in enumerate(CONTEXTS):
        found = key(*text[-length:])
        assert found == key_of(np.array(text, np.int32), len(text), context)
        assert FIRST_HASH <= found < 2**32 if context else found == text[-1]


@pytest.mark.parametrize("length", CONTEXTS[1:])
def test_neighbours_have_keys_of_their_own(length) -> None:
    """In any order of the tokens; a few of many may share one."""
    rest = [7] * (length - 2)
    keys = {key(*rest, before, token) for before in range(100) for token in range(100)}
    keys |= {key(before, *rest, token) for before in range(100) for token in range(100)}
    assert len(keys) > (9_990 if length == 2 else 19_880)  # 100 are the same in both


def test_a_text_is_found_by_one_token_and_by_several() -> None:
    pool, text = PhrasePool(512, 3, 2), np.array([1, 2, 3, 9, 2, 4, 5], np.int32)
    insert_text(pool.arrays, 7, text, 0, len(text), int(PhraseSource.HISTORY), 1, 3)
    assert pool.lookup(2, 7) == [(4, 5), (3, 9)]
    assert pool.lookup(key(1, 2), 7) == [(3, 9)]
    assert pool.lookup(key(9, 2), 7) == [(4, 5)]
    assert pool.lookup(key(1, 2, 3, 9), 7) == [(2, 4)]
    assert pool.lookup(key(2, 1), 7) == []
    assert pool.lookup(key(4, 5), 7) == [], "nothing follows"
    assert pool.lookup(key(1, 2)) == [], "another scope"
    assert pool.inserted()["history"] == 6 + 5 + 3
