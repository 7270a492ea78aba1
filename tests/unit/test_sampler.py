"""Acceptance against vLLM's own batch and sampler, which decode one token at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import SamplingType
from vllm.v1.sample import logits_processor
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    LogitsProcessor,
    process_dict_updates,
)
from vllm.v1.sample.sampler import Sampler

from vllm_ouroboros.sampler import Verified, greedy, verify
from vllm_ouroboros.token_sampler import Sampled, TokenSampler, build_processors
from vllm_ouroboros.tree import ROOT, DraftTree, NodeSource

from .fakes import Language, engine_config, input_batch, node_paths, request_state, trie

CPU = torch.device("cpu")
VOCAB = 12
EOS = frozenset([11])
COUNT, DEEPEST = 16, 5  # tokens of the reference, nodes of a path
MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """One thread, which tiny tensors like best, and no look for plugins at each turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(logits_processor, "_load_logitsprocs_plugins", list)
        yield
    torch.set_num_threads(threads)


# -- logits processors of users --------------------------------------------------------------------


class History(AdapterLogitsProcessor):
    """Bumps a token that depends on the output, and for some requests on the prompt."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params):
        bump = (params.extra_args or {}).get("bump", 0)

        def by_output(output, logits):
            logits[(sum(output) + len(output)) % VOCAB] += bump
            return logits

        def by_both(prompt, output, logits):
            logits = logits.clone()
            logits[(sum(prompt) + 5 * sum(output[-2:])) % VOCAB] += bump
            return logits

        return {True: by_output, False: by_both}[bump > 0] if bump else None


class Sharpen(LogitsProcessor):
    """Sharpens every other distribution; what it keeps of a request is as live as vLLM's list."""

    ouroboros_stateless = True

    def __init__(self, vllm_config, device, is_pin_memory) -> None:
        self.outputs: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update) -> None:
        process_dict_updates(
            self.outputs,
            batch_update,
            lambda params, _, output: output if (params.extra_args or {}).get("sharpen") else None,
        )

    def apply(self, logits):
        for row, output in self.outputs.items():
            logits[row] *= 1 + len(output) % 2
        return logits


CUSTOM = (History, Sharpen)


# -- random requests and trees ---------------------------------------------------------------------


def random_params(rng: np.random.Generator, custom: bool) -> SamplingParams:
    """Parameters of any kind; a quarter of them plain greedy ones."""
    kinds = 0.0 if rng.random() < 0.25 else 0.25
    keys: dict = {"max_tokens": 64, "temperature": 0}
    if kinds and rng.random() < 0.7:
        keys["temperature"] = float(rng.choice([0.3, 0.8, 1.0, 1.5]))

    def maybe(key, make, chance=kinds) -> None:
        if rng.random() < chance:
            keys[key] = make()

    def ids(low: int, high: int) -> list[int]:
        return rng.choice(VOCAB, int(rng.integers(low, high + 1)), replace=False).tolist()

    maybe("seed", lambda: int(rng.integers(0, 2**31)), 0.5)
    maybe("top_k", lambda: int(rng.integers(1, VOCAB + 3)))
    maybe("top_p", lambda: float(rng.uniform(0.1, 1)))
    maybe("min_p", lambda: float(rng.uniform(0.01, 0.4)))
    maybe("repetition_penalty", lambda: float(rng.choice([0.7, 1.4])))
    maybe("presence_penalty", lambda: float(rng.choice([-0.9, 1.1])))
    maybe("frequency_penalty", lambda: float(rng.choice([-0.4, 0.8])))
    maybe("logit_bias", lambda: {i: float(rng.choice([-3, 4])) for i in ids(1, 3)})
    maybe("allowed_token_ids", lambda: ids(9, VOCAB))
    maybe("min_tokens", lambda: int(rng.integers(1, 9)))
    maybe("stop_token_ids", lambda: ids(1, 2), 0.3)
    maybe("ignore_eos", lambda: True, 0.5)
    maybe("logprobs", lambda: int(rng.integers(0, 4)), 0.4 if kinds else 0)
    maybe("bad_words", lambda: ["a word"])
    if custom:
        # vLLM sharpens the logprobs of a greedy request only where a drawn one shares its batch
        sharpen = rng.random() < 0.5 and keys["temperature"] > 0
        keys["extra_args"] = {"bump": float(rng.choice([-4, 0, 4])), "sharpen": bool(sharpen)}
    params = SamplingParams(**keys)
    params.update_from_generation_config({}, eos_token_id=next(iter(EOS)))
    if params.bad_words:  # what vLLM makes of them with a tokenizer
        params._bad_words_token_ids = [ids(1, 1), ids(2, 2), ids(3, 3)]
    return params


def make_tree(paths) -> DraftTree:
    nodes = trie([tuple(p) for p in paths], 10**9)
    index = {(): ROOT, **{path: i for i, path in enumerate(nodes)}}
    return DraftTree(
        np.array([p[-1] for p in nodes], np.int32),
        np.array([index[p[:-1]] for p in nodes], np.int32),
        np.full(len(nodes), NodeSource.DRAFT, np.int32),
    )


def random_tree(rng: np.random.Generator, truth: list[int]) -> DraftTree | None:
    """A tree around the true continuation: right and wrong branches, deep ones, twins."""
    if rng.random() < 0.15:
        return None
    paths = []
    for _ in range(rng.integers(1, 5)):
        path = [*truth[: rng.integers(0, DEEPEST + 1)], *rng.integers(0, VOCAB, DEEPEST)]
        path = path[: rng.integers(1, DEEPEST + 1)]
        if rng.random() < 0.3:
            path[rng.integers(0, len(path))] = int(rng.integers(0, VOCAB))
        paths.append(map(int, path))
    tree = make_tree(paths).prefix(int(rng.integers(1, 24)))
    if rng.random() < 0.3:  # a node that has a brother with the same token, and children of its own
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        twin = int(rng.integers(0, len(tokens)))
        tokens += [tokens[twin], truth[-1]]
        parents += [parents[twin], len(parents)]
        tree = DraftTree(
            np.array(tokens, np.int32),
            np.array(parents, np.int32),
            np.full(len(tokens), NodeSource.SUFFIX, np.int32),
        )
    return tree


def first_child(tree: DraftTree, node: int, token: int) -> int | None:
    pairs = zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)
    return next((i for i, pair in enumerate(pairs) if pair == (node, token)), None)


def follow(tree: DraftTree | None, truth: list[int], stops) -> tuple[list[int], list[int]]:
    """Nodes that the truth runs through, and the tokens that come out; a stop ends both."""
    nodes: list[int] = []
    for length, token in enumerate(truth, 1):
        if tree is None or token in stops:
            return nodes, truth[:length]
        child = first_child(tree, nodes[-1] if nodes else ROOT, token)
        if child is None:
            return nodes, truth[:length]
        nodes.append(child)
    raise AssertionError("the truth is too short for this tree")


# -- the reference ---------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What a request gets of vLLM alone."""

    tokens: list[int]
    tables: list[tuple[torch.Tensor, ...]]  # a token's ids, values and rank
    noise: list[torch.Tensor | None]  # state of its generator before each token and at the end


def logits_of(model: Language, texts, dtype=torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.stack([model.logits(text) for text in texts])).to(dtype)


def one_by_one(
    model, config, sampler, states, stops, dtype=torch.float32, **more
) -> list[Reference]:
    """Decode the requests of ``states`` in one batch that loses those which end."""
    processors = build_processors(config, CPU)
    custom = bool(config.model_config.logits_processors)
    batch = input_batch(VOCAB, processors, custom=custom, **more)
    references: dict[str, Reference] = {}
    for state in states:
        batch.add_request(state)
        noise = state.generator.get_state() if state.generator else None
        references[state.req_id] = Reference([], [], [noise])
    by_id = {state.req_id: (state, own) for state, own in zip(states, stops, strict=True)}
    for _ in range(COUNT):
        batch.condense()
        batch.refresh_metadata()
        if not batch.req_ids:
            break
        live = [by_id[req_id] for req_id in batch.req_ids]
        texts = [[*s.prompt_token_ids, *s.output_token_ids] for s, _ in live]
        output = sampler(logits_of(model, texts, dtype), batch.sampling_metadata)
        ended = []
        for row, (state, own) in enumerate(live):
            token = int(output.sampled_token_ids[row, 0])
            state.output_token_ids.append(token)
            found = references[state.req_id]
            found.tokens.append(token)
            if output.logprobs_tensors is not None:
                found.tables.append(tuple(table[row] for table in output.logprobs_tensors[:3]))
            found.noise.append(state.generator.get_state() if state.generator else None)
            if token in own:
                ended.append(state.req_id)
        for req_id in ended:
            batch.remove_request(req_id)
    return [references[state.req_id] for state in states]


def emitted_tokens(output) -> list[list[int]]:
    result = []
    for row in output.sampled_token_ids.tolist():
        tokens = [t for t in row if t != -1]
        assert row == tokens + [-1] * (len(row) - len(tokens)), "a hole in the output"
        result.append(tokens)
    return result


class Counting(TokenSampler):
    """Counts the rows that are sampled."""

    rows = 0

    def after_text(self, logits, *args):
        self.rows += len(logits)
        return super().after_text(logits, *args)

    def after_paths(self, logits, *args):
        self.rows += len(logits)
        return super().after_paths(logits, *args)


class Case:
    """Some requests, what vLLM alone makes of them, and the same requests under speculation."""

    def __init__(self, seed: int, mode: str, dtype: torch.dtype, custom: bool) -> None:
        rng = self.rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.model, self.mode, self.dtype = Language(seed, VOCAB, surprise=3), mode, dtype
        config = engine_config(processors=CUSTOM if custom else ())
        self.states, self.requests, alone = {}, {}, []
        for i in range(int(rng.integers(1, 6))):
            name, params = f"r{i}", random_params(rng, custom)
            prompt = rng.integers(0, VOCAB, rng.integers(1, 6)).tolist()
            seeded = params.sampling_type == SamplingType.RANDOM_SEED
            generator = torch.Generator().manual_seed(params.seed) if seeded else None
            state = request_state(name, prompt, params, generator=generator)
            request = Sampled.of(state, EOS, custom, CPU)
            self.states[name], self.requests[name] = state, request
            noise = request.generator and request.generator.clone_state()
            if seeded:  # the stream that the user asked for, whatever ours does
                noise = torch.Generator().manual_seed(params.seed)
            alone.append(request_state(name, prompt, params, generator=noise))
        stops = [request.stops for request in self.requests.values()]
        sampler = Sampler(logprobs_mode=mode)
        found = one_by_one(self.model, config, sampler, alone, stops, dtype)
        self.references = dict(zip(self.states, found, strict=True))
        self.sampler = Counting(Sampler(logprobs_mode=mode), build_processors(config, CPU))
        self.batch = input_batch(VOCAB, build_processors(config, CPU), custom=custom)
        self.prompt_steps = {name: int(rng.choice([0, 0, 0, 1, 2])) for name in self.states}

    def over(self, name: str) -> bool:
        """Whether a request has ended, or the reference has no tokens for another tree."""
        emitted = self.states[name].output_token_ids
        ended = bool(emitted) and emitted[-1] in self.requests[name].stops
        return ended or len(emitted) + DEEPEST + 1 > COUNT

    def recompose(self) -> None:
        """Requests join the batch, end, are preempted and come back."""
        rng, there = self.rng, self.batch.req_id_to_index
        for name in self.states:
            if name in there and (self.over(name) or rng.random() < 0.15):
                self.batch.remove_request(name)
        for name, state in self.states.items():
            if name not in there and not self.over(name) and rng.random() < 0.8:
                self.batch.add_request(state)
        self.batch.condense()
        self.batch.refresh_metadata()

    def step(self) -> None:
        """One step of the engine: trees for some of the batch, and all that must hold of it."""
        rng, names = self.rng, self.batch.req_ids
        unfinished = {r for r, name in enumerate(names) if self.prompt_steps[name]}
        texts, rows, trees, truths = [], [], [], []
        for r, name in enumerate(names):
            state = self.states[name]
            text = [*state.prompt_token_ids, *state.output_token_ids]
            truths.append(self.references[name].tokens[len(state.output_token_ids) :])
            tree = None
            if r not in unfinished:
                tree = random_tree(rng, truths[-1])
            trees.append(tree)
            rows.append(len(texts))
            texts += [[*text, *path] for path in [(), *(node_paths(tree) if tree else [])]]
            if tree is None and rng.random() < 0.3:
                texts += [[0]] * 3  # rows of placeholders
        logits = logits_of(self.model, texts, self.dtype)
        likeliest = logits.float().argmax(-1).tolist()
        requests = [self.requests[name] for name in names]
        before = [q.generator.get_state() if q.generator else None for q in requests]
        self.sampler.rows = 0
        verified, output = verify(
            self.sampler, logits, np.array(rows), trees, requests, unfinished,
            self.batch.sampling_metadata,
        )  # fmt: skip
        assert output.sampled_token_ids.dtype == torch.int32
        emitted = emitted_tokens(output)
        assert self.sampler.rows == sum(
            1 if request.plain else len(tokens)
            for request, tokens in zip(requests, emitted, strict=True)
        )
        for r, name in enumerate(names):
            if r in unfinished:
                assert len(emitted[r]) == 1, "one token, which vLLM discards"
                assert verified[r] is None
                assert_same_noise(requests[r], before[r])
                self.prompt_steps[name] -= 1
                continue
            nodes, expected = follow(trees[r], truths[r], requests[r].stops)
            assert emitted[r] == expected
            self.check_tree(verified[r], trees[r], nodes, expected, likeliest[rows[r] :])
            self.check_logprobs(name, output, r, expected)
            self.states[name].output_token_ids += expected
            length = len(self.states[name].output_token_ids)
            assert_same_noise(requests[r], self.references[name].noise[length])

    def check_tree(self, found: Verified | None, tree, nodes, expected, likeliest) -> None:
        assert (found is None) == (tree is None)
        if found is None:
            return
        assert found.tree is tree
        assert found.path.tolist() == nodes
        predicted = likeliest[: 1 + len(tree.tokens)]
        for node, token in zip([ROOT, *nodes], expected, strict=True):
            predicted[node + 1] = token
        assert found.predicted.tolist() == predicted

    def check_logprobs(self, name: str, output, r: int, expected: list[int]) -> None:
        wanted = self.states[name].sampling_params.logprobs
        asked = [self.states[n].sampling_params.logprobs for n in self.batch.req_ids]
        assert (output.logprobs_tensors is None) == all(one is None for one in asked)
        if wanted is None:
            return
        first = len(self.states[name].output_token_ids)
        width = output.sampled_token_ids.shape[1]
        for depth in range(len(expected)):
            ids, values, rank = (table[r * width + depth] for table in output.logprobs_tensors[:3])
            theirs = self.references[name].tables[first + depth]
            assert ids[0] == expected[depth]
            torch.testing.assert_close(
                values[: 1 + wanted], theirs[1][: 1 + wanted], atol=1e-6, rtol=0
            )
            assert rank == theirs[2]
            if self.dtype == torch.float32:  # equals are in no order in half precision
                assert ids[: 1 + wanted].tolist() == theirs[0][: 1 + wanted].tolist()


def assert_same_noise(request: Sampled, state: torch.Tensor | None) -> None:
    assert (request.generator is None) == (state is None)
    if state is not None:
        assert torch.equal(request.generator.get_state(), state)


@given(
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    custom=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_speculation_changes_nothing(seed, mode, dtype, custom) -> None:
    """Tokens, logprobs and the use of noise are those of one token at a time, in any batch."""
    case = Case(seed, mode, dtype, custom)
    for _ in range(12):
        case.recompose()
        if case.batch.req_ids:
            case.step()


def run_alone(params: SamplingParams, tree: DraftTree, texts) -> tuple[list[int], Verified]:
    """Verify one request's tree, whose rows have 9 at the given tokens and 0 elsewhere."""
    config = engine_config()
    state = request_state("x", [1], params)
    batch = input_batch(VOCAB, build_processors(config, CPU))
    batch.add_request(state)
    batch.refresh_metadata()
    sampler = TokenSampler(Sampler(), build_processors(config, CPU))
    logits = 9 * torch.nn.functional.one_hot(torch.tensor(texts), VOCAB).float()
    [found], output = verify(
        sampler, logits, np.zeros(1, np.int64), [tree], [Sampled.of(state, EOS, False, CPU)],
        set(), batch.sampling_metadata,
    )  # fmt: skip
    return emitted_tokens(output)[0], found


@pytest.mark.parametrize("penalty", [1.0, 1.001])
def test_a_stop_inside_the_path_ends_it(penalty) -> None:
    """The stop comes last, as the token after the path, though the tree goes on."""
    tree = make_tree([[1, 2, 3, 4]])
    for stop, expected in ((9, [1, 2, 3, 4, 5]), (3, [1, 2, 3]), (1, [1]), (4, [1, 2, 3, 4])):
        params = SamplingParams(temperature=0, stop_token_ids=[stop], repetition_penalty=penalty)
        tokens, found = run_alone(params, tree, [1, 2, 3, 4, 5])
        assert tokens == expected
        assert found.path.tolist() == [*range(len(expected) - 1)]
        assert found.predicted.tolist() == [1, 2, 3, 4, 5]
    assert run_alone(SamplingParams(temperature=0), make_tree([[11, 2]]), [11, 2, 3])[0] == [11]
    params = SamplingParams(temperature=0, ignore_eos=True, repetition_penalty=penalty)
    assert run_alone(params, make_tree([[11, 2]]), [11, 2, 3])[0] == [11, 2, 3]


def test_a_plain_request_chooses_as_the_sampler_does() -> None:
    """The walk by argmax and vLLM's sampler agree on equal logits, in half precision too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.zeros(4, VOCAB, dtype=dtype)
        logits[0, [2, 5]] = 1.0
        logits[1, [0, 11]] = 1.0
        logits[2, [7, 3, 9]] = torch.inf
        logits[3, :] = -torch.inf
        assert greedy(logits).tolist() == Sampler.greedy_sample(logits.float()).tolist()


def test_a_budget_of_thoughts_beside_trees() -> None:
    """vLLM's thinking budget ends the thoughts of its request, whatever the others draft."""
    model, config = Language(5, VOCAB, surprise=3), engine_config()
    thinking = {"reasoning_start_token_ids": [3], "reasoning_end_token_ids": [4, 5]}
    more = {"reasoning_config": SimpleNamespace(**thinking)}
    given_params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1, seed=4, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, seed=5, thinking_token_budget=3),
    ]

    def states():
        for i, params in enumerate(given_params):
            noise = None if i == 0 else torch.Generator().manual_seed(params.seed)
            yield request_state(f"r{i}", [7, 3, i], params, generator=noise)

    references = one_by_one(model, config, Sampler(), [*states()], [()] * 3, **more)
    assert references[2].tokens[2:4] == [4, 5], "its prompt has thought one token already"
    batch = input_batch(VOCAB, build_processors(config, CPU), num_spec_tokens=DEEPEST, **more)
    live = [*states()]
    requests = [Sampled.of(state, frozenset(), False, CPU) for state in live]
    for state in live:
        batch.add_request(state)
    sampler = TokenSampler(Sampler(), build_processors(config, CPU))
    while len(live[2].output_token_ids) < 8:
        batch.refresh_metadata()
        texts, rows, trees = [], [], []
        for state, reference in zip(live, references, strict=True):
            truth = reference.tokens[len(state.output_token_ids) :]
            tree = DraftTree.chain([truth[0]]) if state is not live[2] else None
            trees.append(tree)
            rows.append(len(texts))
            text = [*state.prompt_token_ids, *state.output_token_ids]
            texts += [[*text, *path] for path in [(), *(node_paths(tree) if tree else [])]]
        _, output = verify(
            sampler, logits_of(model, texts), np.array(rows), trees, requests, set(),
            batch.sampling_metadata,
        )  # fmt: skip
        for state, tokens in zip(live, emitted_tokens(output), strict=True):
            state.output_token_ids += tokens
    for state, reference in zip(live, references, strict=True):
        assert state.output_token_ids == reference.tokens[: len(state.output_token_ids)]
    assert len(live[0].output_token_ids) == len(live[1].output_token_ids) == 16


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_table_of_chosen_ids_leaves_one_token_each(temperature) -> None:
    """`logprob_token_ids` of one request: vLLM's table for it has no room for several tokens."""
    model, config = Language(7, VOCAB), engine_config()
    params = SamplingParams(temperature=temperature, logprob_token_ids=[2, 7])
    states = [
        request_state("x", [1], SamplingParams(temperature=0)),
        request_state("y", [2], params),
    ]
    batch = input_batch(VOCAB, build_processors(config, CPU))
    for state in states:
        batch.add_request(state)
    batch.refresh_metadata()
    tree = make_tree([model.greedy([1], 3)])
    logits = logits_of(model, [[1], *([1, *path] for path in node_paths(tree)), [2]])
    verified, output = verify(
        TokenSampler(Sampler(), build_processors(config, CPU)),
        logits,
        np.array([0, 4]),
        [tree, None],
        [Sampled.of(state, EOS, False, CPU) for state in states],
        set(),
        batch.sampling_metadata,
    )
    assert verified == [None, None]
    assert [len(tokens) for tokens in emitted_tokens(output)] == [1, 1]
    assert output.sampled_token_ids[0, 0] == logits[0].argmax()
    ids, values = output.logprobs_tensors[:2]
    assert ids[1, 1:].tolist() == [2, 7]
    torch.testing.assert_close(values[1, 1:], logits.log_softmax(-1)[4, [2, 7]])
