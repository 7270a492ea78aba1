"""Arrays that go to a device together."""

from __future__ import annotations

import numpy as np
import torch

from vllm_ouroboros.verify.host_arrays import layout, pack, to_device, unpack

ARRAYS = (
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.empty((0, 4), np.int32),
    np.array([9], np.int32),
    np.arange(8, dtype=np.float32).reshape(2, 4).T,
)


def test_arrays_are_packed_and_unpacked() -> None:
    starts, size = layout(ARRAYS)
    assert starts == [0, 48, 48, 64] and size == 96  # each begins at 16 bytes
    packed = pack(torch.full((size,), 255, dtype=torch.uint8), ARRAYS, starts)
    for got, array in zip(unpack(packed, ARRAYS, starts), ARRAYS, strict=True):
        assert got.numpy().dtype == array.dtype
        assert got.tolist() == array.tolist()


def test_arrays_on_the_cpu_stay_where_they_are() -> None:
    array = np.arange(3)
    one, two = to_device(torch.device("cpu"), array, ARRAYS[3])
    array[0] = 7
    assert one.tolist() == [7, 1, 2]
    assert two.tolist() == ARRAYS[3].tolist()
