"""One call of tree attention beside its oracle in float64, and trees to call it with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm_ouroboros.kernels import reference
from vllm_ouroboros.kernels.tree_attention import Launch, LaunchConfig, tree_attention

FP8 = torch.float8_e4m3fn
# Greatest error against float64 of unit normal K/V: weights and output are rounded to the type.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tree_mask(parents: list[list[int]], words: int | None = None) -> torch.Tensor:
    """Packed mask of trees, given by the parent of each row (-1: sees only itself)."""
    words = words or max(1, -(-max((len(tree) for tree in parents), default=1) // 32))
    rows = []
    for tree in parents:
        seen: list[int] = []
        for i, parent in enumerate(tree):
            seen.append((seen[parent] if parent >= 0 else 0) | 1 << i)
        rows += [[seen_by >> 32 * w & 0xFFFFFFFF for w in range(words)] for seen_by in seen]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, words).to(torch.int32)


def paged(layout: str, blocks: int, page: int, heads: int, dim: int) -> tuple[Any, Any, Any]:
    """A cache of NaN and its views of keys and values, in one of the layouts that engines have."""
    shape = {
        "apart": (2, blocks, page, heads, dim),
        "halves": (blocks, 2, page, heads, dim),  # vLLM's, tokens before heads
        "heads first": (blocks, 2, heads, page, dim),  # vLLM's, heads before tokens
        "interleaved": (blocks, page, heads, 2 * dim),
    }[layout]
    cache = torch.full(shape, float("nan"))
    if layout == "apart":
        return cache, cache[0], cache[1]
    if layout == "interleaved":
        return cache, cache[..., :dim], cache[..., dim:]
    if layout == "heads first":
        return cache, cache[:, 0].transpose(1, 2), cache[:, 1].transpose(1, 2)
    return cache, cache[:, 0], cache[:, 1]


@dataclass
class Case:
    """One call of the kernel."""

    parents: list[list[int]] = field(default_factory=lambda: [[-1, 0, 0, 1]])
    contexts: list[int] = field(default_factory=lambda: [9])
    heads: tuple[int, int] = (2, 1)
    dim: int = 16
    page: int = 4
    layout: str = "halves"
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    step_dtype: torch.dtype | None = None
    config: LaunchConfig | None = LaunchConfig(16, 16, 1)  # noqa: RUF009
    soft_cap: float = 0.0
    window: int | None = None
    words: int | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, device: str) -> Launch:
        """Compare the kernel with its oracle."""
        generator = torch.Generator().manual_seed(self.seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        heads, kv_heads = self.heads
        total = sum(map(len, self.parents))
        scale = self.dim**-0.5
        cache_dtype = self.cache_dtype or self.dtype
        step_dtype = self.step_dtype or self.dtype
        q = rand(total, heads, self.dim).to(self.dtype)
        k_new, v_new = (rand(total, kv_heads, self.dim).to(step_dtype) for _ in range(2))

        pages = [-(-context // self.page) for context in self.contexts]
        blocks = sum(pages) + 2
        cache, keys, values = paged(self.layout, blocks, self.page, kv_heads, self.dim)
        free = torch.randperm(blocks, generator=generator).tolist()
        table = torch.full((len(pages), max(pages, default=0) + 1), blocks + 1000)
        for r, count in enumerate(pages):
            own = [free.pop() for _ in range(count)]
            table[r, :count] = torch.tensor(own)
            for view in (keys, values):  # what no committed token stands in remains NaN
                for p in range(self.contexts[r]):
                    view[own[p // self.page], p % self.page] = rand(kv_heads, self.dim)
        place = cache.to(cache_dtype).to(device)
        keys, values = (
            torch.as_strided(place, view.shape, view.stride(), view.storage_offset())
            for view in (keys, values)
        )
        lengths = torch.tensor([0, *map(len, self.parents)]).cumsum(0).to(torch.int32)
        contexts = torch.tensor(self.contexts, dtype=torch.int32)
        mask = tree_mask(self.parents, self.words)
        table = table.to(torch.int32)
        factors = [torch.tensor([1.0]), torch.tensor([1.0])]
        scales: dict[str, Any] = {}
        if cache_dtype == FP8:
            factors = [torch.tensor([0.7]), torch.tensor([1.3])]
            scales = {
                name: factor.to(device)
                for name, factor in zip(("k_scale", "v_scale"), factors, strict=True)
            }
        out = torch.full((total + 1, heads, self.dim), float("nan"), dtype=self.dtype)
        out = out.to(device)
        launch = tree_attention(
            *(t.to(device) for t in (q, k_new, v_new)), keys, values,
            *(t.to(device) for t in (table, contexts, lengths, mask)), scale, out[:total],
            soft_cap=self.soft_cap, sliding_window=self.window, config=self.config, **scales,
            **self.options,
        )  # fmt: skip

        def exact(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            scaled = tensor.dtype == FP8
            return tensor.cpu().double() * (factor.double() if scaled else 1)

        expected = torch.empty(total, heads, self.dim, dtype=torch.float64)
        reference.tree_attention(
            q.double(), exact(k_new, factors[0]), exact(v_new, factors[1]),
            exact(keys, factors[0]), exact(values, factors[1]),
            table, contexts, lengths, mask, scale, expected,
            soft_cap=self.soft_cap, sliding_window=self.window,
        )  # fmt: skip
        tolerance = TOLERANCE[self.dtype]
        torch.testing.assert_close(
            out[:total].cpu().double(), expected, atol=tolerance, rtol=tolerance
        )
        assert out[total:].isnan().all()
        return launch


def chain(size: int) -> list[int]:
    return list(range(-1, size - 1))


def bush(size: int, seed: int = 0) -> list[int]:
    """A random tree."""
    generator = torch.Generator().manual_seed(seed)
    return [-1, *(int(torch.randint(i, (), generator=generator)) for i in range(1, size))][:size]


def random_trees(sizes: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row parents int32 [T] and query_start_loc int32 [R + 1] of random trees."""
    rng = np.random.default_rng(seed)
    parents = [[-1] + [int(rng.integers(0, i)) for i in range(1, n)] for n in sizes]
    return np.concatenate(parents).astype(np.int32), np.cumsum([0, *sizes]).astype(np.int32)
