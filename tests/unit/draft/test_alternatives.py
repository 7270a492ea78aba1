"""What the logits of a round say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_ouroboros.draft import alternatives
from vllm_ouroboros.draft.alternatives import Choices, top_alternatives
from vllm_ouroboros.trees.request_state import NUM_ALTERNATIVES


@pytest.mark.parametrize("at_once", [2, 5])
def test_the_draft_model_says_what_it_thinks_of(monkeypatch, at_once) -> None:
    monkeypatch.setattr(alternatives, "ROWS_AT_ONCE", at_once)
    logits = torch.stack([torch.randperm(7) for _ in range(5)]).bfloat16()  # no ties
    first, odds = top_alternatives(logits)
    wanted = logits.float().softmax(-1).topk(NUM_ALTERNATIVES + 1)
    np.testing.assert_allclose(odds, wanted.values, rtol=1e-5)
    assert (first[:, 0] == logits.argmax(-1).numpy()).all()
    assert top_alternatives(logits[:, :2])[0].shape == (5, 2)


@pytest.mark.parametrize("short", [False, True])
def test_choices_are_the_same_at_once(short) -> None:
    """Of 3 rows the most probable token, of any the alternatives, in a short vocabulary or not."""
    logits = torch.stack([torch.randperm(9) for _ in range(5)]).float()
    ids = np.arange(9) * 11 + 4 if short else None
    one, two = (Choices(logits, 3, ids, at_once=at_once) for at_once in (False, True))
    best = logits[:3].argmax(-1).numpy()
    expected = best if ids is None else ids[best]
    assert one.tokens.tolist() == two.tokens.tolist() == expected.tolist()
    for rows in (np.array([4, 0, 3]), np.empty(0, np.int64)):
        first, second = one.alternatives(rows), two.alternatives(rows)
        assert (
            first[0].tolist()
            == second[0].tolist()
            == top_alternatives(logits, ids)[0][rows].tolist()
        )
        np.testing.assert_allclose(first[1], second[1])
