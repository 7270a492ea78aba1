"""An engine around the proposer, on stand-ins for models."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors

from vllm_ouroboros.draft.rounds import MAX_CATCH_UP
from vllm_ouroboros.integration import draft_of_rank as module
from vllm_ouroboros.integration.live_requests import LiveRequests
from vllm_ouroboros.integration.proposer import OuroborosProposer
from vllm_ouroboros.trees.draft_tree import ROOT, DraftTree, NodeSource, child_of
from vllm_ouroboros.trees.packing import pack_trees, unpack_trees
from vllm_ouroboros.trees.request_state import BRANCHES
from vllm_ouroboros.verify.acceptance import Verified

from .fake_draft import BLOCK, LIVE, NUM_BLOCKS, FakeSampler, choose, clone, said
from .fakes import Language, node_paths, request_state, trie


def make(monkeypatch, draft, *, budget=10, max_num_seqs=4, max_rows=256, max_len=80, eos=1, **keys):
    """A proposer with a fake draft model (None: pool only)."""
    monkeypatch.setattr(module, "DraftModel", lambda path, config: draft)
    options = {"draft_tokens": 4, "phrase_len": 3, "window_size": 2, "guess_set_size": 3, **keys}
    if draft is not None:
        options["draft_model"] = "fake"
        draft.max_rows = max_rows
    config = SimpleNamespace(
        additional_config={"ouroboros": options},
        num_speculative_tokens=budget,
        model_config=SimpleNamespace(
            max_model_len=max_len,
            seed=0,
            get_vocab_size=lambda: 2**20,
            try_get_generation_config=lambda: {"eos_token_id": [eos]},
            hf_text_config=SimpleNamespace(to_dict=lambda: {"eos_token_id": None}),
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_rows
        ),
    )
    return OuroborosProposer(config)


class Table:
    """Block table of a batch."""

    def __init__(self, rows: int, max_len: int) -> None:
        self.block_size = BLOCK
        self.table = np.zeros((rows, max_len // BLOCK + 16), np.int32)
        self.num_blocks_per_row = np.zeros(rows, np.int32)
        self.block_table = SimpleNamespace(np=self.table)


def runner(**more) -> SimpleNamespace:
    return SimpleNamespace(**{"device": torch.device("cpu"), "forwards_overlap": False, **more})


def bound(proposer: OuroborosProposer, processors=(), **more) -> OuroborosProposer:
    """A proposer in a runner with these attributes."""
    sampler = SimpleNamespace(processors=LogitsProcessors(processors))
    proposer.bind(runner(**more), sampler)
    return proposer


def state_of(name: str = "a", **params):
    return request_state(name, [3, 4], SamplingParams(**{"temperature": 0, **params}))


class Sequence:
    """A request as the engine sees it."""

    def __init__(self, name: str, prompt: list[int], params: SamplingParams, tenant=None) -> None:
        self.name, self.text, self.prompt, self.params = name, list(prompt), len(prompt), params
        self.generator = None
        if params.temperature:
            self.generator = torch.Generator().manual_seed(params.seed)
        self.state = request_state(name, prompt, params, generator=self.generator)
        self.tenant = tenant
        self.computed = 0
        self.blocks: list[int] = []
        self.draft: list[int] = []
        self.running = False

    @property
    def left(self) -> int:
        return self.params.max_tokens - (len(self.text) - self.prompt)


class Engine:
    """Schedules, verifies with the target, and calls the proposer as vLLM's runner does.

    Attributes:
        exact: whether drafts must be all that fixed trees hold; not where drafting breaks off.
        told: the trees that a rank that follows has, by request.
    """

    exact = True

    def __init__(
        self, proposer, draft, target: Language, seed: int, max_len: int, overlap: bool = False
    ) -> None:
        self.proposer, self.draft, self.target, self.max_len = proposer, draft, target, max_len
        self.rng = np.random.default_rng(seed)
        self.free = list(range(1, NUM_BLOCKS))
        self.sequences: list[Sequence] = []
        self.told: dict[str, SimpleNamespace] = {}
        self.expected = {"steps": 0, "emitted_tokens": 0, "accepted_tokens": 0}
        self.runner = runner(forwards_overlap=overlap)
        sampler = FakeSampler(draft)
        sampler.runner = self.runner
        proposer.bind(self.runner, sampler)
        if proposer.rounds is not None:
            proposer.rounds.cache.allocate(NUM_BLOCKS)

    def allocate(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.blocks) * BLOCK < tokens:
            sequence.blocks.append(self.free.pop(0))

    def preempt(self, sequence: Sequence) -> None:
        self.proposer.requests.suspend(sequence.name)
        self.free += sequence.blocks
        sequence.blocks, sequence.computed, sequence.draft = [], 0, []
        sequence.running = False

    def finish(self, sequence: Sequence) -> None:
        self.proposer.requests.forget(sequence.name)
        self.free += sequence.blocks
        self.sequences.remove(sequence)

    def step(self) -> None:
        rng, proposer = self.rng, self.proposer
        order = rng.permutation(len(self.sequences))
        batch = [self.sequences[i] for i in order if rng.random() < 0.85] or self.sequences[:1]
        for sequence in list(self.sequences):
            if sequence not in batch and sequence.running and rng.random() < 0.3:
                self.preempt(sequence)
        for sequence in batch:
            if not sequence.running and sequence.name in proposer.requests:
                proposer.requests.resume(sequence.name, sequence.computed)
            elif not sequence.running:
                proposer.requests.admit(
                    sequence.name, sequence.state, sequence.computed, sequence.tenant
                )
            sequence.running = True
        if rng.random() < 0.9:  # else the step had no forward
            proposer.deferred.catch_up()

        size = len(batch)
        table = Table(size, self.max_len)
        token_ids = np.full((size, self.max_len), 7, np.int32)
        scheduled, verified, emitted = {}, {}, []
        computed = np.array([s.computed for s in batch], np.int32)
        for row, s in enumerate(batch):
            waiting = len(s.text) - s.computed
            decoding = waiting == 1 and len(s.text) > s.prompt
            draft: list[int] = []
            if decoding:
                draft = s.draft
                if draft and rng.random() < 0.3:  # cut, or put in the place of the list
                    draft = draft[: int(rng.integers(0, len(draft) + 1))]
                take = 1
            else:
                take = int(rng.integers(1, waiting + 1))
            assert len(draft) <= max(0, s.left - 1), "nodes that can never be output"
            assert len(s.text) + len(draft) < self.max_len or not draft
            scheduled[s.name] = take + len(draft)
            ahead = int(rng.choice([0, 3, proposer.budget + 1]))
            self.allocate(s, min(s.computed + take + len(draft) + ahead, self.max_len))
            tokens: list[int] = []
            if s.computed + take == len(s.text):
                tree = proposer.requests.tree_of(s.name, draft) if draft else None
                if tree is not None:
                    other = LiveRequests.tree_of(
                        SimpleNamespace(_requests=self.told), s.name, draft
                    )
                    assert np.array_equal(tree.parents, other.parents), "ranks verify other trees"
                found, tokens = self.verify(s, tree)
                if found is not None:
                    verified[s.name] = found
                s.state.output_token_ids += tokens
                self.expected["steps"] += 1
                self.expected["emitted_tokens"] += len(tokens)
                self.expected["accepted_tokens"] += len(tokens) - 1
                s.text += tokens
            emitted.append(tokens)
            token_ids[row, : len(s.text)] = s.text
            table.table[row, : len(s.blocks)] = s.blocks
            table.num_blocks_per_row[row] = len(s.blocks)
        lengths = np.array([len(s.text) for s in batch], np.int32)
        self.runner.input_batch = SimpleNamespace(
            req_ids=[s.name for s in batch],
            num_prompt_tokens=np.array([s.prompt for s in batch]),
            num_computed_tokens_cpu=computed,
            block_table=[table],
            sampling_metadata=LIVE,
        )
        self.runner.verified, self.runner.scheduled_tokens = verified, scheduled
        noise = [s.generator and s.generator.get_state() for s in batch]
        drafts = proposer.propose(emitted, lengths, token_ids)
        token_ids[:] = -7  # rows go to others
        trees = unpack_trees(*pack_trees([proposer.requests[s.name].tree for s in batch]))
        self.told |= {s.name: SimpleNamespace(tree=t) for s, t in zip(batch, trees, strict=True)}
        for s, state in zip(batch, noise, strict=True):
            assert s.generator is None or torch.equal(s.generator.get_state(), state)
        assert len(drafts) == size
        for s, tokens, draft in zip(batch, emitted, drafts, strict=True):
            s.computed = len(s.text) - 1 if tokens else s.computed + scheduled[s.name]
            s.draft = draft
            self.check(s, len(tokens))
        for s, tokens in zip(batch, emitted, strict=True):
            ended = bool(tokens) and (tokens[-1] == 1 or len(s.text) >= self.max_len)
            if ended or s.left <= 0:
                self.finish(s)

    def verify(self, s: Sequence, tree: DraftTree | None) -> tuple[Verified | None, list[int]]:
        """Walk a tree with the target; what was found, and the tokens that come out."""
        request = self.proposer.requests[s.name].sampling
        assert request.generator is s.generator
        paths = [(), *(node_paths(tree) if tree is not None else [])]
        predicted = np.array([self.target([*s.text, *p]) for p in paths], np.int64)
        tokens: list[int] = []
        path: list[int] = []
        while True:
            tokens.append(choose(self.target.logits([*s.text, *tokens]), s.generator))
            node = path[-1] if path else ROOT
            predicted[node + 1] = tokens[-1]
            if tree is None:
                return None, tokens
            child = child_of(tree.tokens, tree.parents, len(tree.tokens), node, tokens[-1])
            if child < 0 or tokens[-1] in request.stops:
                return Verified(tree, np.array(path, np.int32), predicted), tokens
            path.append(child)

    def check(self, s: Sequence, emitted: int) -> None:
        proposer = self.proposer
        request = proposer.requests[s.name]
        state = proposer.drafting.state
        cached = int(state.cached[request.slot])
        tree = request.tree
        chain: list[int] = []
        if s.draft:
            assert tree.tokens.tolist() == s.draft
            paths = node_paths(tree)
            assert len(set(paths)) == len(paths) <= proposer.budget
            assert tree.is_chain or not request.chain_only
            chain = state.chain[request.slot, : state.chain_len[request.slot]].tolist()
            drafted = [tuple(chain), *self.branches(s, chain)] if chain else []
            nodes = trie(drafted, int(state.node_limit[request.slot]))
            drawn = tree.sources == NodeSource.DRAFT
            if self.exact:
                assert paths[: len(nodes)] == nodes
                assert drawn.tolist() == [i < len(nodes) for i in range(len(paths))]
        if self.draft is None:
            assert chain == []
            return
        text = (*s.text, *chain)
        for p in range(cached):
            assert self.draft.kv[self.draft.slot(s.blocks, p)] == text[: p + 1]
        capacity = min(len(s.blocks) * BLOCK, self.draft.max_len)
        if not self.exact:
            pass
        elif not emitted:  # a prompt is cached as it comes
            assert cached >= min(s.computed, capacity)
        elif chain:
            assert cached >= min(len(s.text) - 1, capacity) - MAX_CATCH_UP
        assert chain == said(self.draft.model, s.text, len(chain), (1,), clone(s.generator))

    def branches(self, s: Sequence, chain: list[int]) -> list[tuple[int, ...]]:
        """What the draft model would say if the chain's token, and then the next in line, were
        not there: each with the token after it, where the draft model knows the text.
        """
        request, state = self.proposer.requests[s.name], self.proposer.drafting.state
        if request.sampling.argmax_only or request.chain_only:
            return []
        known = state.cached[request.slot] >= len(s.text)
        result = []
        noise = clone(s.generator)
        for place, width in enumerate(BRANCHES[: len(chain)]):
            context = [*s.text, *chain[:place]]
            logits = self.draft.model.logits(context)
            logits[chain[place]] = -np.inf
            after = clone(noise)
            choose(logits, after)
            for rank in range(width):
                token = choose(logits, clone(noise))
                logits[token] = -np.inf
                path = (*chain[:place], token)
                asked = known or state.branch_next[request.slot, place, rank] >= 0
                if token != 1 and asked:  # which ends a text
                    path += (choose(self.draft.model.logits([*context, token]), clone(after)),)
                result.append(path)
            noise = after
        return result
