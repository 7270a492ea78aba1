"""The oracle of tree attention against one loop over rows, heads and keys."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_ouroboros.kernels.reference import tree_attention, unpack_mask


def pack(seen: list[list[int]], words: int) -> torch.Tensor:
    """Bits of the visible rows, packed in plain integers."""
    rows = []
    for visible in seen:
        number = sum(1 << j for j in visible)
        parts = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(words)]
        rows.append([p - (1 << 32) if p >= 1 << 31 else p for p in parts])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 70])
def test_unpack_mask(width) -> None:
    generator = torch.Generator().manual_seed(width)
    wanted = torch.rand(5, width, generator=generator) < 0.5
    packed = pack([row.nonzero().flatten().tolist() for row in wanted], -(-width // 32))
    assert torch.equal(unpack_mask(packed, width), wanted)


def test_the_sign_bit_is_a_bit_like_any_other() -> None:
    assert unpack_mask(torch.tensor([[-(2**31), 1]], dtype=torch.int32), 64)[0].nonzero().flatten(
    ).tolist() == [31, 32]  # fmt: skip


def dense(q, k_new, v_new, requests, scale, soft_cap, window):
    """Softmax over explicit lists of visible keys, one row and head at a time."""
    out = torch.empty_like(q)
    group = q.shape[1] // k_new.shape[1]
    first = 0
    for keys, values, seen in requests:
        context = len(keys)
        for i, visible in enumerate(seen):
            row = first + i
            position = context + len(visible) - 1
            for h in range(q.shape[1]):
                scores, vectors = [], []
                for p in range(context):
                    if window is None or p > position - window:
                        scores.append(float(q[row, h] @ keys[p][h // group]) * scale)
                        vectors.append(values[p][h // group])
                for j in visible:
                    if window is None or context + len(seen[j]) - 1 > position - window:
                        scores.append(float(q[row, h] @ k_new[first + j, h // group]) * scale)
                        vectors.append(v_new[first + j, h // group])
                if soft_cap:
                    scores = [soft_cap * math.tanh(s / soft_cap) for s in scores]
                total = sum(math.exp(s) for s in scores)
                out[row, h] = sum(
                    math.exp(s) / total * v for s, v in zip(scores, vectors, strict=True)
                )
        first += len(seen)
    return out


# rows visible to each row: chains, branches, one row, more than one word
TREES = {
    "one": [[0]],
    "chain": [[0], [0, 1], [0, 1, 2]],
    "branches": [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 5]],
    "wide": [[0], *([0, j] for j in range(1, 40))],
}


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (6, 2)])
def test_tree_attention(window, soft_cap, heads, kv_heads) -> None:
    generator = torch.Generator().manual_seed(heads)
    block, dim, num_blocks = 4, 8, 12

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    cases = [("branches", 5), ("one", 0), ("wide", 8), ("chain", 3)]
    trees = [TREES[name] for name, _ in cases]
    total = sum(map(len, trees))
    q, k_new, v_new = (
        rand(total, heads, dim),
        rand(total, kv_heads, dim),
        rand(total, kv_heads, dim),
    )
    # interleaved pages: the caches are strided views
    pages = rand(num_blocks, 2, block, kv_heads, dim)
    key_cache, value_cache = pages[:, 0], pages[:, 1]
    free = torch.randperm(num_blocks, generator=generator).tolist()
    table = torch.zeros(len(cases), 3, dtype=torch.int32)
    requests = []
    for r, (name, context) in enumerate(cases):
        blocks = [free.pop() for _ in range(-(-context // block))]
        table[r, : len(blocks)] = torch.tensor(blocks)
        where = [(blocks[p // block], p % block) for p in range(context)]
        requests.append(
            ([key_cache[w] for w in where], [value_cache[w] for w in where], TREES[name])
        )
    starts = torch.tensor([0, *torch.tensor([len(t) for t in trees]).cumsum(0).tolist()])
    mask = torch.cat([pack(tree, 2) for tree in trees])
    scale = 0.7
    out = torch.full_like(q, float("nan"))
    tree_attention(
        q, k_new, v_new, key_cache, value_cache, table,
        torch.tensor([c for _, c in cases], dtype=torch.int32), starts.int(), mask, scale, out,
        soft_cap=soft_cap, sliding_window=window,
    )  # fmt: skip
    expected = dense(q, k_new, v_new, requests, scale, soft_cap, window)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


def test_a_window_of_one_leaves_the_row_itself() -> None:
    """Not even a sibling at the same position is seen: it is no ancestor."""
    q = k = torch.randn(3, 1, 4)
    v = torch.arange(3.0)[:, None, None].expand(3, 1, 4).contiguous()
    out = torch.empty(3, 1, 4)
    cache = torch.randn(2, 4, 1, 4)
    tree_attention(
        q, k, v, cache, cache, torch.zeros(1, 2, dtype=torch.int32), torch.tensor([5]),
        torch.tensor([0, 3]), pack([[0], [0, 1], [0, 2]], 1), 1.0, out, sliding_window=1,
    )  # fmt: skip
    assert torch.equal(out, v)
