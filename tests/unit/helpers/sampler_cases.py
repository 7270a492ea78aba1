"""Requests and trees for the sampler, and vLLM's own sampling one token at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from vllm.sampling_params import SamplingType
from vllm.v1.sample.sampler import Sampler

from vllm_ouroboros.trees.draft_tree import ROOT
from vllm_ouroboros.verify.acceptance import Verified, verify
from vllm_ouroboros.verify.token_sampler import RequestSampling, TokenSampler, build_processors

from .fakes import Language, engine_config, input_batch, node_paths, request_state
from .random_requests import (
    COUNT,
    CPU,
    CUSTOM,
    DEEPEST,
    EOS,
    VOCAB,
    follow,
    random_params,
    random_tree,
)

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
            request = RequestSampling.of(state, EOS, custom, CPU)
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
            1 if request.argmax_only else len(tokens)
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


def assert_same_noise(request: RequestSampling, state: torch.Tensor | None) -> None:
    assert (request.generator is None) == (state is None)
    if state is not None:
        assert torch.equal(request.generator.get_state(), state)
