"""Products of tiles against numpy's, over the shapes that attention asks for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_ouroboros.verify.cpu.matmul_tile import LANES, ROWS, add_product


@pytest.mark.parametrize("bits", [np.uint16, np.uint32])
@given(
    rows=st.integers(1, 4),
    depth=st.integers(0, 33),
    lanes=st.integers(1, 9),
    short=st.integers(0, LANES - 1),
    start=st.integers(0, 40),
    gap=st.integers(0, 24),
    seed=st.integers(0, 2**16),
)
def test_it_adds_the_product_and_touches_nothing_else(
    bits, rows, depth, lanes, short, start, gap, seed
) -> None:
    rng = np.random.default_rng(seed)
    columns, stride = lanes * LANES - short, lanes * LANES + gap
    left = rng.standard_normal((rows * ROWS, depth + 3)).astype(np.float32)
    wide = rng.standard_normal(start + depth * stride + LANES * lanes).astype(np.float32)
    if bits is np.uint16:
        stored = (wide.view(np.uint32) >> 16).astype(np.uint16)
        wide = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = wide.view(np.uint32)
    out = rng.standard_normal((rows * ROWS, (lanes + 1) * LANES)).astype(np.float32)
    right = np.array([wide[start + k * stride :][: lanes * LANES] for k in range(depth)])
    product = left[:, :depth].astype(float) @ right.reshape(depth, lanes * LANES)
    expected = out.astype(float)
    expected[:, : lanes * LANES] += product
    got = out.copy()
    add_product(left, depth, stored, start, stride, columns, got)
    np.testing.assert_allclose(got[:, :columns], expected[:, :columns], rtol=1e-5, atol=1e-5)
    assert (got[:, lanes * LANES :] == out[:, lanes * LANES :]).all()
