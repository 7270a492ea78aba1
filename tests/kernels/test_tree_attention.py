"""The Triton tree attention against its oracle in float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_ouroboros.kernels import reference
from vllm_ouroboros.kernels.tree_attention import (
    Launch,
    LaunchConfig,
    launch_config,
    scratch,
    tree_attention,
)

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


@st.composite
def trees(draw, most: int = 34) -> list[int]:
    size = draw(st.sampled_from([0, 1, 1, 2, 5, 11, most]))
    return draw(st.sampled_from([chain(size), bush(size, draw(st.integers(0, 99)))]))


@st.composite
def cases(draw) -> Case:
    requests = draw(st.integers(1, 3))
    page = draw(st.sampled_from([1, 4, 16, 32, 48]))
    edge = st.integers(0, 3).map(lambda n: n * page)
    length = st.one_of(st.just(0), edge, edge.map(lambda n: n + 1), st.integers(0, 70))
    group, kv_heads = draw(st.sampled_from([(1, 1), (1, 2), (3, 1), (3, 2), (4, 1), (8, 1)]))
    return Case(
        parents=draw(st.lists(trees(), min_size=requests, max_size=requests)),
        contexts=draw(
            st.lists(length.map(lambda n: min(n, 70)), min_size=requests, max_size=requests)
        ),
        heads=(group * kv_heads, kv_heads),
        dim=draw(st.sampled_from([16, 20])),
        page=page,
        layout=draw(st.sampled_from(["apart", "halves", "heads first", "interleaved"])),
        config=LaunchConfig(
            draw(st.sampled_from([16, 32, 64])),
            draw(st.sampled_from([16, 32])),
            draw(st.integers(1, 8)),
        ),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        window=draw(st.sampled_from([None, None, 1, 3, 8, 30, 1000])),
        words=draw(st.sampled_from([2, 4])),
        seed=draw(st.integers(0, 99)),
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_any_batch(case, device) -> None:
    case.check(device)


@pytest.mark.parametrize("layout", ["apart", "halves", "heads first", "interleaved"])
@pytest.mark.parametrize("page, one_page", [(16, True), (8, False)])
def test_layouts_and_pages(layout, page, one_page, device) -> None:
    launch = Case(layout=layout, page=page, contexts=[37], config=LaunchConfig(16, 16, 2)).check(
        device
    )
    assert launch.one_page is one_page


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_head_sizes(dim, device) -> None:
    Case(dim=dim, contexts=[21]).check(device)


@pytest.mark.parametrize("group", [1, 4, 5, 8])
def test_a_group_shares_its_tiles(group, device) -> None:
    """Programs are counted by KV heads: 6 rows of 1 to 8 heads."""
    launch = Case(parents=[bush(6)], heads=(2 * group, 2), config=LaunchConfig(16, 16, 1)).check(
        device
    )
    assert launch.grid == (6 // (16 // group) + 1, 2, 1)


def test_the_default_tile_holds_all_queries_and_heads(device) -> None:
    """A tree of 27 rows, 4 heads a group: one program reads the context, for all of them."""
    launch = Case(parents=[bush(27)], heads=(4, 1), dtype=torch.float16, config=None).check(device)
    assert launch.config.block_m == 128
    assert launch.config.block_m // 4 >= 27


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fp8", ["none", "cache", "cache and step"])
def test_types(dtype, fp8, device) -> None:
    launch = Case(
        parents=[bush(6), [-1]], contexts=[21, 5], dtype=dtype,
        cache_dtype=None if fp8 == "none" else FP8,
        step_dtype=FP8 if fp8 == "cache and step" else None,
        config=LaunchConfig(32, 16, 2), soft_cap=3.0,
    ).check(device)  # fmt: skip
    assert launch.cache_fp8 is (fp8 != "none")
    assert launch.step_fp8 is (fp8 == "cache and step")


def test_float32_queries_over_a_cache_of_another_type(device) -> None:
    launch = Case(cache_dtype=FP8).check(device)
    assert launch.cache_fp8
    assert not launch.step_fp8
    Case(cache_dtype=torch.float16).check(device)


@pytest.mark.parametrize("splits", range(1, 9))
def test_splits(splits, device) -> None:
    """Each split but those in excess has a finite log-sum-exp: its branch was really taken."""
    buffers = scratch(5, 2, 16, splits, device)
    buffers[1].fill_(float("nan"))
    case = Case(
        parents=[[-1, 0, 0, 1], [-1]], contexts=[70, 3], config=LaunchConfig(16, 16, splits),
        options={"buffers": buffers},
    )  # fmt: skip
    assert case.check(device).config.num_splits == splits
    lses = buffers[1].view(5, 2, splits).cpu()
    if splits == 1:
        assert lses.isnan().all()  # written by no one
        return
    long, short = 6, 2  # tiles: those of the context and one of the step
    for row, tiles in [(0, long), (4, short)]:
        used = -(-tiles // -(-tiles // splits))
        assert lses[row, :, :used].isfinite().all()
        assert (lses[row, :, used:] == float("-inf")).all()


@pytest.mark.parametrize("size, words", [(32, 1), (33, 2), (70, 3), (210, 7)])
@pytest.mark.parametrize("splits", [1, 4])
def test_mask_words(size, words, splits, device) -> None:
    parents = [bush(size), chain(3)]
    assert tree_mask(parents).shape == (size + 3, words)
    Case(
        parents=parents, contexts=[5, 17], heads=(1, 1), config=LaunchConfig(64, 16, splits),
        window=None if splits == 1 else 4,
    ).check(device)  # fmt: skip


@pytest.mark.parametrize("window", [1, 4, 12])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_window_and_soft_cap(window, soft_cap, device) -> None:
    launch = Case(
        parents=[chain(9), bush(9)], contexts=[30, 2], window=window, soft_cap=soft_cap,
        config=LaunchConfig(16, 16, 2),
    ).check(device)  # fmt: skip
    assert launch.window
    assert launch.soft_cap is bool(soft_cap)


def test_a_window_spares_what_it_cannot_reach(device) -> None:
    """Keys 91 to 99 are in 2 of 7 tiles; with the step's that makes 3 of 8 splits."""
    buffers = scratch(1, 2, 16, 8, device)
    Case(
        parents=[[-1]], contexts=[100], window=10, config=LaunchConfig(16, 16, 8),
        options={"buffers": buffers},
    ).check(device)  # fmt: skip
    assert buffers[1].view(2, 8).isfinite().sum(1).tolist() == [3, 3]


def test_empty_contexts_and_requests_without_rows(device) -> None:
    Case(parents=[[], [-1], [], chain(4), []], contexts=[8, 0, 0, 0, 5]).check(device)
    Case(parents=[[], []], contexts=[8, 0]).check(device)
    Case(parents=[], contexts=[]).check(device)


def test_requests_with_and_without_trees_in_one_launch(device) -> None:
    """A tree, plain decode and a chunk of a prompt."""
    Case(
        parents=[bush(11), [-1], chain(20)], contexts=[19, 33, 16], heads=(4, 2),
        config=LaunchConfig(32, 16, 3),
    ).check(device)  # fmt: skip


def test_padded_requests_of_a_graph(device) -> None:
    """Rows behind the last request stay as they are: NaN here, which the oracle never writes."""
    for splits in (1, 3):
        out = torch.full((6, 1, 16), float("nan"), device=device)
        q = torch.randn(6, 1, 16, device=device)
        cache = torch.randn(2, 4, 1, 16, device=device)
        tree_attention(
            q, q, q, cache, cache, torch.ones(3, 2, dtype=torch.int32, device=device),
            torch.tensor([3, 0, 0], dtype=torch.int32, device=device),
            torch.tensor([0, 2, 2, 2], dtype=torch.int32, device=device),
            torch.tensor([[1], [3], [0], [0], [0], [0]], dtype=torch.int32, device=device),
            0.5, out, max_query_len=2, max_context_len=8, config=LaunchConfig(16, 16, splits),
        )  # fmt: skip
        assert out[:2].isfinite().all()
        assert out[2:].isnan().all()


def test_bits_beyond_the_step_mean_nothing(device) -> None:
    """Neither as keys nor as depth."""
    q = torch.randn(3, 1, 16, device=device)
    cache = torch.randn(2, 4, 1, 16, device=device)

    def run(mask: list[list[int]]) -> torch.Tensor:
        out = torch.empty_like(q)
        tree_attention(
            q, q, q, cache, cache, torch.ones(2, 2, dtype=torch.int32, device=device),
            torch.tensor([3, 2], dtype=torch.int32, device=device),
            torch.tensor([0, 2, 3], dtype=torch.int32, device=device),
            torch.tensor(mask, dtype=torch.int32, device=device), 0.5, out, sliding_window=3,
        )  # fmt: skip
        return out

    assert torch.equal(run([[1, 0], [3, 0], [1, 0]]), run([[13, 1], [-1, 7], [-3, -1]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_follows_its_inputs() -> None:
    """Captured with other lengths, pages and masks than those it is replayed with."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(8, 2, 64, generator=generator)
    new = torch.randn(8, 1, 64, generator=generator)
    cache = torch.randn(9, 16, 1, 64, generator=generator)
    mask = tree_mask([bush(5), chain(2), [-1]])
    table = torch.randperm(9, generator=generator).view(3, 3).to(torch.int32)
    contexts = torch.tensor([40, 3, 48], dtype=torch.int32)
    lengths = torch.tensor([0, 5, 7, 8], dtype=torch.int32)
    expected = torch.empty_like(q)
    reference.tree_attention(
        q, new, new, cache, cache, table, contexts, lengths, mask, 0.1, expected, sliding_window=20
    )
    inputs = [t.cuda() for t in (q, new, new, cache, cache)]
    varying = [t.cuda() for t in (table, contexts, lengths, mask)]
    held = [torch.zeros_like(t) for t in varying]
    held[2] += torch.tensor([0, 1, 1, 1], dtype=torch.int32, device="cuda")
    out = torch.zeros_like(inputs[0])

    def call() -> None:
        tree_attention(
            *inputs, *held, 0.1, out, sliding_window=20, max_query_len=8, max_context_len=48,
            config=LaunchConfig(16, 16, 4),
        )  # fmt: skip

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for place, tensor in zip(held, varying, strict=True):
        place.copy_(tensor)
    graph.replay()
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 3, 16)}, "3 query heads cannot share 2 KV heads"),
        ({"q": torch.zeros(2, 4, 16, dtype=torch.float64)}, "q is torch.float64"),
        ({"q": torch.zeros(2, 16, 4).transpose(1, 2)}, "last dimension of q is not contiguous"),
        ({"block_table": torch.zeros(1, 2)}, "block_table is torch.float32, not int32"),
        ({"tree_mask": torch.zeros(3, 1, dtype=torch.int32)}, "tree_mask has shape"),
        ({"value_cache": torch.zeros(2, 4, 2, 16).half()}, "keys are torch.float32, values"),
        ({"k_scale": torch.ones(2)}, "k_scale is not a float32 tensor of one element"),
        ({"config": LaunchConfig(1, 16, 1)}, "block_m 1 is less than a group of 2 heads"),
        (
            {"config": LaunchConfig(16, 16, 2), "buffers": scratch(1, 4, 16, 2, "cpu")},
            "buffers are too small",
        ),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(change, message) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 4, 16), "k_new": torch.zeros(2, 2, 16), "v_new": torch.zeros(2, 2, 16),
        "key_cache": torch.zeros(2, 4, 2, 16), "value_cache": torch.zeros(2, 4, 2, 16),
        "block_table": torch.zeros(1, 2, dtype=torch.int32),
        "context_lens": torch.zeros(1, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 2], dtype=torch.int32),
        "tree_mask": torch.ones(2, 1, dtype=torch.int32), "scale": 1.0,
        "out": torch.zeros(2, 4, 16),
    }  # fmt: skip
    arguments |= change
    if arguments["q"].shape != (2, 4, 16):
        arguments["out"] = torch.zeros(arguments["q"].shape)
    with pytest.raises(ValueError, match=message):
        tree_attention(**arguments)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 32])
@pytest.mark.parametrize("num_rows, requests", [(1, 1), (27, 1), (27 * 64, 64), (250, 1)])
def test_launch_config(head_dim, group, num_rows, requests) -> None:
    config = launch_config(
        num_rows=num_rows, num_kv_heads=8, group=group, head_dim=head_dim, block_size=16,
        max_query_len=num_rows // requests, max_context_len=4096,
    )  # fmt: skip
    assert max(16, group) <= config.block_m <= 128
    assert config.block_m & config.block_m - 1 == 0
    if num_rows <= 27:
        tiles = -(-num_rows // (config.block_m // group))
        assert tiles * 8 * config.num_splits > 132  # batch 1 must fill the GPU
    if requests == 64:
        assert config.num_splits == 1


def test_short_contexts_are_not_split() -> None:
    config = launch_config(
        num_rows=1, num_kv_heads=1, group=1, head_dim=64, block_size=16, max_query_len=1,
        max_context_len=100,
    )  # fmt: skip
    assert config.num_splits == 1


def test_the_oracles_do_without_triton() -> None:
    code = "import sys, vllm_ouroboros.kernels.reference; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
