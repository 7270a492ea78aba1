"""Inputs of tree attention at engines' shapes: random trees over a random paged cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from vllm_ouroboros.kernels.tuned import Shape

PAGE = 16  # vLLM's block size on CUDA
MODELS = {  # query heads, KV heads, head size
    "llama-8b": (32, 8, 128),
    "qwen2.5-32b": (40, 8, 128),
    "qwen3-32b": (64, 8, 128),
    "llama-70b-tp8": (8, 1, 128),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Greatest error against float64 of unit normal K/V; the tests' for the 16-bit types."""


@dataclass(frozen=True)
class Cell:
    """One step: ``batch`` requests of ``nodes`` rows behind ``context`` committed tokens."""

    model: str
    context: int
    batch: int
    nodes: int
    dtype: str = "bfloat16"

    @property
    def heads(self) -> tuple[int, int, int]:
        return MODELS[self.model]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def pages(self) -> int:
        """Pages of a request, with room for the step's rows."""
        return -(-(self.context + self.nodes) // PAGE)

    def shape(self) -> Shape:
        heads, kv_heads, dim = self.heads
        return Shape(
            head_dim=dim, group=heads // kv_heads, itemsize=self.itemsize, page=PAGE,
            kv_heads=kv_heads, rows=self.batch * self.nodes, queries=self.nodes,
            context=self.context,
        )  # fmt: skip

    def bytes_moved(self) -> int:
        """What no kernel can do without: K/V of context and step, queries and output, once."""
        heads, kv_heads, dim = self.heads
        per_request = 2 * (self.context + self.nodes) * kv_heads + 2 * self.nodes * heads
        return self.batch * per_request * dim * self.itemsize

    def cache_bytes(self) -> int:
        _, kv_heads, dim = self.heads
        return self.batch * self.pages * PAGE * kv_heads * 2 * dim * self.itemsize

    def names(self) -> dict:
        heads, kv_heads, dim = self.heads
        return {**asdict(self), "query_heads": heads, "kv_heads": kv_heads, "head_size": dim}


class Inputs:
    """Tensors of a cell.

    The cache is laid out as vLLM 0.32 does by default: [num_blocks, page, Hkv, keys then values].
    The step's K/V stand in it behind the context, too: causal kernels read them there.
    """

    def __init__(self, cell: Cell, seed: int = 0, device: str = "cuda") -> None:
        heads, kv_heads, dim = cell.heads
        dtype = DTYPES[cell.dtype]
        generator = torch.Generator(device).manual_seed(seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.cell = cell
        rows = cell.batch * cell.nodes
        self.q = rand(rows, heads, dim)
        cache = rand(cell.batch * cell.pages, PAGE, kv_heads, 2 * dim)
        self.keys, self.values = cache[..., :dim], cache[..., dim:]
        pages = torch.randperm(cell.batch * cell.pages, generator=generator, device=device)
        self.table = pages.view(cell.batch, cell.pages).to(torch.int32)
        place = torch.arange(cell.context, cell.context + cell.nodes, device=device)
        page, slot = self.table[:, place // PAGE].long(), place % PAGE
        self.k_new = self.keys[page, slot].flatten(0, 1).contiguous()
        self.v_new = self.values[page, slot].flatten(0, 1).contiguous()
        self.contexts = torch.full((cell.batch,), cell.context, dtype=torch.int32, device=device)
        self.lengths = self.contexts + cell.nodes
        starts = torch.arange(cell.batch + 1, device=device) * cell.nodes
        self.starts = starts.to(torch.int32)
        self.seen = torch.stack([random_tree(cell.nodes, seed + r) for r in range(cell.batch)])
        self.mask = pack(self.seen.flatten(0, 1)).to(device)
        self.seen = self.seen.to(device)
        self.scale = dim**-0.5
        self.out = torch.empty_like(self.q)

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K/V [batch, Hkv, context + nodes, D], contiguous."""
        length = self.cell.context + self.cell.nodes
        keys, values = (
            cache[self.table.long()].flatten(1, 2)[:, :length].transpose(1, 2).contiguous()
            for cache in (self.keys, self.values)
        )
        return keys, values


def random_tree(nodes: int, seed: int) -> torch.Tensor:
    """bool [nodes, nodes]: what each node of a random tree sees, itself included."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.eye(nodes, dtype=torch.bool)
    for i in range(1, nodes):
        # half of the nodes lengthen the chain, the others branch anywhere
        branch = int(torch.randint(i, (), generator=generator))
        parent = i - 1 if torch.rand((), generator=generator) < 0.5 else branch
        seen[i] |= seen[parent]
    return seen


def pack(seen: torch.Tensor) -> torch.Tensor:
    """int32 [T, words] of bool [T, nodes], little-endian."""
    rows, nodes = seen.shape
    words = -(-nodes // 32)
    bits = torch.zeros(rows, words * 32, dtype=torch.int64)
    bits[:, :nodes] = seen
    packed = (bits.view(rows, words, 32) << torch.arange(32)).sum(-1)
    return packed.to(torch.int32)
