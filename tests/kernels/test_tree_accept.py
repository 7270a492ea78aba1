"""Choice and walk on the device against their oracles, and these against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_ouroboros.kernels import reference
from vllm_ouroboros.kernels.tree_accept import accept_trees, choose_tokens
from vllm_ouroboros.trees.draft_tree import walk

SLOW = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def starts(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def choose(device: str, logits: torch.Tensor, *tensors, chunk: int = 16384, **more):
    """The kernel's choice, and the oracle's."""
    results = []
    for function, place, extra in (
        (choose_tokens, device, {"chunk": chunk}), (reference.choose_tokens, "cpu", {}),
    ):  # fmt: skip
        predicted = torch.full((len(logits),), -7)
        moved = [None if t is None else t.to(place) for t in tensors]
        named = {name: t.to(place) for name, t in more.items()}
        predicted = predicted.to(place)
        function(logits.to(place), *moved, predicted, **named, **extra)
        results.append(predicted.cpu())
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab, chunk", [(1, 16), (50, 16), (3000, 1024), (3000, 16384)])
def test_greedy_takes_the_first_of_equals(dtype, vocab, chunk, device) -> None:
    """Few values, so that each row has its greatest many times, in several chunks."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(0, 3, (6, vocab), generator=generator).to(dtype)
    logits[4] = float("-inf")
    sizes, depths = starts([2, 0, 3]), torch.zeros(6, dtype=torch.int32)
    got, wanted = choose(device, logits, sizes, depths, None, chunk=chunk)
    assert got.tolist() == wanted.tolist()
    assert got[:5].tolist() == np.argmax(logits[:5].float().numpy(), 1).tolist()
    assert got[5] == -7  # padding


@SLOW
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    vocab=st.integers(2, 70),
    seeded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_noise_belongs_to_a_place(sizes, vocab, seeded, seed, device) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    logits = torch.randn(total + 1, vocab, generator=generator) * 2
    temperatures = torch.tensor([0.0, 0.7, 1.3])[
        torch.randint(0, 3, (len(sizes),), generator=generator)
    ]
    depths = torch.randint(0, 4, (total + 1,), generator=generator, dtype=torch.int32)
    more = {"noise": -torch.empty(len(sizes), 4, vocab).exponential_(generator=generator).log()}
    if seeded:
        seeds = torch.randint(-(2**62), 2**62, (len(sizes),), generator=generator)
        more = {"seeds": seeds, "positions": torch.arange(len(sizes)) * 1000}
    got, wanted = choose(device, logits, starts(sizes), depths, temperatures, chunk=32, **more)
    assert got.tolist() == wanted.tolist()


def test_rows_of_one_depth_share_their_noise(device) -> None:
    """The same logits at the same place make the same choice, in any tree and row."""
    logits = torch.zeros(6, 5000)
    depths = torch.tensor([0, 1, 1, 0, 1, 2], dtype=torch.int32)
    got, _ = choose(
        device, logits, starts([3, 3]), depths, torch.ones(2),
        seeds=torch.tensor([5, 5]), positions=torch.tensor([10, 9], dtype=torch.int32),
    )  # fmt: skip
    assert got[1] == got[2] and got[0] == got[4] and got[1] == got[5]
    assert len({int(got[0]), int(got[1]), int(got[3])}) == 3


def test_philox_of_zeros_is_the_published_answer() -> None:
    """Random123's known answer for Philox-4x32-10."""
    assert reference.philox(0, torch.tensor([0]), 0).tolist() == [0x6627E8D5]
    tokens = torch.tensor([0xFFFFFFFF, 0, 3])
    assert reference.philox(2**64 - 1 - 2**64, tokens, 7).unique().numel() == 3


def test_gumbel_noise_has_its_distribution() -> None:
    """Kolmogorov-Smirnov distance to exp(-exp(-x)), and a fine tail."""
    noise = reference.gumbel_noise(3, 0, torch.arange(400_000)).double().sort().values
    ideal = (-(-noise).exp()).exp()
    steps = torch.arange(1, len(noise) + 1) / len(noise)
    assert (ideal - steps).abs().max() < 1.63 / math.sqrt(len(noise))  # 1 % level
    assert noise.isfinite().all()
    assert noise[-100:].unique().numel() == 100


def accept(device: str, *tensors: torch.Tensor, depth: int, stops: torch.Tensor | None = None):
    """Path, length and tokens of the kernel; they must be the oracle's."""
    requests = len(tensors[2]) - 1
    results = []
    for function, place in ((accept_trees, device), (reference.accept_trees, "cpu")):
        outs = [
            torch.full(shape, -9, dtype=torch.int32, device=place)
            for shape in ((requests, depth), (requests,), (requests, depth + 1))
        ]
        own = None if stops is None else stops.to(place)
        function(*(t.to(place) for t in tensors), *outs, stops=own)
        results.append([out.cpu().tolist() for out in outs])
    assert results[0] == results[1]
    return results[0]


@SLOW
@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 6, 30, 70]), min_size=1, max_size=3),
    depth=st.sampled_from([1, 2, 5, 80]),
    letters=st.integers(1, 3),
    chains=st.booleans(),
    stops=st.sampled_from([None, [-1], [2, -1], [0, 1]]),
    seed=st.integers(0, 2**31),
)
def test_walks(sizes, depth, letters, chains, stops, seed, device) -> None:
    """Few letters: many children agree, some of them are equal."""
    generator = np.random.default_rng(seed)
    parents, tokens, predicted = [], [], []
    for size in sizes:
        own = [i - 1 if chains else int(generator.integers(0, max(i, 1))) for i in range(size)]
        parents.append(np.array([-1, *own[1:]][:size], np.int32))
        tokens.append(generator.integers(0, letters, size))
        predicted.append(generator.integers(0, letters, size))
    flat = [torch.from_numpy(np.concatenate(part)) for part in (tokens, parents, predicted)]
    ends = None
    if stops is not None:
        ends = torch.tensor([stops] * len(sizes))
    path, lengths, chosen = accept(
        device, flat[0], flat[1], starts(sizes), flat[2], depth=depth, stops=ends
    )
    for r, size in enumerate(sizes):
        assert path[r][lengths[r] :] == [-1] * (depth - lengths[r])
        assert chosen[r][lengths[r] + bool(size) :] == [-1] * (depth + (not size) - lengths[r])
        if size and stops is None and depth == 80:  # the walk of the CPU path, by nodes
            nodes = np.empty(size, np.int32)
            count = walk(tokens[r][1:], parents[r][1:] - 1, size - 1, predicted[r], nodes)
            assert path[r][: lengths[r]] == (nodes[:count] + 1).tolist()


def test_a_walk_that_crosses_tiles(device) -> None:
    """A chain of 150 rows, and a child 120 rows behind its parent."""
    chain = torch.arange(-1, 149, dtype=torch.int32)
    far = torch.tensor([-1, *[0] * 130], dtype=torch.int32)
    tokens = torch.cat([torch.arange(150), torch.arange(131)])
    predicted = torch.cat([torch.arange(1, 151), torch.full((131,), 125)])
    path, lengths, chosen = accept(
        device, tokens, torch.cat([chain, far]), starts([150, 131]), predicted, depth=150
    )
    assert lengths == [149, 1]
    assert path[1][0] == 125
    assert chosen[1][:2] == [125, 125]


def test_a_row_without_choice_ends_the_walk(device) -> None:
    tokens = torch.tensor([4, -1, -1])
    parents = torch.tensor([-1, 0, 1], dtype=torch.int32)
    path, _, chosen = accept(
        device, tokens, parents, starts([3]), torch.tensor([-1, -1, 3]), depth=2
    )
    assert path == [[-1, -1]] and chosen == [[-1, -1, -1]]


def test_what_the_kernels_cannot_read_is_refused() -> None:
    rows, one = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    logits, sizes = torch.zeros(2, 5), starts([2])
    with pytest.raises(ValueError, match="temperatures without noise"):
        choose_tokens(logits, sizes, rows, torch.ones(1), rows)
    with pytest.raises(ValueError, match="which of the two"):
        choose_tokens(
            logits, sizes, rows, torch.ones(1), rows, noise=torch.ones(1, 1, 5), seeds=one.long()
        )
    with pytest.raises(ValueError, match="seeds without positions"):
        choose_tokens(logits, sizes, rows, torch.ones(1), rows, seeds=one.long())
    with pytest.raises(ValueError, match=r"depths has shape \(1,\), not \(2,\)"):
        choose_tokens(logits, sizes, one, None, rows)
    with pytest.raises(ValueError, match=r"out_tokens has shape \(1, 3\), not \(1, 4\)"):
        accept_trees(rows, rows, sizes, rows, one.expand(1, 3).clone(), one, one.expand(1, 3))
