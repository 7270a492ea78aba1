"""One forward of the CPU backend with trees, and what it should give."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, _get_attn_isa

from vllm_ouroboros.kernels.reference import tree_attention
from vllm_ouroboros.trees.draft_tree import ancestor_mask
from vllm_ouroboros.verify.cpu.attention import TreeAttentionImpl
from vllm_ouroboros.verify.cpu.tree_step import CPUTreeStep
from vllm_ouroboros.verify.tree_step import attach

NUM_BLOCKS = 24


def make_impl(heads, kv_heads, dim, *, soft_cap=None, window=None, **changes) -> TreeAttentionImpl:
    return TreeAttentionImpl(
        **{
            "num_heads": heads, "head_size": dim, "scale": dim**-0.5, "num_kv_heads": kv_heads,
            "alibi_slopes": None, "sliding_window": window, "kv_cache_dtype": "auto",
            "logits_soft_cap": soft_cap, **changes,
        }
    )  # fmt: skip


class Forward:
    """Random requests over a cache full of random pages, and one forward of a layer.

    Args:
        requests: for each (context length, row parents, whether its rows are a tree); rows of a
            request that is no tree must be a chain and go to the native kernel.
    """

    def __init__(
        self, requests, *, heads=4, kv_heads=2, dim=32, block=32, dtype=torch.float32, seed=0,
        padding=0, isa=None,
    ) -> None:  # fmt: skip
        gen = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.randn(*shape, generator=gen).to(dtype)

        self.requests, self.heads, self.kv_heads, self.dim = requests, heads, kv_heads, dim
        self.block, self.dtype = block, dtype
        lengths = [len(parents) for _, parents, _ in requests]
        self.total = sum(lengths)
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        rows = self.total + padding
        self.query = rand(rows, heads, dim)
        self.key, self.value = rand(rows, kv_heads, dim), rand(rows, kv_heads, dim)
        self.isa = isa or _get_attn_isa(dtype, block, dim)

        # every slot of the cache holds something: what is no context must not be read
        self.page_keys = rand(NUM_BLOCKS, block, kv_heads, dim)
        self.page_values = rand(NUM_BLOCKS, block, kv_heads, dim)
        needed = [-(-(c + n) // block) for (c, _, _), n in zip(requests, lengths, strict=True)]
        free = (torch.randperm(NUM_BLOCKS - 1, generator=gen) + 1).tolist()
        self.table = torch.zeros(len(requests), max(needed), dtype=torch.int32)
        for r, count in enumerate(needed):
            self.table[r, :count] = torch.tensor([free.pop() for _ in range(count)])
        self.contexts = [c for c, _, _ in requests]

        self.parents = np.concatenate([p for _, p, _ in requests]).astype(np.int32)
        words = -(-max(lengths) // 32)
        self.mask = np.zeros((self.total, words), np.int32)
        ancestor_mask(self.parents, self.starts, self.mask)

    def layer(self, name: str, seed: int = 0) -> SimpleNamespace:
        """A layer with the cache filled and this step's rows at the slots that follow."""
        layer = SimpleNamespace(
            layer_name=name, isa=self.isa, _k_scale_float=1.0, _v_scale_float=1.0
        )
        cache = torch.zeros(NUM_BLOCKS, self.kv_heads, self.block, 2 * self.dim, dtype=self.dtype)
        flat = cache.view(NUM_BLOCKS, self.kv_heads, 2 * self.block, self.dim)
        ops.cpu_attn_reshape_and_cache(
            self.page_keys.flatten(0, 1), self.page_values.flatten(0, 1), *flat.chunk(2, dim=2),
            torch.arange(NUM_BLOCKS * self.block), self.isa,
        )  # fmt: skip
        return SimpleNamespace(layer=layer, cache=cache)

    def slots(self) -> torch.Tensor:
        """Where the step's rows stand in the cache before any is accepted."""
        return torch.tensor(
            [
                int(self.table[r, p // self.block]) * self.block + p % self.block
                for r, (context, parents, _) in enumerate(self.requests)
                for p in range(context, context + len(parents))
            ]
        )

    def step(self) -> CPUTreeStep:
        """The trees of the forward, as the runner describes them."""
        trees = [r for r, (_, _, tree) in enumerate(self.requests) if tree]
        rows = [np.arange(self.starts[r], self.starts[r + 1]) for r in trees]
        sizes = [len(r) for r in rows]
        flat = np.concatenate(rows)
        words = -(-max(sizes) // 32)
        return CPUTreeStep(
            rows=torch.from_numpy(flat).long(),
            starts=np.array([0, *np.cumsum(sizes)], np.int64),
            contexts=np.array([self.contexts[r] for r in trees], np.int64),
            block_table=self.table[torch.tensor(trees)],
            mask=self.mask[flat, :words].copy(),
            num_rows=self.total,
        )

    def metadata(self, impl, step: CPUTreeStep | None) -> CPUAttentionMetadata:
        start_loc = torch.from_numpy(self.starts)
        lengths = np.diff(self.starts)
        seq_lens = torch.tensor(self.contexts, dtype=torch.int32) + torch.from_numpy(lengths)

        def schedule(seq_lens, query_start_loc):
            return ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(seq_lens), num_heads=self.heads, num_kv_heads=self.kv_heads,
                head_dim=self.dim, seq_lens=seq_lens, dtype=self.dtype,
                query_start_loc=query_start_loc, causal=True,
                sliding_window_size=impl.sliding_window, isa=self.isa, enable_kv_split=False,
            )  # fmt: skip

        metadata = CPUAttentionMetadata(
            num_actual_tokens=self.total, max_query_len=int(lengths.max()),
            query_start_loc=start_loc, max_seq_len=int(seq_lens.max()), seq_lens=seq_lens,
            block_table=self.table, slot_mapping=self.slots(),
            scheduler_metadata=schedule(seq_lens, start_loc),
        )  # fmt: skip
        metadata.schedule = schedule
        if step is not None:
            attach({"layer": metadata}, step)
        return metadata

    def run(self, impl, step: CPUTreeStep | None, on=None) -> torch.Tensor:
        """The layer's output for the rows of the step, in float64."""
        on = on or self.layer("layer")
        impl.do_kv_cache_update(
            on.layer, self.key[: self.total], self.value[: self.total], on.cache, self.slots()
        )
        output = torch.full_like(self.query, 77.0)
        got = impl.forward(
            on.layer, self.query, self.key, self.value, on.cache, self.metadata(impl, step), output
        )
        assert got is output
        assert (output[self.total :] == 77.0).all()
        return output[: self.total].double()

    def expected(self, *, soft_cap=0.0, window=None) -> torch.Tensor:
        out = torch.empty(self.total, self.heads, self.dim, dtype=torch.float64)
        tree_attention(
            self.query[: self.total].double(), self.key[: self.total].double(),
            self.value[: self.total].double(), self.page_keys.double(), self.page_values.double(),
            self.table, torch.tensor(self.contexts), torch.from_numpy(self.starts),
            torch.from_numpy(self.mask), self.dim**-0.5, out, soft_cap=soft_cap,
            sliding_window=window,
        )  # fmt: skip
        return out


def chain(rows: int) -> np.ndarray:
    return np.arange(-1, rows - 1)


def random_tree(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Parents of rows below one root."""
    return np.array([-1] + [rng.integers(max(0, i - 6), i) for i in range(1, rows)])


def close(got: torch.Tensor, expected: torch.Tensor, dtype=torch.float32) -> None:
    tolerance = {"atol": 2e-5, "rtol": 2e-5}
    if dtype != torch.float32:
        tolerance = {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(got, expected, **tolerance)


@st.composite
def forwards(draw):
    """Ragged batches around the page boundary, chains beside trees."""
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    block = draw(st.sampled_from([32, 64]))
    sizes = [1, 2, 7, 31, 32, 33] if block == 64 else [1, 2, 5, 9, 33, 34]
    contexts = [0, 1, block - 1, block, block + 1, 2 * block, 3 * block - 1]
    requests = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.sampled_from(sizes))
        tree = draw(st.booleans())
        parents = random_tree(rng, rows) if tree else chain(rows)
        requests.append((draw(st.sampled_from(contexts)), parents, tree))
    if not any(tree for _, _, tree in requests):
        requests[0] = (requests[0][0], requests[0][1], True)  # a chain may be given as a tree
    group = draw(st.sampled_from([1, 4, 8]))
    kv_heads = draw(st.sampled_from([1, 2]))
    return Forward(
        requests, heads=group * kv_heads, kv_heads=kv_heads,
        dim=draw(st.sampled_from([32, 64, 80])), block=block, seed=seed,
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        padding=draw(st.sampled_from([0, 3])),
    )  # fmt: skip
