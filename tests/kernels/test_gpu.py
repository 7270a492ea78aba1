"""What only a GPU shows: all types and head sizes at engines' shapes, and CUDA graphs.

The other tests of this folder run on the GPU, too, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from attention_cases import FP8, Case, bush, chain, tree_mask

from vllm_ouroboros.kernels import reference
from vllm_ouroboros.kernels.kv_compact import kv_compact, kv_layers
from vllm_ouroboros.kernels.tree_accept import accept_trees, choose_tokens
from vllm_ouroboros.kernels.tree_attention import LaunchConfig, launch_config, tree_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TYPES = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp32": (torch.float32, None),
    "fp8 cache": (torch.bfloat16, FP8),
}
SIZES = [*product(TYPES, (64, 80, 96, 128, 256), (1, 4, 8))]
WORDS = (27, 33, 70, 200)  # rows of a tree: masks of 1, 2, 3 and 7 words


@pytest.mark.parametrize("i", range(len(SIZES)), ids=[f"{t}-{d}-{g}" for t, d, g in SIZES])
def test_types_heads_and_groups(i, device) -> None:
    """Each with two of the other settings in turn: mask words, window, soft cap, splits."""
    name, dim, group = SIZES[i]
    dtype, cache_dtype = TYPES[name]
    for turn in (i, i + 7):
        parents = [bush(WORDS[turn % 4], i), [-1], chain(9), []]
        config = launch_config(
            num_rows=sum(map(len, parents)), num_kv_heads=2, group=group, head_dim=dim,
            block_size=16, max_query_len=len(parents[0]), max_context_len=4096,
            itemsize=dtype.itemsize,
        )  # fmt: skip
        Case(
            parents=parents,
            contexts=[150 + turn, 0, 33, 48],
            heads=(2 * group, 2),
            dim=dim,
            page=16,
            dtype=dtype,
            cache_dtype=cache_dtype,
            config=config._replace(num_splits=(1, 4)[turn % 2]),
            window=(None, 40)[turn // 2 % 2],
            soft_cap=(0.0, 20.0)[turn // 4 % 2],
            seed=i,
        ).check(device)


@pytest.mark.parametrize("splits", [1, 3, 8, 32])
@pytest.mark.parametrize("context", [2000, 4099])
def test_long_contexts(splits, context, device) -> None:
    Case(
        parents=[bush(27), bush(27, 1)], contexts=[context, 5], heads=(8, 2), dim=128, page=16,
        dtype=torch.bfloat16, config=LaunchConfig(64, 32, splits),
    ).check(device)  # fmt: skip


def replayed(call: Callable[[], None], held: list[torch.Tensor], later: list[torch.Tensor]) -> None:
    """Capture a call, then replay it with other contents of its tensors."""
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for place, tensor in zip(held, later, strict=True):
        place.copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_in_a_graph_follows_its_inputs(splits, window) -> None:
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
        q, new, new, cache, cache, table, contexts, lengths, mask, 0.1, expected,
        sliding_window=window,
    )  # fmt: skip
    inputs = [t.cuda() for t in (q, new, new, cache, cache)]
    varying = [t.cuda() for t in (table, contexts, lengths, mask)]
    held = [torch.zeros_like(t) for t in varying]
    held[2] += torch.tensor([0, 1, 1, 1], dtype=torch.int32, device="cuda")
    out = torch.zeros_like(inputs[0])

    def call() -> None:
        tree_attention(
            *inputs, *held, 0.1, out, sliding_window=window, max_query_len=8, max_context_len=48,
            config=LaunchConfig(16, 16, splits),
        )  # fmt: skip

    replayed(call, held, varying)
    torch.testing.assert_close(out.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_choice_and_walk_in_a_graph_follow_their_inputs() -> None:
    """Logits, trees and lengths change; the last request is padding at first, then has a tree."""
    generator = torch.Generator().manual_seed(1)
    rows, vocab, depth = 12, 5000, 6
    logits = torch.randn(rows, vocab, generator=generator).bfloat16()
    starts = torch.tensor([0, 5, 6, 11], dtype=torch.int32)
    depths = torch.tensor([0, 1, 1, 2, 3, 0, 0, 1, 2, 3, 4, 0], dtype=torch.int32)
    parents = torch.tensor([-1, 0, 0, 1, 3, -1, -1, 0, 1, 2, 3, -1], dtype=torch.int32)
    temperatures = torch.tensor([0.0, 0.7, 1.3])
    seeds = torch.tensor([5, -(2**60), 77])
    positions = torch.tensor([10, 0, 2**20], dtype=torch.int32)
    predicted = torch.full((rows,), -7)
    reference.choose_tokens(
        logits, starts, depths, temperatures, predicted, seeds=seeds, positions=positions
    )
    # drafts: the choice at the parent, so that walks go down; the last of each tree is wrong
    tokens = predicted.clone()
    for start, end in ((0, 5), (6, 11)):
        for row in range(start + 1, end):
            tokens[row] = predicted[start + parents[row]]
        tokens[end - 1] += 1
    outs = [torch.full(s, -9, dtype=torch.int32) for s in ((3, depth), (3,), (3, depth + 1))]
    reference.accept_trees(tokens, parents, starts, predicted, *outs)
    assert outs[1].tolist() == [2, 0, 3]

    later = [t.cuda() for t in (logits, starts, depths, temperatures, seeds, positions, tokens,
                                parents)]  # fmt: skip
    held = [torch.zeros_like(t) for t in later]
    held[1].copy_(torch.tensor([0, 12, 12, 12]))
    got = [torch.full_like(t, -9, device="cuda") for t in outs]
    chosen = torch.full((rows,), -7, device="cuda")

    def call() -> None:
        chosen.fill_(-7)
        choose_tokens(*held[:4], chosen, seeds=held[4], positions=held[5])
        accept_trees(held[6], held[7], held[1], chosen, *got)

    replayed(call, held, later)
    assert chosen.tolist() == predicted.tolist()
    for own, other in zip(got, outs, strict=True):
        assert own.tolist() == other.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_compaction_in_a_graph_follows_its_inputs(dtype) -> None:
    """Captured with nothing to move, replayed with paths that cross pages, 32 layers."""
    generator = torch.Generator().manual_seed(2)
    shape = (12, 2, 16, 8, 128)
    size = torch.empty(shape, dtype=dtype).nbytes
    whole = [
        torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        for _ in range(32)
    ]  # fmt: skip
    wanted = [w.clone().view(dtype).view(shape) for w in whole]
    got = [w.cuda().view(dtype).view(shape) for w in whole]
    path = torch.tensor([[2, 5, 6, 20, -1], [1, 2, -1, -1, -1], [3, -1, -1, -1, -1]])
    later = [path, torch.tensor([14, 3, 0]), torch.randperm(12, generator=generator).view(3, 4)]
    later = [t.to(torch.int32) for t in later]
    reference.kv_compact([w[:, 0] for w in wanted], [w[:, 1] for w in wanted], *later)
    held = [torch.zeros_like(t, device="cuda") for t in later]
    held[0].fill_(-1)
    layers = kv_layers([w[:, 0] for w in got], [w[:, 1] for w in got])
    replayed(lambda: kv_compact(layers, *held), held, [t.cuda() for t in later])
    for own, other in zip(got, wanted, strict=True):
        assert torch.equal(own.cpu().view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("vocab", [32000, 128256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_at_engines_vocabularies(vocab, dtype) -> None:
    """Greedy rows exactly; with noise, the choice is no worse than the oracle's but for rounding.

    exp and log of a GPU differ from the CPU's in the last place, so two tokens may change places
    where their scores are equal to that.
    """
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(27, vocab, generator=generator).to(dtype)
    starts = torch.tensor([0, 9, 18, 27], dtype=torch.int32)
    depths = torch.arange(27, dtype=torch.int32) % 9
    temperatures = torch.tensor([0.0, 0.5, 1.0])
    seeds = torch.tensor([1, 2, 3])
    positions = torch.tensor([0, 100, 2000], dtype=torch.int32)
    chosen = torch.empty(27, dtype=torch.int64, device="cuda")
    tensors = [t.cuda() for t in (logits, starts, depths, temperatures)]
    choose_tokens(*tensors, chosen, seeds=seeds.cuda(), positions=positions.cuda())
    chosen = chosen.cpu()
    every = torch.arange(vocab)
    for row in range(27):
        request = row // 9
        scores = logits[row].float()
        if temperatures[request]:
            place = int(positions[request] + depths[row])
            noise = reference.gumbel_noise(int(seeds[request]), place, every)
            scores = scores / temperatures[request] + noise
            assert scores.max() - scores[chosen[row]] < 1e-4
        else:
            assert chosen[row] == (scores == scores.max()).nonzero()[0, 0]
