"""The CUDA path around the kernels: attention, steps, graphs, acceptance, and the runner's part.

On a machine without a device, everything runs on the CPU, kernels in Triton's interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_cases import random_trees
from cuda_steps import step_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.kernels.reference import tree_attention
from vllm_ouroboros.trees.draft_tree import DraftTree, step_mask
from vllm_ouroboros.verify.acceptance import _plain_path, greedy
from vllm_ouroboros.verify.cuda import attention as cuda_attention
from vllm_ouroboros.verify.cuda.acceptance import walk_on_device
from vllm_ouroboros.verify.cuda.attention import MaskedFirst, TreeRows, layer_tables
from vllm_ouroboros.verify.cuda.tree_step import StaticSteps

HEADS, KV_HEADS, DIM, PAGE, BLOCKS = 4, 2, 16, 16, 8
SLOW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Native:
    """In the place of vLLM's implementation: marks the rows that it attends."""

    def __init__(self, kv_cache_dtype="auto", window=None, cap=0.0, **lacking) -> None:
        self.num_heads, self.head_size, self.scale = HEADS, DIM, DIM**-0.5
        self.kv_cache_dtype, self.logits_soft_cap = kv_cache_dtype, cap
        self.sliding_window = (-1, -1) if window is None else (window - 1, 0)
        self.alibi_slopes = lacking.get("alibi")
        self.sinks, self.attn_type = lacking.get("sinks"), lacking.get("kind", "decoder")
        self.chunk_lookback = lacking.get("lookback", -1)
        self.native_rows = 0

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *_):
        self.native_rows = len(query)
        return output.fill_(7.0)


class Impl(TreeRows, Native):
    """The class under test."""


def cache(kind=torch.float32, heads_first=False) -> torch.Tensor:
    """A layer's KV cache as vLLM hands it over: [num_blocks, Hkv, page, 2 * D]."""
    content = torch.randn(BLOCKS, PAGE, KV_HEADS, 2 * DIM).transpose(1, 2)
    content = content.contiguous() if heads_first else content
    return content.to(kind).view(torch.uint8) if kind.itemsize == 1 else content.to(kind)


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("window, cap", [(None, 0.0), (6, 0.0), (None, 5.0)])
@pytest.mark.parametrize("behind", [0, 5])
@pytest.mark.parametrize("kind", ["auto", "fp8", "another layer's"])
def test_tree_rows_attend_as_the_oracle_says(
    kind, behind, window, cap, heads_first, device
) -> None:
    """In front of a prompt (whose rows are vLLM's) or alone, and in front of a graph's padding;
    a layer that reads another one's cache is given no keys and values."""
    torch.manual_seed(0)
    quantised, shared = kind == "fp8", kind == "another layer's"
    parents, starts = random_trees([4, 7, 1], 1)
    contexts = np.array([20, 3, 0], np.int32)
    total, padding = int(starts[-1]), 3
    own = slice(total)
    impl = Impl("fp8" if quantised else "auto", window, cap)
    assert impl.supports_quant_query_input is False
    assert impl.fused_output_quant_supported(None) is False
    kv = cache(torch.float8_e4m3fn if quantised else torch.float32, heads_first).to(device)
    table = torch.tensor([[1, 2, 0], [3, 4, 0], [5, 6, 0]], dtype=torch.int32, device=device)
    q = torch.randn(total + behind + padding, HEADS, DIM, device=device)
    k, v = (torch.randn(len(q), KV_HEADS, DIM, device=device) for _ in range(2))
    slots = torch.cat([
        table[r].long().repeat_interleave(PAGE)[context : context + n] * PAGE
        + (torch.arange(context, context + n, device=device) % PAGE)
        for r, (context, n) in enumerate(zip(contexts.tolist(), np.diff(starts), strict=True))
    ])  # fmt: skip
    slots = torch.cat([slots, slots.new_full((behind + padding,), -1)])
    keys, values = impl.split_cache(kv)
    scale = torch.tensor(0.5 if quantised else 1.0, device=device)
    if quantised or shared:  # what a later step will read
        page, place = slots[slots >= 0] // PAGE, slots[slots >= 0] % PAGE
        keys[page, place] = (k[own] / scale).to(keys.dtype)
        values[page, place] = (v[own] / scale).to(keys.dtype)
        k[own], v[own] = keys[page, place].float() * scale, values[page, place].float() * scale
    mask = step_mask(parents, starts)
    step = step_of(device, starts, contexts, table, mask)
    others = SimpleNamespace() if behind else None
    metadata = MaskedFirst(others, table, slots, step)
    layer = SimpleNamespace(_k_scale=scale, _v_scale=scale)
    out = torch.zeros(len(q), HEADS * DIM, device=device)
    given_kv = (None, None) if shared else (k, v)
    impl.forward(layer, q, *given_kv, kv, metadata, out)
    assert impl.native_rows == (behind + padding if behind else 0)

    wanted = torch.zeros(total, HEADS, DIM)
    old = [(t.float() * scale).cpu() for t in (keys, values)]
    tree_attention(
        q[own].cpu(), k[own].cpu(), v[own].cpu(), *old, table.cpu(), torch.from_numpy(contexts),
        torch.from_numpy(starts), torch.from_numpy(mask), DIM**-0.5, wanted,
        soft_cap=cap, sliding_window=window,
    )  # fmt: skip
    torch.testing.assert_close(out[own].view(wanted.shape).cpu(), wanted, rtol=1e-4, atol=1e-4)
    assert (out[total:] == (7 if behind else 0)).all()


def test_rows_without_a_tree_are_vllms() -> None:
    impl, out = Impl(), torch.zeros(3, HEADS * DIM)
    q = torch.zeros(3, HEADS, DIM)
    for metadata in (None, SimpleNamespace()):  # a profile run, and a step without trees
        out.zero_()
        impl.forward(None, q, q, q, None, metadata, out)
        assert (out == 7).all()


@pytest.mark.parametrize("masked", [0, 2, 3])
def test_vllms_metadata_is_of_the_rows_behind(masked) -> None:
    """Two requests of few rows and a prompt of 9: of nothing, of the prompt, of all."""
    starts = torch.tensor([0, 3, 4, 13], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts,
        seq_lens=torch.tensor([20, 8, 9], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([20, 8, 9], dtype=torch.int32), num_reqs=3,
        num_actual_tokens=13, max_query_len=9, max_seq_len=20,
        block_table_tensor=torch.arange(6, dtype=torch.int32).view(3, 2),
        slot_mapping=torch.arange(13), mm_req_doc_ranges={0: [(1, 2)], 2: [(3, 4)]},
    )  # fmt: skip

    class Native:
        def __init__(self, *args) -> None: ...

        def build(self, common_prefix_len, common, fast_build=False):
            return common

        def build_for_cudagraph_capture(self, common):
            return "vllm's"

    class Builder(cuda_attention.TreeBuilder, Native):
        """The class under test."""

    builder = Builder(None, [], SimpleNamespace(num_speculative_tokens=4), None)
    assert builder.reorder_batch_threshold == 5
    builder.masked = masked
    built = builder.build(0, common)
    if not masked:
        assert built is common
        assert builder.build_for_cudagraph_capture(common) == "vllm's"
        return
    assert built.block_table.tolist() == common.block_table_tensor[:masked].tolist()
    assert built.slot_mapping is common.slot_mapping
    assert (built.others is None) == (masked == 3)
    if built.others is not None:
        assert built.others.query_start_loc.tolist() == [0, 9]
        assert built.others.seq_lens.tolist() == [9]
        assert built.others.block_table_tensor.tolist() == [[4, 5]]
        assert built.others.slot_mapping.tolist() == [*range(4, 13)]
        assert built.others.num_actual_tokens == built.others.max_query_len == 9
        assert built.others.mm_req_doc_ranges == {0: [(3, 4)]}
    assert isinstance(builder.build_for_cudagraph_capture(common), MaskedFirst)


@pytest.mark.parametrize(
    "lacking, word",
    [
        ({"alibi": [1.0]}, "ALiBi"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"kind": "encoder"}, "decoder's"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "fp8_e5m2"),
        ({"lookback": 0}, "chunk_lookback"),
    ],
)
def test_what_trees_cannot_attend_is_refused(lacking, word) -> None:
    with pytest.raises(ConfigError, match=word):
        Impl(**lacking)


def test_backends_take_vllms_place() -> None:
    for name in ("Triton", "Flash"):
        backend = getattr(cuda_attention, f"Tree{name}Backend")
        assert issubclass(backend.get_impl_cls(), TreeRows)
        support = backend.get_builder_cls().get_cudagraph_support(None, None)
        assert support == AttentionCGSupport.UNIFORM_BATCH
        assert backend.get_name() in ("TRITON_ATTN", "FLASH_ATTN")


@SLOW
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(2, 9), min_size=1, max_size=3))
def test_accepted_rows_move_to_their_slots(seed, sizes, device) -> None:
    """In layers of two geometries; the order of moves must not matter."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    _, starts = random_trees(sizes, seed)
    contexts = rng.integers(0, 12, len(sizes)).astype(np.int32)
    table = torch.from_numpy(rng.permutation(BLOCKS)[: 2 * len(sizes)].astype(np.int32))
    table = table.view(len(sizes), 2).to(device)
    impl = Impl()
    caches = [cache().to(device), cache(heads_first=True).to(device), cache().to(device)]
    before = [c.clone() for c in caches]
    step = step_of(device, starts, contexts, table, np.zeros((int(starts[-1]), 1), np.int32))
    step.layers = layer_tables([SimpleNamespace(impl=impl, kv_cache=c) for c in caches])
    assert len(step.layers) == 2
    moves, places = [], []
    for r, size in enumerate(sizes):
        rows = np.sort(rng.choice(np.arange(1, size), rng.integers(0, size), replace=False))
        for depth, row in enumerate(rows.tolist()):
            position = int(contexts[r]) + 1 + depth
            places.append((r, int(contexts[r]) + row, position))
            if row != depth + 1:
                moves.append((r, int(starts[r]) + row, position))
    if moves:
        step.write(torch.tensor(rng.permutation(moves)))
    blocks = table.cpu()
    for new, old in zip(caches, before, strict=True):
        wanted = old.clone()
        for r, source, target in places:
            wanted[blocks[r, target // PAGE], :, target % PAGE] = old[
                blocks[r, source // PAGE], :, source % PAGE
            ]
        assert torch.equal(new, wanted)


def test_static_buffers_hold_any_smaller_batch(device) -> None:
    static = StaticSteps(torch.device(device), 4, 40, 40, 64)
    parents, starts = random_trees([35, 3], 0)
    mask, contexts = step_mask(parents, starts), np.array([5, 6], np.int32)
    static.mask.fill_(-1)
    static.fill(starts, contexts, mask)
    graph = static.step(4, 40, torch.zeros(4, 1))
    assert graph.query_start_loc.tolist() == [0, 35, 38, 38, 38]
    assert graph.context_lens.tolist() == [5, 6, 0, 0]
    assert graph.mask[:38].tolist() == mask.tolist()
    assert graph.num_rows == 40
    narrow = step_mask(*random_trees([3, 2], 0))
    static.fill(np.array([0, 3, 5], np.int32), contexts, narrow)
    assert static.mask[:5].tolist() == [[*row, 0] for row in narrow.tolist()]


@SLOW
@given(
    sizes=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    vocab=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_the_device_walks_as_the_host_does(sizes, vocab, seed, device) -> None:
    """Trees, requests without one, tokens that end a text; few tokens, so that walks go far."""
    rng = np.random.default_rng(seed)
    trees: list[DraftTree | None] = []
    for n in sizes:
        parents = np.array([rng.integers(-1, i) if i else -1 for i in range(n)], np.int32)
        tokens = rng.integers(0, vocab, n).astype(np.int32)
        trees.append(DraftTree(tokens, parents, np.ones(n, np.int32)) if n else None)
    rows = np.cumsum([0] + [n + 1 for n in sizes])
    logits = torch.from_numpy(rng.standard_normal((rows[-1], vocab)).astype(np.float32))
    stops = [frozenset(rng.choice(vocab, rng.integers(0, 2)).tolist()) for _ in sizes]
    walked = walk_on_device(logits.to(device), rows[:-1], trees, stops, 9)
    found = walked.to_host(rows[:-1], trees)
    predicted = greedy(logits)
    for r, tree in enumerate(trees):
        own = predicted[rows[r] : rows[r + 1]]
        path = np.empty(0, np.int32) if tree is None else _plain_path(tree, own, stops[r])
        emitted = [*([] if tree is None else tree.tokens[path].tolist())]
        emitted.append(int(own[path[-1] + 1 if len(path) else 0]))
        assert [t for t in walked.tokens[r].tolist() if t >= 0] == emitted
        assert (found[r] is None) == (tree is None)
        if found[r] is not None:
            assert found[r].path.tolist() == path.tolist()
            assert found[r].predicted.tolist() == own.tolist()
            assert found[r].path.dtype == np.int32
