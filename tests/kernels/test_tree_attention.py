"""The Triton tree attention against its oracle in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from attention_cases import FP8, Case, bush, chain, tree_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_ouroboros.kernels.launch import GPU
from vllm_ouroboros.kernels.tree_attention import (
    LaunchConfig,
    launch_config,
    scratch,
    tree_attention,
)


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


def test_buffers_limit_the_splits_that_are_chosen_here(device) -> None:
    launch = Case(config=None, contexts=[300]).check(device)
    assert launch.config.num_splits > 1
    buffers = scratch(4, 2, 16, launch.config.num_splits - 1, device)
    fewer = Case(config=None, contexts=[300], options={"buffers": buffers}).check(device)
    assert fewer.config.num_splits == launch.config.num_splits - 1


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


@pytest.mark.parametrize("kib", [227, 163, 99, 48])
@pytest.mark.parametrize("head_dim, itemsize", [(64, 2), (128, 2), (256, 2), (256, 4)])
def test_a_program_fits_the_shared_memory(kib, head_dim, itemsize) -> None:
    config = launch_config(
        num_rows=64, num_kv_heads=8, group=4, head_dim=head_dim, block_size=16, max_query_len=64,
        max_context_len=4096, itemsize=itemsize, gpu=GPU("", 100, kib * 1024),
    )  # fmt: skip
    tiles = config.block_m + 2 * config.num_stages * config.block_n
    assert tiles * head_dim * itemsize <= kib * 1024
    assert config.block_m >= 16
    assert config.block_n >= 16


def test_the_oracles_do_without_triton() -> None:
    code = "import sys, vllm_ouroboros.kernels.reference; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
