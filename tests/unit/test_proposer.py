"""The proposer between a fake engine and a fake draft model with paged KV."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import LogitsProcessor, LogitsProcessors

from vllm_ouroboros import proposer as module
from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.cpu_worker import OuroborosCPURunner
from vllm_ouroboros.draft_rounds import MAX_KNOWN
from vllm_ouroboros.proposer import OuroborosProposer
from vllm_ouroboros.rounds import BRANCHES
from vllm_ouroboros.sampler import Verified
from vllm_ouroboros.tree import ROOT, DraftTree, NodeSource, child_of

from .fakes import Language, ancestors, node_paths, request_state, trie

BLOCK = 4
NUM_BLOCKS = 400
LIVE = object()  # stands for vLLM's sampling metadata


def choose(logits: np.ndarray, generator: torch.Generator | None) -> int:
    """The most probable token, or one draw of noise."""
    if generator is not None:
        seed = int(torch.randint(2**31, (), generator=generator))
        logits = logits + np.random.default_rng(seed).gumbel(size=len(logits))
    return int(np.argmax(logits))


def clone(generator: torch.Generator | None) -> torch.Generator | None:
    return generator and generator.clone_state()


def said(model: Language, text, count: int, stops, generator=None) -> list[int]:
    """The next ``count`` tokens of a request, up to and including the first stop."""
    emitted: list[int] = []
    while len(emitted) < count and not (emitted and emitted[-1] in stops):
        emitted.append(choose(model.logits([*text, *emitted]), generator))
    return emitted


class FakeDraft:
    """A draft model whose KV in a slot is the whole sequence that its row saw."""

    def __init__(self, model: Language, max_len: int) -> None:
        self.model, self.max_len, self.kv_cache_gid = model, max_len, 0
        self.kv: dict[int, tuple[int, ...]] = {}
        self.forwards, self.max_rows = 0, 0

    def slot(self, blocks, position: int) -> int:
        return int(blocks[position // BLOCK]) * BLOCK + position % BLOCK

    def forward(
        self,
        clock,
        runner,
        requests,
        tokens,
        positions,
        writes,
        query_start_loc,
        context_lens,
        tree,
    ):
        """Sequences that the rows see, in the place of hidden states."""
        del clock
        self.forwards += 1
        if tree is None or len(requests) > 1:  # a round of one request may need more
            assert len(tokens) <= self.max_rows
        table = runner.input_batch.block_table[0].table
        seen: list[tuple[int, ...]] = []
        for r, row in enumerate(requests.tolist()):
            first, end = int(query_start_loc[r]), int(query_start_loc[r + 1])
            context = int(context_lens[r])
            past = self.kv.get(self.slot(table[row], context - 1), ()) if context else ()
            for p in range(context):  # attention reads all of them
                assert self.kv[self.slot(table[row], p)] == past[: p + 1], "KV of several texts"
            assert len(past) == context
            for i in range(end - first):
                path = range(i + 1)
                if tree is not None:
                    mask = tree.mask[first + i].numpy().view(np.uint32)
                    path = [j for j in range(end - first) if mask[j // 32] >> (j % 32) & 1]
                    assert path[-1] == i
                sequence = (*past, *(int(tokens[first + j]) for j in path))
                assert positions[first + i] == min(len(sequence), self.max_len) - 1
                seen.append(sequence)
            for i in range(first, end):
                if writes[i] >= 0:
                    assert writes[i] == len(seen[i]) - 1
                    self.kv[self.slot(table[row], int(writes[i]))] = seen[i]
        assert len(seen) == len(tokens)
        if tree is not None:
            tree.block_table = torch.from_numpy(table[requests])
            tree.kept["layer"] = SimpleNamespace(
                kv_cache=torch.empty(1, 1, BLOCK, 2),
                write=lambda rows, slots: self.kv.update(
                    {int(s): seen[int(row)] for row, s in zip(rows, slots, strict=True)}
                ),
            )
        return seen

    def logits(self, hidden, rows):
        """Logits, and in a last column the place of their row's sequence in ``asked``."""
        self.asked = [hidden[row] for row in rows.tolist()]
        whole = [[*self.model.logits(seen), -1000 - i] for i, seen in enumerate(self.asked)]
        return torch.tensor(whole).reshape(len(self.asked), self.model.vocab + 1)


class FakeSampler:
    """Samples after paths, and checks that each row saw its request's text and path."""

    processors = LogitsProcessors()

    def __init__(self, draft: FakeDraft | None) -> None:
        self.draft, self.runner = draft, None

    def after_paths(self, logits, live, rows, requests, paths, logprobs=True):
        assert live is LIVE
        assert not logprobs
        tokens = []
        for row, batch_row, request, path in zip(
            logits.tolist(), rows, requests, paths, strict=True
        ):
            state = request.state
            assert self.runner.input_batch.req_ids[batch_row] == state.req_id
            text = (*state.prompt_token_ids, *state.output_token_ids, *path)
            assert self.draft.asked[-1000 - int(row[-1])] == text
            tokens.append([choose(np.array(row[:-1]), request.generator)])
        return SimpleNamespace(sampled_token_ids=torch.tensor(tokens))


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
            try_get_generation_config=lambda: {"eos_token_id": [eos]},
            hf_text_config=SimpleNamespace(to_dict=lambda: {"eos_token_id": None}),
        ),
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
    tree_step = partial(OuroborosCPURunner.tree_step, None)
    return SimpleNamespace(
        device=torch.device("cpu"), tree_step=tree_step, nodes_wanted=lambda _: 0, **more
    )


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
    """Schedules, verifies with the target, and calls the proposer as vLLM's runner does."""

    def __init__(self, proposer, draft, target: Language, seed: int, max_len: int) -> None:
        self.proposer, self.draft, self.target, self.max_len = proposer, draft, target, max_len
        self.rng = np.random.default_rng(seed)
        self.free = list(range(1, NUM_BLOCKS))
        self.sequences: list[Sequence] = []
        self.expected = {"steps": 0, "emitted_tokens": 0, "accepted_tokens": 0}
        self.runner = runner()
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
        request = self.proposer.requests[s.name].sampled
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
            assert tree.is_chain or not request.narrow
            chain = state.chain[request.slot, : state.chain_len[request.slot]].tolist()
            drafted = [tuple(chain), *self.branches(s, chain)] if chain else []
            nodes = trie(drafted, int(state.limit[request.slot]))
            assert paths[: len(nodes)] == nodes
            drawn = tree.sources == NodeSource.DRAFT
            assert drawn.tolist() == [i < len(nodes) for i in range(len(paths))]
        if self.draft is None:
            assert chain == []
            return
        text = (*s.text, *chain)
        for p in range(cached):
            assert self.draft.kv[self.draft.slot(s.blocks, p)] == text[: p + 1]
        capacity = min(len(s.blocks) * BLOCK, self.draft.max_len)
        if not emitted:  # a prompt is cached as it comes
            assert cached >= min(s.computed, capacity)
        elif chain:
            assert cached >= min(len(s.text) - 1, capacity) - MAX_KNOWN
        assert chain == said(self.draft.model, s.text, len(chain), (1,), clone(s.generator))

    def branches(self, s: Sequence, chain: list[int]) -> list[tuple[int, ...]]:
        """What the draft model would say if the chain's token, and then the next in line, were
        not there: each with the token after it, where the draft model knows the text.
        """
        request, state = self.proposer.requests[s.name], self.proposer.drafting.state
        if request.sampled.plain or request.narrow:
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
                asked = known or state.follow[request.slot, place, rank] >= 0
                if token != 1 and asked:  # which ends a text
                    path += (choose(self.draft.model.logits([*context, token]), clone(after)),)
                result.append(path)
            noise = after
        return result


_NUMBER = StructuredOutputsParams(regex="[0-9]*")


@given(
    seed=st.integers(0, 2**32 - 1),
    draft_len=st.sampled_from([0, 40, 80]),
    window=st.sampled_from([0, 3]),
    rows=st.sampled_from([24, 256]),
    scope=st.sampled_from(["global", "request"]),
)
@settings(max_examples=60, deadline=None)
def test_an_engines_life(seed, draft_len, window, rows, scope) -> None:
    """Chunked prompts, cut drafts, preemption, rows that change places: text and KV stay right."""
    rng = np.random.default_rng(seed)
    surprise = int(rng.choice([3, 9, 10**9]))
    target = Language(seed, surprise=surprise)
    draft = FakeDraft(Language(seed, surprise=surprise, twist=6), draft_len) if draft_len else None
    with pytest.MonkeyPatch.context() as context:
        proposer = make(
            context, draft, max_rows=rows, window_size=window, pool_scope=scope, num_suffixes=2
        )
    engine = Engine(proposer, draft, target, seed, 80)
    sequences = []
    for i in range(int(rng.integers(1, 6))):
        prompt = rng.integers(2, 8, rng.integers(1, 30)).tolist()
        params = SamplingParams(
            temperature=rng.choice([0, 0, 1]),
            seed=i,
            max_tokens=int(rng.integers(1, 40)),
            repetition_penalty=rng.choice([1, 1.1]),  # no plain argmax, though it is one here
            structured_outputs=_NUMBER if rng.random() < 0.2 else None,
        )
        sequences.append(Sequence(str(i), prompt, params, rng.choice([None, "a", "b"])))
    waiting = list(sequences)
    for _ in range(400):
        while waiting and len(engine.sequences) < 4:
            engine.sequences.append(waiting.pop())
        if not engine.sequences:
            break
        engine.step()
    assert not engine.sequences
    for s in sequences:
        noise = torch.Generator().manual_seed(s.params.seed) if s.params.temperature else None
        expected = said(target, s.text[: s.prompt], len(s.text) - s.prompt, (1,), noise)
        assert s.text[s.prompt :] == expected
        assert len(s.text) <= 80
    stats = proposer.stats()
    assert {key: stats[key] for key in engine.expected} == engine.expected
    assert stats["accepted_from_draft"] + stats["accepted_from_suffix"] == stats["accepted_tokens"]
    assert stats["draft_forwards"] == (draft.forwards if draft else 0)
    assert len(proposer.requests) == 0
    free = sorted(proposer.drafting._free)
    assert free == [0, 1, 2, 3], "a slot was lost or given back twice"


def simple(monkeypatch, **changes) -> OuroborosProposer:
    proposer = bound(make(monkeypatch, None, **changes))
    proposer.requests.admit("a", state_of(), 0, None)
    return proposer


TREE = DraftTree(
    np.array([5, 6, 7, 8], np.int32), np.array([-1, 0, 0, 2], np.int32), np.full(4, 2, np.int32)
)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_cut_list_is_the_same_tree_cut(monkeypatch, size) -> None:
    proposer = simple(monkeypatch)
    proposer.requests["a"].tree = TREE
    tree = proposer.requests.tree_of("a", [5, 6, 7, 8][:size])
    assert tree.parents.tolist() == [-1, 0, 0, 2][:size]
    assert tree.tokens.tolist() == [5, 6, 7, 8][:size]
    assert tree.sources.tolist() == [2] * size


@pytest.mark.parametrize(
    "scheduled, expected",
    [
        ([5, 6, 9], [5, 6, 9]),  # not what was drafted
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9]),  # longer than what was drafted
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([5, -1, -1], [5]),
        ([5, 6, -1, 8], [5, 6]),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_list_that_is_not_ours_is_a_chain(monkeypatch, scheduled, expected, known) -> None:
    proposer = simple(monkeypatch)
    if known:
        proposer.requests["a"].tree = TREE
    tree = proposer.requests.tree_of("a" if known else "stranger", scheduled)
    assert tree.tokens.tolist() == expected
    assert tree.is_chain
    assert (tree.tokens >= 0).all()


@pytest.mark.parametrize("known", [True, False])
def test_placeholders_alone_are_no_tree(monkeypatch, known) -> None:
    proposer = simple(monkeypatch)
    if known:
        proposer.requests["a"].tree = TREE
    assert proposer.requests.tree_of("a", [-1] * 4) is None
    assert proposer.requests.tree_of("b", [-1]) is None


def test_the_engine_s_stops_are_those_of_its_requests(monkeypatch) -> None:
    proposer = bound(make(monkeypatch, None, eos=1))
    proposer.requests.admit("x", state_of(stop_token_ids=[4]), 0, None)
    assert proposer.requests["x"].sampled.stops == {1, 4}


def test_slots_follow_the_life_of_a_request(monkeypatch) -> None:
    proposer = simple(monkeypatch, max_num_seqs=2)
    proposer.requests.suspend("a")
    proposer.requests.suspend("a")
    assert sorted(proposer.drafting._free) == [0, 1]
    proposer.requests.admit("b", state_of("b"), 0, None)
    proposer.requests.resume("a", 12)
    assert proposer.drafting.state.cached[proposer.requests["a"].slot] == 12
    proposer.requests.suspend("b")
    proposer.requests.forget("b")
    proposer.requests.forget("b")
    proposer.requests.forget("nobody")
    proposer.requests.suspend("nobody")
    proposer.requests.forget("a")
    assert sorted(proposer.drafting._free) == [0, 1]


def test_a_session_goes_on_with_its_noise(monkeypatch) -> None:
    """vLLM admits a request again when its input goes on: the slot is new, the noise is not."""
    proposer = bound(make(monkeypatch, None, max_num_seqs=1))
    first = state_of(temperature=1, seed=3)
    noise = first.generator = torch.Generator().manual_seed(3)
    proposer.requests.admit("a", first, 0, None)
    torch.rand(5, generator=noise)
    for _ in range(2):
        again = state_of(temperature=1, seed=3)
        proposer.requests.admit("a", again, 7, None)
        request = proposer.requests["a"]
        assert request.sampled.generator is noise
        assert request.sampled.state is again
        assert proposer.drafting.state.cached[request.slot] == 7


def lora(name: str, number: int) -> SimpleNamespace:
    return SimpleNamespace(lora_name=name, lora_int_id=number)


@pytest.mark.parametrize("scope", ["global", "request"])
def test_phrases_stay_with_the_tenant(monkeypatch, scope) -> None:
    """Requests share phrases if salt and adapter are the same, and the pool is not per request."""
    proposer = bound(make(monkeypatch, None, max_num_seqs=32, pool_scope=scope))
    tenants = [
        (None, None), ("x", None), ("y", None), ("", None), (None, lora("p", 1)),
        (None, lora("q", 2)), (None, lora("p", 2)), ("x", lora("p", 1)),
    ]  # fmt: skip
    scopes = []
    for turn in range(2):
        for i, (salt, adapter) in enumerate(tenants):
            state = state_of()
            state.lora_request = adapter
            name = f"{turn}-{i}"
            proposer.requests.admit(name, state, 0, salt)
            proposer.requests.suspend(name)
            proposer.requests.resume(name, 0)
            slot = proposer.requests[name].slot
            scopes.append(int(proposer.drafting.state.scope[slot]))
            assert scopes[-1] == proposer.requests[name].scope
    if scope == "request":
        assert len({0, *scopes}) == 1 + 2 * len(tenants)
    else:
        assert scopes[: len(tenants)] == scopes[len(tenants) :]
        assert len(set(scopes)) == len(tenants)
        assert scopes[0] == 0


def test_an_unbound_proposer_says_what_to_do(monkeypatch) -> None:
    proposer = make(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"--worker-cls.*VLLM_PLUGINS"):
        proposer.load_model(None)


def test_a_wrong_setting_is_refused(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="draft_tokens = 0"):
        make(monkeypatch, None, draft_tokens=0)
    with pytest.raises(ConfigError, match=r"num_speculative_tokens = 3.*draft_tokens = 4"):
        make(monkeypatch, None, budget=3, adaptive=False)


def test_origins_say_who_proposed_each_token(monkeypatch) -> None:
    proposer = simple(monkeypatch)
    proposer.requests.tracing = True
    tree = DraftTree(
        np.array([5, 6, 7], np.int32), np.array([-1, 0, 0], np.int32), np.array([1, 1, 2], np.int32)
    )
    proposer.requests["a"].tree = tree
    proposer.drafting.state.known[proposer.requests["a"].slot] = 2
    verified = {"a": Verified(tree, np.array([0, 2], np.int32), np.array([5, 7, 0, 9]))}
    ids = np.array([[3, 4, 5, 7, 9, 0, 0, 0]], np.int32)
    batch = SimpleNamespace(
        req_ids=["a"], num_prompt_tokens=np.array([2]), num_computed_tokens_cpu=np.array([1])
    )
    bound(proposer, input_batch=batch, verified=verified, scheduled_tokens={"a": 4})
    proposer.propose([[5, 7, 9]], np.array([5], np.int32), ids)
    proposer.requests.forget("a")
    assert proposer.requests.finished_origins == {"a": [1, 2, 0]}
    stats = proposer.stats()
    assert (stats["accepted_from_draft"], stats["accepted_from_suffix"]) == (1, 1)
    assert (stats["verified_nodes"], stats["emitted_tokens"], stats["steps"]) == (3, 3, 1)


class Opaque(LogitsProcessor):
    """One whose answers may depend on anything."""

    def __init__(self, *args) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update) -> None:
        pass

    def apply(self, logits):
        return logits


class Known(Opaque):
    """One that says that it knows no more than the request."""

    ouroboros_stateless = True


@pytest.mark.parametrize(
    "changes, processors, speculates",
    [
        ({}, [], True),
        ({"temperature": 1.0, "min_p": 0.1, "logit_bias": {3: 1.0}}, [Known()], True),
        ({"thinking_token_budget": 3}, [], False),
        ({}, [Known(), Opaque()], False),
        ({"temperature": 1.0}, [Opaque()], False),
    ],
)
def test_a_request_that_cannot_speculate_gets_no_draft(
    monkeypatch, changes, processors, speculates
) -> None:
    ids = np.array([[3, 4, 3, 4, 3, 4, 0, 0]], np.int32)
    batch = SimpleNamespace(
        req_ids=["a"], num_prompt_tokens=np.array([5]), num_computed_tokens_cpu=np.array([0])
    )
    proposer = bound(
        make(monkeypatch, None), processors,
        input_batch=batch, verified={}, scheduled_tokens={"a": 5},
    )  # fmt: skip
    proposer.requests.admit("a", state_of(**changes), 0, None)
    [draft] = proposer.propose([[4]], np.array([6], np.int32), ids)
    assert bool(draft) == speculates
    assert len(proposer.drafting.pool) > 0  # its text feeds the pool anyway
    assert proposer.requests["a"].sampled.plain == (not processors and "temperature" not in changes)


def test_who_may_end_all_drafting_is_named(monkeypatch, caplog) -> None:
    with caplog.at_level("WARNING", logger=module.logger.name):
        bound(make(monkeypatch, None), [Known()])
        assert not caplog.records
        bound(make(monkeypatch, None), [Known(), Opaque(), Opaque()])
    assert "logits processor Opaque may depend on more" in caplog.text


def test_ancestors_of_the_fakes() -> None:
    assert ancestors(TREE.parents, 3) == [0, 2, 3]
