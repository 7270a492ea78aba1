"""Compaction of accepted KV against its oracle: bit by bit, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_ouroboros.kernels import reference
from vllm_ouroboros.kernels.kv_compact import kv_compact, kv_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8]


def caches(
    layout: str, layers: int, blocks: int, page: int, heads: int, dim: int, dtype, seed: int
):
    """Keys and values of each layer, with every byte of their memory random."""
    generator = torch.Generator().manual_seed(seed)
    shape = {
        "halves": (blocks, 2, page, heads, dim),
        "heads first": (blocks, 2, heads, page, dim),
        "interleaved": (blocks, page, heads, 2 * dim),
    }[layout]
    whole = []
    for _ in range(layers):
        size = torch.empty(shape, dtype=dtype).nbytes
        data = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        whole.append(data.view(dtype).view(shape))
    return whole


def views(layout: str, whole: list[torch.Tensor]):
    if layout == "interleaved":
        dim = whole[0].shape[-1] // 2
        return [w[..., :dim] for w in whole], [w[..., dim:] for w in whole]
    if layout == "heads first":
        return [w[:, 0].transpose(1, 2) for w in whole], [w[:, 1].transpose(1, 2) for w in whole]
    return [w[:, 0] for w in whole], [w[:, 1] for w in whole]


def check(device, path, contexts, *, page=4, layout="halves", layers=2, heads=2, dim=16,
          dtype=torch.float32, seed=0, **blocks) -> bool:  # fmt: skip
    """Compare, and say whether something was moved."""
    path = torch.tensor(path, dtype=torch.int32)
    lens = torch.tensor(contexts, dtype=torch.int32)
    pages = max((max(contexts) + int(path.max()) + path.shape[1] + 2) // page + 1, 1)
    count = pages * len(contexts)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(count, generator=generator).view(len(contexts), pages).to(torch.int32)
    start = caches(layout, layers, count, page, heads, dim, dtype, seed)
    wanted = [w.clone() for w in start]
    reference.kv_compact(*views(layout, wanted), path, lens, table)
    got = [w.clone().to(device) for w in start]
    table_of_layers = kv_layers(*views(layout, got))
    kv_compact(table_of_layers, path.to(device), lens.to(device), table.to(device), **blocks)
    for own, other in zip(got, wanted, strict=True):
        assert torch.equal(own.cpu().view(torch.uint8), other.view(torch.uint8))
    return not all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(start, wanted, strict=True)
    )


@st.composite
def paths(draw) -> list[list[int]]:
    """Ascending rows, the k-th of them at least k, padded with -1."""
    depth = draw(st.integers(1, 20))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 9]), max_size=depth))
        own = [sum(steps[: i + 1]) for i in range(len(steps))]
        rows.append(own + [-1] * (depth - len(own)))
    return rows


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=paths(),
    contexts=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    page=st.sampled_from([1, 3, 4, 16]),
    layout=st.sampled_from(["halves", "heads first", "interleaved"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_path(path, contexts, page, layout, dtype, seed, device) -> None:
    check(
        device, path, contexts[: len(path)], page=page, layout=layout, dtype=dtype, seed=seed,
        block_p=4, block_c=16,
    )  # fmt: skip


@pytest.mark.parametrize("block_p", [1, 2, 4, 32])
def test_targets_that_are_sources_of_later_rows(block_p, device) -> None:
    """Each row moves one place down, on the one that moved just before: a whole chain at once."""
    assert check(device, [[*range(2, 20)]], [6], block_p=block_p)


def test_nothing_to_move(device) -> None:
    assert not check(device, [[1, 2, 3], [-1, -1, -1]], [6, 0])


@pytest.mark.parametrize("dim, aligned", [(16, True), (20, True), (18, False)])
def test_alignment(dim, aligned, device) -> None:
    """Heads that start at no multiple of 16 bytes are moved, too."""
    whole = caches("halves", 1, 2, 4, 2, dim, torch.float32, 0)
    assert kv_layers(*views("halves", whole)).aligned is aligned
    assert check(device, [[2, 5, -1]], [3], dim=dim, heads=3)


def test_what_differs_is_refused() -> None:
    cache = torch.zeros(2, 4, 2, 16)
    with pytest.raises(ValueError, match="differ in shape"):
        kv_layers([cache], [cache.half()])
    with pytest.raises(ValueError, match="not contiguous"):
        kv_layers([cache.transpose(2, 3)], [cache.transpose(2, 3)])
    path = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"context_lens: torch\.int64"):
        kv_compact(kv_layers([cache], [cache]), path, torch.zeros(1, dtype=torch.int64), path)
