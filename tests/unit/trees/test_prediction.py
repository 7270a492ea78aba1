"""Following what a request is predicted to say, and trees along it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.contexts import CONTEXTS
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.draft_tree import NodeSource
from vllm_ouroboros.trees.drafting import Drafting
from vllm_ouroboros.trees.node_kinds import NUM_KINDS
from vllm_ouroboros.trees.prediction import SURE_RUN, follow

PROMPT = [90, 91, 92]


class Text:
    """A request whose text grows, with a prediction."""

    def __init__(self, predicted: list[int], budget: int = 16, stops: tuple[int, ...] = ()) -> None:
        pool = PhrasePool(64, 2, 4)
        self.drafting = Drafting(
            pool, max_requests=2, budget=budget, draft_tokens=8, num_suffixes=2, window_size=2,
            max_len=512, stops=stops, contexts=len(CONTEXTS),
        )  # fmt: skip
        self.slot = self.drafting.add()
        self.drafting.predict(self.slot, np.array(predicted, np.int32), len(PROMPT))
        self.text = [*PROMPT]

    @property
    def row(self) -> np.ndarray:
        row = np.zeros((1, 512), np.int32)
        row[0, : len(self.text)] = self.text
        return row

    def write(self, *tokens: int) -> int | None:
        """Write on; the token that should come next, if it is known."""
        self.text += tokens
        state = self.drafting.state
        follow(state, self.slot, self.row[0], len(self.text))
        place = int(state.predicted_at[self.slot])
        found = state.predicted[self.slot, : state.predicted_len[self.slot]]
        return int(found[place]) if place < len(found) else None

    @property
    def run(self) -> int:
        return int(self.drafting.state.predicted_run[self.slot])

    def trees(self, adaptive: bool, chain: tuple[int, ...] = (), **start):
        """The tree that is made now, behind a drafted chain."""
        slots = np.array([self.slot])
        self.drafting.start(self.slot, len(self.text), 16, 512, **start)
        self.drafting.state.chain[self.slot, : len(chain)] = chain
        self.drafting.state.chain_len[self.slot] = len(chain)
        self.drafting.state.confidence[self.slot] = 0.9
        if adaptive:
            rates = np.full((1, NUM_KINDS), 0.9)
            return self.drafting.grow(slots, slots * 0, self.row, rates, 0.001)[0][0]
        self.drafting.build(slots, slots * 0, self.row)
        return self.drafting.tree(self.slot)


def test_a_text_that_goes_as_predicted() -> None:
    text = Text([1, 2, 3, 4, 5])
    assert text.write() == 1
    assert text.write(1) == 2
    assert text.write(2, 3) == 4
    assert text.run == 3
    assert text.write(4, 5) is None
    assert text.write(6) is None


def test_something_before_the_prediction() -> None:
    text = Text([1, 2, 3, 4, 5])
    assert text.write(70, 71) == 1
    assert text.write(72) == 1
    assert text.write(1, 2) == 3


def test_one_token_in_the_place_of_another() -> None:
    text = Text([1, 2, 3, 4, 5, 6])
    text.write(1, 2)
    assert text.write(70) == 4
    assert text.run == 0
    assert text.write(4) == 5


@pytest.mark.parametrize("lost", [(5, 6), (70, 71, 5, 6), (3, 4, 70, 5, 6)], ids=str)
def test_the_place_is_found_again(lost) -> None:
    """After words that are left out, replaced or put in."""
    text = Text([1, 2, 3, 4, 5, 6, 7, 8])
    text.write(1, 2)
    assert text.write(*lost) == 7
    assert text.write(7) == 8


def test_of_places_alike_the_nearest_one() -> None:
    line = [10, 11, 12]
    text = Text([*line, 1, *line, 2, *line, 3])
    text.write(*line, 1, *line)
    assert text.write(70) is not None  # lost in the second of them
    assert text.write(*line) == 3, "three tokens on, where the third one ends"


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=6),
)
@settings(max_examples=150, deadline=None)
def test_step_by_step_or_at_once(predicted, steps) -> None:
    """Where the text follows for some tokens, the place is one behind which it does."""
    text = Text(predicted)
    for tokens in steps:
        text.write(*tokens)
        state = text.drafting.state
        place, run = int(state.predicted_at[text.slot]), text.run
        assert place >= 0
        if run:
            assert predicted[place - run : place] == text.text[len(text.text) - run :]
    once = Text(predicted)
    once.write(*[token for tokens in steps for token in tokens])
    if text.run > 1:  # one token alone may stand anywhere: no place is looked for by it
        assert once.run >= min(text.run, SURE_RUN), "what is sure step by step is sure at once"


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_tree_along_the_prediction(adaptive) -> None:
    text = Text([1, 2, 3, 4, 5, 6, 7])
    text.text += [1, 2]
    tree = text.trees(adaptive)
    assert tree.tokens.tolist() == [3, 4, 5, 6, 7]
    assert tree.is_chain
    assert set(tree.sources.tolist()) == {NodeSource.PREDICTION}
    [token] = text.trees(adaptive, chain_only=True).tokens[:1]
    assert token == 3


@pytest.mark.parametrize("adaptive", [False, True])
def test_beside_a_drafted_chain(adaptive) -> None:
    text = Text([1, 2, 3, 4, 5, 6, 7])
    text.text += [1, 2]
    tree = text.trees(adaptive, chain=(3, 80, 81))
    assert {(3, NodeSource.DRAFT), (80, NodeSource.DRAFT), (4, NodeSource.PREDICTION)} <= {
        *zip(tree.tokens.tolist(), tree.sources.tolist(), strict=True)
    }
    chain = text.trees(adaptive, chain=(80, 81), chain_only=True)
    assert chain.is_chain


@pytest.mark.parametrize("chain_only", [False, True])
def test_what_the_text_has_followed_comes_first(chain_only) -> None:
    """Before a drafted chain, and phrases, that would fill the tree."""
    said = [*range(1, 40)]
    text = Text(said)
    text.drafting.pool.insert(5, [60, 61, 62], PhraseSource.PROMPT)
    text.text += said[:5]
    tree = text.trees(False, chain=(6, 80, 81), chain_only=chain_only)
    assert tree.tokens.tolist() == said[5 : 5 + 16]
    assert set(tree.sources.tolist()) == {NodeSource.PREDICTION}
    text.text += [70]  # it has left the prediction: what is drafted comes first again
    tree = text.trees(False, chain=(6, 80, 81), chain_only=chain_only)
    assert tree.tokens[:3].tolist() == [6, 80, 81]


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_tree_beyond_the_end_of_a_text(adaptive) -> None:
    text = Text([1, 2, 9, 4, 5], stops=(9,))
    text.text += [1]
    assert text.trees(adaptive).tokens.tolist() == [2, 9]


def test_a_slot_forgets_its_prediction() -> None:
    text = Text([1, 2, 3])
    text.drafting.release(text.slot)
    assert text.drafting.add() == text.slot
    text.text += [1]
    assert not len(text.trees(False).tokens)


def test_a_longer_prediction_than_any_before() -> None:
    text = Text([1, 2, 3])
    other = text.drafting.add()
    text.drafting.predict(other, np.arange(100, dtype=np.int32), 0)
    state = text.drafting.state
    assert state.predicted[text.slot, :3].tolist() == [1, 2, 3]
    assert state.predicted[other, :100].tolist() == [*range(100)]
