"""Without a seed only the distribution can be compared: it is the model's own, whatever is drafted.

A model of five tokens whose probabilities are known exactly, 20,000 texts of three tokens, and a
chi-square test over all 125 texts. Torch's seed is fixed, so a test passes always or never.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample import logits_processor
from vllm.v1.sample.sampler import Sampler

from vllm_ouroboros.trees.draft_tree import ROOT, DraftTree
from vllm_ouroboros.verify.acceptance import verify
from vllm_ouroboros.verify.token_sampler import RequestSampling, TokenSampler, build_processors

from ..helpers.fakes import Language, engine_config, input_batch, node_paths, request_state

CPU = torch.device("cpu")
VOCAB, LENGTH, TEXTS, BATCH = 5, 3, 20_000, 500
PROMPT = (2, 0, 4)
PARAMS = {"temperature 1": {}, "top_p 0.8": {"top_p": 0.8}}

Text = tuple[int, ...]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def logits(text: Text, seed: int = 6) -> np.ndarray:
    return Language(seed, VOCAB).logits(text)


# -- what should come out --------------------------------------------------------------------------


@cache
def conditional(text: Text, top_p: float) -> np.ndarray:
    """Probabilities of the next token: with top_p of the most probable ones that hold it, vLLM's
    way: a token goes if it and all less probable ones together have at most 1 - top_p.
    """
    weights = np.exp(logits(text).astype(np.float64))
    weights /= weights.sum()
    order = np.argsort(weights)
    gone = np.cumsum(weights[order]) <= 1 - top_p
    gone[-1] = False
    weights[order[gone]] = 0
    return weights / weights.sum()


def exact(top_p: float) -> dict[Text, float]:
    result = {}
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        factors = [conditional((*PROMPT, *text[:i]), top_p)[text[i]] for i in range(LENGTH)]
        result[text] = float(np.prod(factors))
    return result


def p_value(found: Counter[Text], expected: dict[Text, float]) -> float:
    """Chi-square test; texts that are expected fewer than 5 times count as one."""
    total = sum(found.values())
    cells = [(found[text], total * p) for text, p in expected.items() if total * p >= 5]
    rare = (total - sum(n for n, _ in cells), total - sum(e for _, e in cells))
    if rare[1] < 5:  # too few even together: they join the last cell
        cells[-1] = (cells[-1][0] + rare[0], cells[-1][1] + rare[1])
    else:
        cells.append(rare)
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


# -- trees -----------------------------------------------------------------------------------------


@cache
def tree_of(*nodes: tuple[int, int]) -> DraftTree:
    """A tree of (parent, token)."""
    parents, tokens = (np.array(column, np.int32) for column in zip(*nodes, strict=True))
    return DraftTree(tokens, parents, np.ones(len(nodes), np.int32))


def no_tree(text: Text, rng) -> None:
    return None


def wrong(text: Text, rng) -> DraftTree:
    """What the target hardly ever says."""
    return tree_of((ROOT, int(logits(text).argmin())), (0, int(rng.integers(VOCAB))))


def twins(text: Text, rng) -> DraftTree:
    """Brothers with the same token, and different children below them."""
    first, second = rng.integers(0, VOCAB, 2).tolist()
    other = (second + 1) % VOCAB
    return tree_of((ROOT, first), (ROOT, first), (0, second), (1, second), (1, other), (0, second))


def deep(text: Text, rng) -> DraftTree:
    return tree_of(*enumerate(rng.integers(0, VOCAB, 4).tolist(), ROOT))


@cache
def likely_of(text: Text) -> DraftTree:
    nodes: list[tuple[int, int]] = []
    for first in logits(text).argsort()[-2:].tolist():
        nodes.append((ROOT, first))
        at = len(nodes) - 1
        nodes += [(at, second) for second in logits((*text, first)).argsort()[-2:].tolist()]
    return tree_of(*nodes)


def likely(text: Text, rng) -> DraftTree:
    """The two most probable tokens, and the two most probable after each of them."""
    return likely_of(text)


EVERY = tree_of(
    *((ROOT, token) for token in range(VOCAB)), *itertools.product(range(VOCAB), repeat=2)
)


def every(text: Text, rng) -> DraftTree:
    """All tokens, and all tokens after each of them."""
    return EVERY


MAKERS = {maker.__name__: maker for maker in (no_tree, wrong, twins, deep, likely, every)}


# -- draws -----------------------------------------------------------------------------------------


class Engine:
    """A batch of requests that are all alike, drawn again and again."""

    def __init__(self, sampler_class=TokenSampler, **params) -> None:
        config = engine_config(BATCH)
        with pytest.MonkeyPatch.context() as context:
            context.setattr(logits_processor, "_load_logitsprocs_plugins", list)
            processors, own = build_processors(config, CPU), build_processors(config, CPU)
        self.batch = input_batch(VOCAB, processors, BATCH)
        self.sampler = sampler_class(Sampler(), own)
        for i in range(BATCH):
            parameters = SamplingParams(temperature=1, ignore_eos=True, **params)
            self.batch.add_request(request_state(f"r{i}", PROMPT, parameters))
        self.states = [request_state("x", PROMPT, parameters) for _ in range(BATCH)]
        self.batch.refresh_metadata()
        self.live = self.batch.sampling_metadata
        self.accepted = 0
        self.rng = np.random.default_rng(0)

    def same_noise(self, texts: list[Text], requests: list[RequestSampling]) -> list[DraftTree]:
        """Chains of another model, drawn with the noise that the target will use."""
        ahead = [request.with_noise_copy() for request in requests]
        chains: list[list[int]] = [[] for _ in texts]
        for _ in range(2):
            rows = np.stack([logits((*t, *c), 9) for t, c in zip(texts, chains, strict=True)])
            given = torch.from_numpy(rows), self.live, [*range(BATCH)], ahead, chains
            chosen = self.sampler.after_paths(*given).sampled_token_ids[:, 0].tolist()
            chains = [[*chain, token] for chain, token in zip(chains, chosen, strict=True)]
        return [DraftTree.chain(chain) for chain in chains]

    def draw(self, make) -> Counter[Text]:
        """Texts by how often they came."""
        found: Counter[Text] = Counter()
        for _ in range(TEXTS // BATCH):
            requests = [RequestSampling.of(state, frozenset(), False, CPU) for state in self.states]
            texts = [PROMPT] * BATCH
            while min(map(len, texts)) < len(PROMPT) + LENGTH:
                texts = self.step(make, texts, requests)
            found.update(text[len(PROMPT) :][:LENGTH] for text in texts)
        return found

    def step(self, make, texts: list[Text], requests: list[RequestSampling]) -> list[Text]:
        trees: list[DraftTree | None]
        if make == "same noise":
            trees = [*self.same_noise(texts, requests)]
        else:
            trees = [make(text, self.rng) for text in texts]
        rows, parts = [], []
        for r, text in enumerate(texts):
            if len(text) >= len(PROMPT) + LENGTH:
                trees[r] = None  # enough of it is known
            tree = trees[r]
            rows.append(len(parts))
            parts += [logits((*text, *path)) for path in [(), *(node_paths(tree) if tree else [])]]
        _, output = verify(
            self.sampler, torch.from_numpy(np.stack(parts)), np.array(rows), trees, requests,
            set(), self.live,
        )  # fmt: skip
        emitted = [
            tuple(token for token in row if token >= 0) for row in output.sampled_token_ids.tolist()
        ]
        self.accepted += sum(map(len, emitted)) - len(emitted)
        return [(*text, *more) for text, more in zip(texts, emitted, strict=True)]


ALPHA = 0.01


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("make", [*MAKERS, "same noise"])
def test_no_draft_changes_the_distribution(make, params) -> None:
    torch.manual_seed(1 + [*MAKERS, "same noise"].index(make))  # texts of their own for each
    engine = Engine(**PARAMS[params])
    found = engine.draw(MAKERS.get(make, make))
    assert engine.accepted > TEXTS // 20 or make in ("no_tree", "wrong")
    assert p_value(found, exact(PARAMS[params].get("top_p", 1.0))) > ALPHA


# -- the test can fail -----------------------------------------------------------------------------


class ByRatio(TokenSampler):
    """Takes the first node with the probability p / q that rejection sampling gives it, and the
    target's own choice otherwise, drawn with the noise that drafted.
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.drafted: tuple[torch.Tensor, torch.Tensor] | None = None

    def after_paths(self, logits, *args):
        output = super().after_paths(logits.clone(), *args)
        if not any(args[-1]):  # the first token of a draft
            self.drafted = logits.softmax(-1), output.sampled_token_ids.long()
        return output

    def after_text(self, logits, *args):
        p = logits.softmax(-1)
        output = super().after_text(logits, *args)
        q, tokens = self.drafted
        ratio = (p.gather(1, tokens) / q.gather(1, tokens))[:, 0]
        taken = torch.rand(len(ratio)) < ratio
        output.sampled_token_ids[taken] = tokens[taken].int()
        return output


class Rewinds(TokenSampler):
    """Draws the first token of a step with noise that the next one uses again."""

    def after_text(self, logits, live, generators):
        copies = {row: generator.clone_state() for row, generator in generators.items()}
        return super().after_text(logits, live, copies)


class WrongRow(TokenSampler):
    """Draws what follows an accepted path from the logits of the root."""

    def after_text(self, logits, *args):
        self.roots = logits.clone()
        return super().after_text(logits, *args)

    def after_paths(self, logits, live, rows, *args):
        return super().after_paths(self.roots[rows], live, rows, *args)


@pytest.mark.parametrize(
    "broken, make", [(ByRatio, "same noise"), (Rewinds, "likely"), (WrongRow, "likely")]
)
def test_a_broken_sampler_is_found_out(broken, make) -> None:
    torch.manual_seed(1)
    found = Engine(broken).draw(MAKERS.get(make, make))
    assert p_value(found, exact(1.0)) < ALPHA


def test_the_test_of_the_distribution_is_calibrated() -> None:
    """Of 400 samples from the distribution itself, some 1 % fail, and about half are above 0.5."""
    rng, expected = np.random.default_rng(0), exact(1.0)
    texts = [*expected]
    assert sum(expected.values()) == pytest.approx(1)
    counts = rng.multinomial(2000, [expected[text] for text in texts], size=400)
    values = [
        p_value(Counter(dict(zip(texts, map(int, n), strict=True))), expected) for n in counts
    ]
    assert sum(p < ALPHA for p in values) <= 12
    assert 160 <= sum(p > 0.5 for p in values) <= 240
