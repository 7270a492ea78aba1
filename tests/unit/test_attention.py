"""Tree attention on the CPU, over vLLM's own pages, against the oracle in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import _custom_ops as ops
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)

from vllm_ouroboros import attention
from vllm_ouroboros.attention import (
    TreeAttentionBackend,
    TreeAttentionImpl,
    TreeAttentionMetadataBuilder,
    check_layout,
)
from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.kernels.reference import tree_attention
from vllm_ouroboros.tree import ancestor_mask
from vllm_ouroboros.tree_step import TreeStep, attach

NUM_BLOCKS = 24


@pytest.fixture(scope="module")
def vllm_config():
    config = VllmConfig()
    pair = Path(attention.__file__).parent / "assets" / "tiny-code"
    config.model_config = ModelConfig(model=str(pair / "target"))
    with set_current_vllm_config(config):
        yield  # not the config: hypothesis prints its arguments, and a bare config has no repr


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
        padding=0, all_tree_rows=False,
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
        self.isa = _get_attn_isa(dtype, block, dim)

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

    def step(self) -> TreeStep:
        """The trees of the forward, as the runner describes them."""
        trees = [r for r, (_, _, tree) in enumerate(self.requests) if tree]
        rows = [np.arange(self.starts[r], self.starts[r + 1]) for r in trees]
        sizes = [len(r) for r in rows]
        flat = np.concatenate(rows)
        words = -(-max(sizes) // 32)
        return TreeStep(
            rows=torch.from_numpy(flat).long(),
            starts=np.array([0, *np.cumsum(sizes)], np.int64),
            contexts=np.array([self.contexts[r] for r in trees], np.int64),
            block_table=self.table[torch.tensor(trees)],
            mask=torch.from_numpy(self.mask[flat, :words].copy()),
            num_rows=self.total,
        )

    def metadata(self, impl, step: TreeStep | None) -> CPUAttentionMetadata:
        start_loc = torch.from_numpy(self.starts)
        lengths = np.diff(self.starts)
        seq_lens = torch.tensor(self.contexts, dtype=torch.int32) + torch.from_numpy(lengths)
        scheduled = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self.requests), num_heads=self.heads, num_kv_heads=self.kv_heads,
            head_dim=self.dim, seq_lens=seq_lens, dtype=self.dtype, query_start_loc=start_loc,
            causal=True, sliding_window_size=impl.sliding_window, isa=self.isa,
            enable_kv_split=False,
        )  # fmt: skip
        metadata = CPUAttentionMetadata(
            num_actual_tokens=self.total, max_query_len=int(lengths.max()),
            query_start_loc=start_loc, max_seq_len=int(seq_lens.max()), seq_lens=seq_lens,
            block_table=self.table, slot_mapping=self.slots(), scheduler_metadata=scheduled,
        )  # fmt: skip
        if step is not None:
            attach({"layer": metadata}, step)
        return metadata

    def run(self, impl, step: TreeStep | None, on=None) -> torch.Tensor:
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


@given(forward=forwards())
@settings(max_examples=40, deadline=None)
def test_forward_is_the_oracle(vllm_config, forward) -> None:
    impl = make_impl(forward.heads, forward.kv_heads, forward.dim)
    close(forward.run(impl, forward.step()), forward.expected(), forward.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_grouped_heads(vllm_config, group, dtype) -> None:
    rng = np.random.default_rng(group)
    forward = Forward(
        [(40, random_tree(rng, 9), True), (3, chain(5), False), (64, random_tree(rng, 20), True)],
        heads=2 * group, kv_heads=2, dtype=dtype,
    )  # fmt: skip
    close(forward.run(make_impl(2 * group, 2, 32), forward.step()), forward.expected(), dtype)


@pytest.mark.parametrize("rows", [65, 97, 130])
def test_trees_of_several_mask_words(vllm_config, rows) -> None:
    rng = np.random.default_rng(rows)
    forward = Forward([(70, random_tree(rng, rows), True), (0, random_tree(rng, 3), True)])
    close(forward.run(make_impl(4, 2, 32), forward.step()), forward.expected())


@pytest.mark.parametrize("context", [0, 1, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_page_boundaries(vllm_config, context, rows) -> None:
    forward = Forward([(context, random_tree(np.random.default_rng(context), rows), True)])
    close(forward.run(make_impl(4, 2, 32), forward.step()), forward.expected())


def test_soft_cap(vllm_config) -> None:
    rng = np.random.default_rng(1)
    forward = Forward([(45, random_tree(rng, 12), True), (9, chain(4), False)])
    forward.query *= 20  # scores far beyond the cap
    impl = make_impl(4, 2, 32, soft_cap=5.0)
    got, expected = forward.run(impl, forward.step()), forward.expected(soft_cap=5.0)
    torch.testing.assert_close(got[:12], expected[:12], atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(got[12:], expected[12:], atol=2e-3, rtol=2e-3)  # vLLM's own tanh
    assert (expected - forward.expected()).abs().max() > 0.1


@pytest.mark.parametrize("window", [1, 3, 8, 40, 500])
@pytest.mark.parametrize("context", [0, 5, 33, 64])
def test_sliding_window(vllm_config, window, context) -> None:
    """The window is one of positions: siblings, however far apart in the list, are as near."""
    rng = np.random.default_rng(window)
    forward = Forward(
        [(context, random_tree(rng, 20), True), (40, random_tree(rng, 6), True)], seed=context
    )
    got = forward.run(make_impl(4, 2, 32, window=window), forward.step())
    close(got, forward.expected(window=window))


def test_layers_with_different_windows_share_a_step(vllm_config) -> None:
    forward = Forward([(50, random_tree(np.random.default_rng(2), 11), True)])
    step = forward.step()
    for window in (4, None, 9):
        got = forward.run(make_impl(4, 2, 32, window=window), step)
        close(got, forward.expected(window=window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_chain_agrees_with_the_native_kernel(vllm_config, dtype) -> None:
    """What a token sees does not depend on which of the two kernels its request gets."""
    forward = Forward(
        [(37, chain(9), True), (64, chain(1), True), (0, chain(33), True)], dtype=dtype
    )
    impl = make_impl(4, 2, 32)
    close(forward.run(impl, forward.step()), forward.run(impl, None), dtype)


def test_rows_without_a_tree_are_the_native_kernels_to_the_bit(vllm_config) -> None:
    rng = np.random.default_rng(8)
    plain = [(37, chain(9), False), (0, chain(33), False), (70, chain(1), False)]
    forward = Forward([plain[0], (12, random_tree(rng, 8), True), *plain[1:]])
    impl = make_impl(4, 2, 32)
    native, mixed = forward.run(impl, None), forward.run(impl, forward.step())
    keep = [*range(9), *range(17, forward.total)]
    assert torch.equal(native[keep], mixed[keep])
    assert not torch.equal(native[9:17], mixed[9:17])


def test_a_row_does_not_depend_on_its_batch(vllm_config) -> None:
    """The same request alone, and beside longer and shorter ones, up to rounding."""
    rng = np.random.default_rng(4)
    mine = (50, random_tree(rng, 10), True)
    others = [(0, random_tree(rng, 30), True), (90, random_tree(rng, 4), True)]
    together = Forward([mine, *others])
    alone = Forward([mine])
    for name in ("query", "key", "value"):
        setattr(alone, name, getattr(together, name)[:10])
    alone.page_keys, alone.page_values = together.page_keys, together.page_values
    alone.table = together.table[:1]
    impl = make_impl(4, 2, 32)
    close(alone.run(impl, alone.step()), together.run(impl, together.step())[:10])


THREADS = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as vLLM binds its worker
import torch
torch.set_num_threads(2)
from vllm_ouroboros.attention_kernel import numba, share_threads
shared = share_threads(2)
print(shared, numba.get_num_threads(), torch.get_num_threads())
"""


def test_the_kernel_runs_on_the_threads_of_torch_and_leaves_them() -> None:
    """Bound to a core, numba would take one thread for itself and for OpenMP as a whole."""
    run = [sys.executable, "-P", "-c", THREADS]
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert found == (["True", "2", "2"] if found[0] == "True" else ["False", "1", "2"])


# -- the KV of accepted rows -----------------------------------------------------------------------


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
    forward = Forward(requests, dtype=dtype)
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


# -- layout and refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block, dim", [(32, 32), (64, 80), (128, 64), (32, 128)])
def test_this_machines_layout_is_known(dtype, block, dim) -> None:
    isa = _get_attn_isa(dtype, block, dim)
    check_layout("vec" if isa == "amx" else isa, dtype, block, dim)


@pytest.mark.parametrize("swap", ["keys", "values", "both"])
def test_another_layout_is_refused(monkeypatch, swap) -> None:
    def wrong(keys, values, key_cache, value_cache, *rest, **named):
        ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, *rest, **named)
        block, dim = key_cache.shape[2:]
        if swap != "values":
            key_cache[1, 0] = key_cache[1, 0].view(dim, block).T.clone().view(block, dim)
        if swap != "keys":
            value_cache[1, 0] = value_cache[1, 0].roll(1, dims=0)

    monkeypatch.setattr(attention, "ops", SimpleNamespace(cpu_attn_reshape_and_cache=wrong))
    with pytest.raises(ConfigError, match=r"'vec'.*float32.*block size 32.*head size 64"):
        check_layout("vec", torch.float32, 32, 64)


def test_the_builder_avoids_a_layout_that_cannot_be_read(monkeypatch) -> None:
    """On a CPU with AMX the layers are told to use the plain vector kernels."""
    told, checked = [], []

    def init(self, layer_names):
        self.layer_names, self.isa = layer_names, "amx"
        self.dtype, self.block_size, self.head_dim = torch.bfloat16, 32, 64

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "__init__", init)
    monkeypatch.setattr(
        CPUAttentionMetadataBuilder, "_set_isa_to_layers",
        lambda self, names: told.append((self.isa, names)),
    )  # fmt: skip
    monkeypatch.setattr(attention, "check_layout", lambda *args: checked.append(args))
    builder = TreeAttentionMetadataBuilder(["a", "b"])
    assert builder.isa == "vec"
    assert told == [("vec", ["a", "b"])]
    assert checked == [("vec", torch.bfloat16, 32, 64)]


@pytest.mark.parametrize(
    "changes, name",
    [({"alibi_slopes": [0.5] * 4}, "ALiBi"), ({"sinks": torch.zeros(4)}, "attention sinks")],
)
def test_what_the_kernel_cannot_do_is_refused(vllm_config, changes, name) -> None:
    with pytest.raises(ConfigError, match=name):
        make_impl(4, 2, 32, **changes)


def test_the_backend_names_its_parts() -> None:
    assert TreeAttentionBackend.get_impl_cls() is TreeAttentionImpl
    assert TreeAttentionBackend.get_builder_cls() is TreeAttentionMetadataBuilder
    assert TreeAttentionBackend.get_name() == "CPU_ATTN"


def test_attach_reaches_every_metadata_object() -> None:
    one, two = SimpleNamespace(), SimpleNamespace()
    step = object()
    attach({"a": one, "b": one, "c": two}, step)
    assert one.tree is step
    assert two.tree is step


def test_a_profiling_run_has_no_metadata(vllm_config) -> None:
    output = torch.ones(3, 4, 32)
    impl = make_impl(4, 2, 32)
    got = impl.forward(SimpleNamespace(), output, None, None, None, None, output)
    assert got is output
    assert (output == 1).all()
