"""The argmax of bfloat16 rows is NumPy's of the same numbers, ties and odd values included."""

import numpy as np
import pytest
import torch

from vllm_ouroboros.verify.acceptance import greedy
from vllm_ouroboros.verify.cpu.argmax import argmax


def expected(logits: torch.Tensor) -> list[int]:
    return logits.float().numpy().argmax(-1).tolist()


@pytest.mark.parametrize("width", [1, 2, 1023, 1024, 1025, 49152])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_first_of_the_greatest_is_found(rows, width):
    torch.manual_seed(width)
    logits = torch.randn(rows, width).bfloat16()  # 8 bits of mantissa: the greatest often repeats
    assert argmax(logits).tolist() == expected(logits)
    assert argmax(-logits.abs() - 1).tolist() == expected(-logits.abs() - 1)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "row",
    [
        [-0.0, 0.0, -1.0],  # zeros are equal
        [-1.0, 0.0, -0.0],
        [-INF, -INF],
        [-INF, -3.0e38, -INF],
        [1.0, INF, INF],
        [1.0, NAN, INF],
        [1.0, INF, -NAN, NAN],
        [1e-40, 0.0, -1e-40],  # below the smallest normal number
    ],
)
def test_odd_numbers_order_as_in_numpy(row):
    logits = torch.tensor([row]).bfloat16()
    assert argmax(logits).tolist() == expected(logits)


def test_rows_far_from_each_other_in_memory():
    logits = torch.randn(6, 300).bfloat16()
    assert argmax(logits[::2, 3:]).tolist() == expected(logits[::2, 3:])
    assert argmax(logits.T).tolist() == expected(logits.T)
    assert argmax(logits[:0]).tolist() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_greedy_takes_it_for_bfloat16_and_agrees_elsewhere(dtype):
    logits = torch.randn(5, 999).to(dtype)
    assert np.array_equal(greedy(logits), logits.float().numpy().argmax(-1))
