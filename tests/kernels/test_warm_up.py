"""What is compiled before requests come is all that steps launch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_ouroboros.kernels.launch import GPU, power_of_two
from vllm_ouroboros.kernels.tuned import Shape, best_config
from vllm_ouroboros.verify.cuda import acceptance, warm_up
from vllm_ouroboros.verify.cuda import attention as cuda_attention
from vllm_ouroboros.verify.cuda.attention import TreeRows

MAX_LEN, PAGE, BLOCKS = 8192, 16, 4


def variant(rows: int, queries: int, context: int, group: int) -> tuple:
    """What a launch of attention compiles, by its sizes alone."""
    shape = Shape(64, group, 2, PAGE, 2, rows, queries, context)
    found = best_config(GPU("no such GPU"), shape)
    merged = power_of_two(found.num_splits) if found.num_splits > 1 else 0
    return found.block_m, found.block_n, found.num_warps, found.num_stages, merged


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("width", [5, 27, 40])
def test_no_step_needs_another_variant(width, group) -> None:
    warm = [variant(n, n, c, group) for n, c in warm_up.sizes(width, MAX_LEN)]
    rng = np.random.default_rng(0)
    for _ in range(500):
        lengths = rng.integers(1, width + 1, rng.integers(1, 65))
        context = int(rng.integers(0, MAX_LEN))
        rows, queries = int(lengths.sum()), int(lengths.max())
        *attend, merged = variant(rows, queries, context, group)
        assert any(attend == [*one[:4]] and bool(merged) == bool(one[4]) for one in warm)
        assert merged in {one[4] for one in warm}


class Impl(TreeRows):
    """As much of an implementation as its launches need."""

    def __init__(self) -> None:
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = 4, 2, 16, 1.0
        self.logits_soft_cap, self.sliding_window, self.kv_cache_dtype = 0.0, (7, 0), "auto"


def test_launches_of_a_layer_run(device, monkeypatch) -> None:
    """On a cache with something in it, which stays as it was; layers that are alike count once."""
    calls = []
    attend = cuda_attention.tree_attention

    def counted(*args, **kwargs):
        calls.append((len(args[0]), kwargs["max_context_len"]))
        return attend(*args, **kwargs)

    monkeypatch.setattr(cuda_attention, "tree_attention", counted)
    kv = torch.rand(BLOCKS, 2, PAGE, 32, device=device)
    before = kv.clone()
    layer = SimpleNamespace(impl=Impl(), kv_cache=kv, dtype=torch.float32)
    warm_up.warm_up_attention([layer, layer], 3, 40, torch.device(device))
    assert calls == [*warm_up.sizes(3, 40)]
    assert torch.equal(kv, before)


def test_walks_of_all_steps_are_alike(device, monkeypatch) -> None:
    shapes = []
    monkeypatch.setattr(acceptance, "choose_tokens", lambda *args: None)
    monkeypatch.setattr(
        acceptance, "accept_trees",
        lambda *args, stops: shapes.append((args[4].shape[1], args[6].shape[1], stops.shape[1])),
    )  # fmt: skip
    warm_up.warm_up_acceptance(50, 26, torch.float32, torch.device(device))
    logits = torch.zeros(3, 50, device=device)
    stops = [frozenset({1}), frozenset({1, 2, 3})]
    acceptance.walk_on_device(logits, np.array([0, 2]), [None, None], stops, 26)
    assert shapes == [(26, 27, 4)] * 2
