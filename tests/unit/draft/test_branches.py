"""Branches beside the chain of a request that samples: what the same noise has next in line."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.sampler import Sampler

from vllm_ouroboros.draft.sampling import DraftSampling
from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.drafting import Drafting
from vllm_ouroboros.trees.request_state import BRANCHES
from vllm_ouroboros.verify.token_sampler import RequestSampling, TokenSampler, build_processors

from ..helpers.fakes import ancestors, engine_config, input_batch, node_paths, request_state

VOCAB = 12
TEXT = [1, 2, 3]


def make_drafting(budget: int = 26, stops=(), draft_tokens: int = 5) -> Drafting:
    return Drafting(
        PhrasePool(64, 4, 3), max_requests=4, budget=budget, draft_tokens=draft_tokens,
        num_suffixes=2, window_size=2, max_len=64, stops=stops,
    )  # fmt: skip


def branched(drafting: Drafting, chain: list[int], branches: dict) -> int:
    """A request with a chain and branches {(place, rank): (token, token after it or -1)}."""
    slot, state = drafting.add(), drafting.state
    drafting.start(slot, len(TEXT), drafting.budget, 64)
    state.chain[slot, : len(chain)], state.chain_len[slot] = chain, len(chain)
    for (place, rank), (token, follow) in branches.items():
        state.branches[slot, place, rank] = token
        state.branch_next[slot, place, rank] = follow
    return slot


def build(drafting: Drafting, slot: int):
    text = np.array([TEXT], np.int32)
    drafting.build(np.array([slot]), np.zeros(1, np.int64), text)
    return drafting.tree(slot)


def test_branches_stand_beside_the_chain() -> None:
    drafting = make_drafting(stops=(9,))
    slot = branched(
        drafting,
        [5, 6, 7],
        {(0, 0): (8, 4), (0, 1): (9, 4), (1, 0): (2, -1), (3, 0): (1, 10)},
    )
    assert node_paths(build(drafting, slot)) == [
        (5,), (5, 6), (5, 6, 7),
        (8,), (8, 4),
        (9,),  # a stop: nothing follows
        (5, 2),
        (5, 6, 7, 1), (5, 6, 7, 1, 10),
    ]  # fmt: skip


def test_branches_come_before_phrases_and_after_the_chain() -> None:
    drafting = make_drafting(budget=5)
    drafting.pool.insert(6, [7, 7, 7], PhraseSource.PROMPT)
    slot = branched(drafting, [5, 6], {(0, 0): (8, 4), (1, 0): (9, 9)})
    assert node_paths(build(drafting, slot)) == [(5,), (5, 6), (8,), (8, 4), (5, 9)]


def test_a_new_draft_forgets_its_branches() -> None:
    drafting = make_drafting()
    slot = branched(drafting, [5, 6], {(0, 0): (8, 4)})
    drafting.start(slot, 4, 26, 64)
    drafting.state.chain[slot, 0], drafting.state.chain_len[slot] = 5, 1
    assert node_paths(build(drafting, slot)) == [(5,)]


def test_the_rows_that_ask_what_follows() -> None:
    """Each branch sees the committed text, the chain up to its place, and itself."""
    drafting = make_drafting()
    slots = [
        branched(drafting, [5, 6, 7], {(0, 0): (8, -1), (0, 2): (9, -1), (2, 1): (10, -1)}),
        branched(drafting, [4], {(1, 0): (3, -1)}),
    ]
    out, total, which = drafting.plan_branches(np.array(slots))
    assert which.tolist() == [[0, 0, 0], [0, 0, 2], [0, 2, 1], [1, 1, 0]]
    starts = out.query_start_loc.tolist()
    assert starts[-1] == total
    assert out.context_lens.tolist() == [3, 3]
    assert (out.writes[:total] == -1).all()
    asked = []
    for (r, _, _), row in zip(which.tolist(), out.logits_rows, strict=False):
        parents = out.parents[starts[r] : starts[r + 1]].tolist()
        path = ancestors(parents, int(row) - starts[r])
        tokens = [int(out.tokens[starts[r] + i]) for i in path]
        asked.append(tokens)
        assert out.positions[row] == len(TEXT) + len(tokens) - 1
    assert asked == [[8], [9], [5, 6, 10], [4, 3]]


class Model:
    """Random logits of a sequence, the same each time."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, sequence) -> torch.Tensor:
        digest = self.seed
        for token in sequence:
            digest = (digest * 1_000_003 + int(token) + 17) % 2_147_483_647
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(digest)) * 2


def runner_of(params: SamplingParams):
    """A runner with one request, and the request."""
    generator = torch.Generator().manual_seed(params.seed)
    state = request_state("a", TEXT, params, generator=generator)
    batch = input_batch(VOCAB, LogitsProcessors())
    batch.add_request(state)
    batch.refresh_metadata()
    return SimpleNamespace(input_batch=batch), state


def one(sampler, live, request, path, logits) -> int:
    """The sampler's token for one row."""
    found = sampler.after_paths(logits[None].clone(), live, [0], [request], [path])
    return int(found.sampled_token_ids[0, 0])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "changes", [{}, {"top_p": 0.8}, {"repetition_penalty": 1.4}, {"min_p": 0.1, "min_tokens": 3}]
)
def test_drafting_by_noise(seed, changes) -> None:
    """The chain is what the draft model alone would sample with a copy of the request's noise; a
    branch is what that noise picks without those before it; what follows it has the next noise.
    """
    params = SamplingParams(**{"temperature": 0.9, "seed": seed, "max_tokens": 40, **changes})
    runner, state = runner_of(params)
    live = runner.input_batch.sampling_metadata
    request = RequestSampling.of(state, frozenset(), False, torch.device("cpu"))
    config = engine_config(max_num_seqs=4)  # fewer than there are branches
    processors = build_processors(config, torch.device("cpu"))
    sampler, model = TokenSampler(Sampler(), processors), Model(seed)

    drafting, text = make_drafting(), np.array([TEXT], np.int32)
    drafting.pool.insert(3, [model(TEXT).argmax(), 1], PhraseSource.PROMPT)
    slot = drafting.add()
    slots, rows = np.array([slot]), np.zeros(1, np.int64)
    drafting.start(slot, len(TEXT), 26, 64)
    sampling = DraftSampling(sampler, runner, drafting, {slot: request.with_noise_copy()})
    while not drafting.state.done[slot]:
        out, total, wanted = drafting.plan(slots, rows, text)
        start = int(out.context_lens[0])
        known = [*TEXT, *drafting.state.chain[slot].tolist()][:start]
        paths = [
            [*known, *(int(out.tokens[i]) for i in ancestors(out.parents[:total].tolist(), row))]
            for row in out.logits_rows[:wanted].tolist()
        ]
        logits = torch.stack([model(path) for path in paths])
        predicted = np.zeros(total, np.int64)
        predicted[out.logits_rows[:wanted]] = logits.argmax(-1)
        sampling.choose(slots, rows, out, logits, predicted)
        drafting.absorb(slots, out, predicted)

    noise, chain, places = request.with_noise_copy(), [], []
    while len(chain) < int(drafting.state.chain_len[slot]):
        places.append(noise.with_noise_copy())
        chain.append(one(sampler, live, noise, chain, model([*TEXT, *chain])))
    assert drafting.state.chain[slot, : len(chain)].tolist() == chain
    assert torch.equal(request.generator.get_state(), places[0].generator.get_state())

    branches = drafting.state.branches[slot]
    for place, most in enumerate(BRANCHES):
        logits, gone = model([*TEXT, *chain[:place]]), [chain[place]]
        for rank in range(most):
            logits[gone] = float("-inf")
            gone.append(one(sampler, live, places[place].with_noise_copy(), chain[:place], logits))
            assert branches[place, rank] == gone[-1]
        assert (branches[place, most:] == -1).all()

    out, total, which = drafting.plan_branches(slots)
    assert len(which) == sum(BRANCHES)
    paths = [[*chain[:place], int(branches[place, rank])] for _, place, rank in which.tolist()]
    logits = torch.stack([model([*TEXT, *path]) for path in paths])
    sampling.follow(slots, rows, which, logits.clone())
    places.append(noise)
    for (_, place, rank), path, row in zip(which.tolist(), paths, logits, strict=True):
        expected = one(sampler, live, places[place + 1].with_noise_copy(), path, row)
        assert drafting.state.branch_next[slot, place, rank] == expected


def test_a_chain_for_a_grammar_has_no_branches() -> None:
    runner, state = runner_of(SamplingParams(temperature=0.9, seed=1))
    request = RequestSampling.of(state, frozenset(), False, torch.device("cpu"))
    drafting, text = make_drafting(), np.array([TEXT], np.int32)
    slots, rows = np.array([drafting.add()]), np.zeros(1, np.int64)
    drafting.start(slots[0], len(TEXT), 26, 64, chain_only=True)
    sampling = DraftSampling(
        TokenSampler(Sampler(), LogitsProcessors()), runner, drafting, {int(slots[0]): request}
    )
    out, total, wanted = drafting.plan(slots, rows, text)
    predicted = np.zeros(total, np.int64)
    sampling.choose(slots, rows, out, torch.randn(wanted, VOCAB), predicted)
    assert (drafting.state.branches == -1).all()
