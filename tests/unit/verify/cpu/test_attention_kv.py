"""Moving the KV of accepted rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ...helpers.attention_forward import Forward, chain, make_impl, random_tree


def read(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [slots, Hkv, D] of a layer's cache, as vLLM's "vec" kernels lay it out."""
    num_blocks, num_kv, block_size, double = cache.shape
    halves = cache.view(num_blocks, num_kv, 2, block_size * double // 2)
    keys = halves[:, :, 0].unflatten(-1, (double // 2, block_size))
    values = halves[:, :, 1].unflatten(-1, (block_size, double // 2))
    return keys.permute(0, 3, 1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("beside", [False, True])
def test_write_moves_rows_to_their_slots(vllm_config, beside, dtype) -> None:
    """All layers, rows that trade places included; every other slot stays as it was."""
    rng = np.random.default_rng(6)
    requests = [(30, random_tree(rng, 9), True), (64, random_tree(rng, 7), True)]
    if beside:
        requests.insert(1, (20, chain(4), False))
    forward = Forward(requests, dtype=dtype, isa="vec")
    impl, step = make_impl(4, 2, 32), forward.step()
    layers = [forward.layer("a"), forward.layer("b")]
    originals = []
    for i, on in enumerate(layers):
        forward.key, forward.value = forward.key + i, forward.value - i
        originals.append((forward.key.clone(), forward.value.clone()))
        forward.run(impl, step, on)
        # the forward's own tensors do not live on
        forward.key, forward.value = forward.key.clone(), forward.value.clone()
    before = [[t.clone() for t in read(on.cache)] for on in layers]

    # (request of the step, tree row, position): 3 -> 1, 7 -> 3, 1 -> 7 overlap
    moves = [(0, 3, 31), (0, 7, 33), (0, 1, 37), (1, 9 + 5, 65), (1, 9 + 1, 69)]
    step.write(torch.tensor(moves))
    second = int(forward.starts[-2])
    for on, (key, value), (keys, values) in zip(layers, originals, before, strict=True):
        for r, row, position in moves:
            of_step = len(requests) - 1 if r else 0
            block = int(forward.table[of_step, position // forward.block])
            slot = block * forward.block + position % forward.block
            source = row if r == 0 else second + row - 9
            keys[slot], values[slot] = key[source], value[source]
        now = read(on.cache)
        assert torch.equal(now[0], keys)
        assert torch.equal(now[1], values)


def test_kept_rows_are_copies(vllm_config) -> None:
    """The memory of a forward's tensors may be used again before the rows move."""
    for requests in (
        [(30, random_tree(np.random.default_rng(6), 9), True)],
        [(30, random_tree(np.random.default_rng(6), 9), True), (3, chain(2), False)],
    ):
        forward = Forward(requests)
        impl, step, on = make_impl(4, 2, 32), forward.step(), forward.layer("a")
        forward.run(impl, step, on)
        key = forward.key[5].clone()
        forward.key.zero_()
        forward.value.zero_()
        step.write(torch.tensor([(0, 5, 33)]))
        slot = int(forward.table[0, 1]) * forward.block + 1
        assert torch.equal(read(on.cache)[0][slot], key)


def test_write_without_moves_or_without_a_forward(vllm_config) -> None:
    forward = Forward([(30, random_tree(np.random.default_rng(6), 9), True)])
    step = forward.step()
    step.write(torch.tensor([(0, 3, 31)]))  # nothing was run
    on = forward.layer("a")
    forward.run(make_impl(4, 2, 32), step, on)
    before = on.cache.clone()
    step.write(torch.empty(0, 3, dtype=torch.int64))
    assert torch.equal(on.cache, before)
