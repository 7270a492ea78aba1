"""Acceptance against greedy decoding, with vLLM's own sampler behind it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_ouroboros.sampler import can_speculate, sample, verify
from vllm_ouroboros.tree import DraftTree, NodeSource

from .fakes import Language, node_paths, trie

VOCAB = 8


def greedy_metadata(num_requests: int, logprobs: int | None = None) -> SamplingMetadata:
    zeros = torch.zeros(num_requests)
    return SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None,
        generators={}, max_num_logprobs=logprobs, no_penalties=True, prompt_token_ids=None,
        frequency_penalties=zeros, presence_penalties=zeros, repetition_penalties=zeros + 1,
        output_token_ids=[[] for _ in range(num_requests)], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip


def make_tree(paths) -> DraftTree:
    nodes = trie([tuple(p) for p in paths], 10**9)
    index = {(): -1, **{path: i for i, path in enumerate(nodes)}}
    return DraftTree(
        np.array([p[-1] for p in nodes], np.int32),
        np.array([index[p[:-1]] for p in nodes], np.int32),
        np.full(len(nodes), NodeSource.DRAFT, np.int32),
    )


def logits_of(model: Language, text: list[int], paths, noise: np.random.Generator) -> torch.Tensor:
    """Logits of each path's row: the model's token for the whole sequence is on top."""
    rows = []
    for path in paths:
        row = torch.from_numpy(noise.standard_normal(VOCAB)).float()
        row[model([*text, *path])] = 9.0
        rows.append(row)
    return torch.stack(rows)


class Batch:
    """Random requests with random trees near the target's own text, and their logits."""

    def __init__(self, seed: int, with_padding: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.model = Language(seed, VOCAB, surprise=3)
        self.texts, self.trees, self.stops, rows, parts = [], [], [], [], []
        for _ in range(rng.integers(1, 5)):
            text = rng.integers(0, VOCAB, rng.integers(1, 6)).tolist()
            self.texts.append(text)
            stops = frozenset(rng.integers(0, VOCAB, rng.integers(0, 2)).tolist())
            self.stops.append(stops)
            tree = None
            if rng.random() < 0.8:
                paths = []
                for _ in range(rng.integers(1, 5)):
                    path = self.model.greedy(text, 6)
                    if rng.random() < 0.7:
                        path[rng.integers(0, 6)] = int(rng.integers(0, VOCAB))
                    paths.append(path)
                tree = make_tree(paths).prefix(int(rng.integers(1, 20)))
            self.trees.append(tree)
            rows.append(sum(map(len, parts)))
            parts.append(
                logits_of(self.model, text, [(), *(node_paths(tree) if tree else [])], rng)
            )
            if with_padding and tree is None and rng.random() < 0.5:
                parts.append(torch.randn(3, VOCAB))  # rows of placeholders
        self.logits = torch.cat(parts)
        self.rows = np.array(rows, np.int64)

    def expected(self, r: int) -> list[int]:
        """Greedy decoding, as long as the tree goes along; a stop ends it."""
        paths = [(), *(node_paths(self.trees[r]) if self.trees[r] else [])]
        emitted: list[int] = []
        while tuple(emitted) in paths:
            emitted.append(self.model([*self.texts[r], *emitted]))
            if emitted[-1] in self.stops[r]:
                break
        return emitted


def emitted_tokens(output) -> list[list[int]]:
    result = []
    for row in output.sampled_token_ids.tolist():
        tokens = [t for t in row if t != -1]
        assert row == tokens + [-1] * (len(row) - len(tokens)), "a hole in the output"
        result.append(tokens)
    return result


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=80, deadline=None)
def test_the_output_is_greedy_decoding(seed, dtype) -> None:
    batch = Batch(seed, with_padding=True)
    logits = batch.logits.to(dtype)
    verified, last = verify(logits, batch.rows, batch.trees, batch.stops, accept=True)
    metadata = greedy_metadata(len(batch.trees))
    output = sample(Sampler(), logits, batch.rows, verified, last, metadata)
    assert emitted_tokens(output) == [batch.expected(r) for r in range(len(batch.trees))]
    assert output.logprobs_tensors is None
    assert output.sampled_token_ids.dtype == torch.int32
    for found, tree, text in zip(verified, batch.trees, batch.texts, strict=True):
        assert (found is None) == (tree is None)
        if found is not None:
            assert found.tree is tree
            paths = [(), *node_paths(tree)]
            assert found.predicted.tolist() == [batch.model([*text, *path]) for path in paths]


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_not_accepting_gives_one_token_each(seed) -> None:
    batch = Batch(seed)
    verified, last = verify(batch.logits, batch.rows, batch.trees, batch.stops, accept=False)
    assert verified == [None] * len(batch.trees)
    assert last.tolist() == batch.rows.tolist()
    metadata = greedy_metadata(len(batch.trees))
    output = sample(Sampler(), batch.logits, batch.rows, verified, last, metadata)
    assert emitted_tokens(output) == [[batch.model(text)] for text in batch.texts]


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits"])
@pytest.mark.parametrize("seed", range(6))
def test_logprobs_are_those_of_decoding_one_token_at_a_time(mode, seed) -> None:
    batch, top = Batch(seed), 3
    verified, last = verify(batch.logits, batch.rows, batch.trees, batch.stops, accept=True)
    sampler, metadata = Sampler(logprobs_mode=mode), greedy_metadata(len(batch.trees), top)
    output = sample(sampler, batch.logits.clone(), batch.rows, verified, last, metadata)
    found = output.logprobs_tensors
    assert found is not None
    emitted = emitted_tokens(output)
    width = output.sampled_token_ids.shape[1]
    for r, tokens in enumerate(emitted):
        nodes = node_paths(batch.trees[r]) if batch.trees[r] else []
        for depth, token in enumerate(tokens):
            path = tuple(tokens[:depth])
            row = batch.rows[r] + (1 + nodes.index(path) if path else 0)
            logits = batch.logits[[row]]
            alone = sampler(logits.clone(), greedy_metadata(1, top))
            assert alone.sampled_token_ids.item() == token
            at = r * width + depth
            for mine, theirs in zip(found[:3], alone.logprobs_tensors[:3], strict=True):
                torch.testing.assert_close(mine[at], theirs[0])
    assert found.logprobs.shape == (len(emitted) * width, top + 1)


def test_a_stop_inside_the_path_ends_it() -> None:
    """The stop comes last, as the token after the path, though the tree goes on."""
    tree = make_tree([[1, 2, 3, 4]])
    logits = torch.nn.functional.one_hot(torch.tensor([1, 2, 3, 4, 5]), VOCAB).float()
    for stop, expected in ((9, [1, 2, 3, 4, 5]), (3, [1, 2, 3]), (1, [1]), (4, [1, 2, 3, 4])):
        stops = [frozenset([stop])]
        verified, last = verify(logits, np.zeros(1, np.int64), [tree], stops, True)
        output = sample(
            Sampler(), logits, np.zeros(1, np.int64), verified, last, greedy_metadata(1)
        )
        assert emitted_tokens(output) == [expected]
        assert last.tolist() == [len(expected) - 1]


def test_ties_go_to_the_token_that_the_sampler_would_take() -> None:
    """The walk and vLLM's sampler must agree on equal logits, in half precision too."""
    logits = torch.zeros(3, VOCAB, dtype=torch.bfloat16)
    logits[0, [2, 5]] = 1.0
    logits[1, [0, 7]] = 1.0
    tree = make_tree([[2, 0]])
    rows = np.zeros(1, np.int64)
    verified, last = verify(logits, rows, [tree], [frozenset()], True)
    output = sample(Sampler(), logits, rows, verified, last, greedy_metadata(1))
    one_by_one = [
        Sampler()(logits[[i]], greedy_metadata(1)).sampled_token_ids.item() for i in range(3)
    ]
    assert emitted_tokens(output) == [one_by_one]


def test_random_requests_beside_a_tree_keep_their_own_stream() -> None:
    """A request with one row is sampled as if no tree were in the batch."""
    tree = make_tree([[1, 2]])
    own = torch.nn.functional.one_hot(torch.tensor([1, 2, 3]), VOCAB).float() * 9
    other = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    mixed = greedy_metadata(2)
    mixed.all_greedy = False
    mixed.temperature = torch.tensor([0.0, 1.0])
    mixed.generators = {1: torch.Generator().manual_seed(11)}
    rows = np.array([0, 3], np.int64)
    logits = torch.cat([own, other])
    verified, last = verify(logits, rows, [tree, None], [frozenset()] * 2, True)
    output = sample(Sampler(), logits, rows, verified, last, mixed)
    plain = greedy_metadata(2)
    plain.all_greedy = False
    plain.temperature = torch.tensor([0.0, 1.0])
    plain.generators = {1: torch.Generator().manual_seed(11)}
    alone = Sampler()(torch.cat([own[:1], other]), plain)
    assert emitted_tokens(output) == [[1, 2, 3], [alone.sampled_token_ids[1].item()]]


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.5}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1}, {"logit_bias": {1: 1.0}}, {"min_tokens": 2},
        {"allowed_token_ids": [1]}, {"bad_words": ["a"]}, {"thinking_token_budget": 4},
        {"structured_outputs": StructuredOutputsParams(json_object=True)},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_only_plain_greedy_requests_speculate(changes) -> None:
    assert can_speculate(SamplingParams(temperature=0))
    assert not can_speculate(SamplingParams(**{"temperature": 0, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_token_ids": [1]}, {"stop": ["x"]}, {"logprobs": 3}, {"seed": 1}, {"max_tokens": 1},
        {"ignore_eos": True}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.1},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_what_does_not_change_the_argmax_does_not_hinder(changes) -> None:
    assert can_speculate(SamplingParams(**{"temperature": 0, **changes}))


def test_a_pooling_request_does_not_speculate() -> None:
    assert not can_speculate(None)
