"""Tree attention on the CPU, over vLLM's own pages, against the oracle in float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vllm_ouroboros.verify.cpu.attention import check_layout

from ...helpers.attention_forward import Forward, chain, close, forwards, make_impl, random_tree


@given(forward=forwards())
@settings(max_examples=40, deadline=None)
def test_forward_is_the_oracle(vllm_config, forward) -> None:
    impl = make_impl(forward.heads, forward.kv_heads, forward.dim)
    close(forward.run(impl, forward.step()), forward.expected(), forward.dtype)


@pytest.mark.parametrize(
    "dtype, isa",
    [(torch.float32, None), (torch.bfloat16, "vec"), (torch.bfloat16, None)],
    ids=["float32", "bfloat16", "bfloat16-fastest"],
)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_grouped_heads(vllm_config, group, dtype, isa) -> None:
    rng = np.random.default_rng(group)
    forward = Forward(
        [(40, random_tree(rng, 9), True), (3, chain(5), False), (64, random_tree(rng, 20), True)],
        heads=2 * group, kv_heads=2, dtype=dtype, isa=isa,
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
from vllm_ouroboros.verify.cpu.attention_kernel import numba, share_threads
shared = share_threads(2)
print(shared, numba.get_num_threads(), torch.get_num_threads())
"""


def test_the_kernel_runs_on_the_threads_of_torch_and_leaves_them() -> None:
    """Bound to a core, numba would take one thread for itself and for OpenMP as a whole."""
    run = [sys.executable, "-P", "-c", THREADS]
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert found == (["True", "2", "2"] if found[0] == "True" else ["False", "1", "2"])


COMPILED = """
import torch
from vllm_ouroboros.verify.cpu.attention import check_layout
from vllm_ouroboros.verify.cpu.attention_kernel import tree_attention
check_layout("vec", torch.float32, 32, 64)
print(len(tree_attention.stats.cache_hits), len(tree_attention.stats.cache_misses))
"""


def test_a_process_finds_what_another_one_has_compiled() -> None:
    """An engine would start a quarter of a minute later."""
    check_layout("vec", torch.float32, 32, 64)
    run = [sys.executable, "-P", "-c", COMPILED]
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[-1] == "1 0"


AMX = """
import numba, numpy as np
from vllm_ouroboros.verify.cpu.attention_kernel import tree_attention
from vllm_ouroboros.verify.cpu.page_layouts import Amx
bits, places, exact = (lambda *shape, kind=k: np.zeros(shape, kind) for k in ("u2", "i8", "f4"))
given = (
    Amx(), bits(4, 2, 64), bits(2, 1, 2, 64 * 32), places(1, 1).astype("i4"), places(1), places(2),
    bits(4, 1, 64), bits(4, 1, 64), places(4, 1).astype("i4"), np.float32(1), -1, np.float32(0),
    exact(4, 2, 64),
)
tree_attention.compile(tuple(map(numba.typeof, given)))
[code] = tree_attention.inspect_asm().values()
print("tdpbf16ps" in code, "ldtilecfg" in code)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs LLVM's x86 part")
def test_the_kernel_of_the_amx_layout_compiles_anywhere(tmp_path) -> None:
    """On this CPU, too, which may not be able to run it."""
    features = ["amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq"]
    settings = {
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": ",".join("+" + one for one in features),
        "NUMBA_OPT": "0",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    run = [sys.executable, "-P", "-c", AMX]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.stdout.split() == ["True", "True"], done.stderr[-2000:]
