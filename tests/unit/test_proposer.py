"""The proposer between a fake engine and a fake draft model with paged KV."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from vllm_ouroboros import proposer as module
from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft_rounds import MAX_KNOWN
from vllm_ouroboros.proposer import OuroborosProposer
from vllm_ouroboros.sampler import Verified
from vllm_ouroboros.tree import DraftTree, NodeSource, walk

from .fakes import Language, ancestors, node_paths

BLOCK = 4
NUM_BLOCKS = 400


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

    def predict(self, hidden, rows):
        return np.array([self.model(hidden[row]) for row in rows.tolist()], np.int64)


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


class Sequence:
    """A request as the engine sees it."""

    def __init__(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        self.name, self.text, self.prompt, self.params = name, list(prompt), len(prompt), params
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

    def allocate(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.blocks) * BLOCK < tokens:
            sequence.blocks.append(self.free.pop(0))

    def preempt(self, sequence: Sequence) -> None:
        self.proposer.suspend(sequence.name)
        self.free += sequence.blocks
        sequence.blocks, sequence.computed, sequence.draft = [], 0, []
        sequence.running = False

    def finish(self, sequence: Sequence) -> None:
        self.proposer.forget(sequence.name)
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
            if not sequence.running:
                state = SimpleNamespace(sampling_params=sequence.params)
                proposer.admit(sequence.name, state, sequence.computed)
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
                tree = proposer.tree_of(s.name, draft) if draft else None
                if tree is not None:
                    assert tree.tokens.tolist() == draft
                    paths = [(), *node_paths(tree)]
                    predicted = np.array([self.target([*s.text, *p]) for p in paths], np.int64)
                    path = np.empty(len(draft), np.int32)
                    path = path[: walk(tree.tokens, tree.parents, len(draft), predicted, path)]
                    verified[s.name] = Verified(tree, path, predicted)
                    tokens = tree.tokens[path].tolist()
                tokens.append(self.target([*s.text, *tokens]))
                self.expected["steps"] += 1
                self.expected["emitted_tokens"] += len(tokens)
                self.expected["accepted_tokens"] += len(tokens) - 1
                s.text += tokens
            emitted.append(tokens)
            token_ids[row, : len(s.text)] = s.text
            table.table[row, : len(s.blocks)] = s.blocks
            table.num_blocks_per_row[row] = len(s.blocks)
        lengths = np.array([len(s.text) for s in batch], np.int32)
        proposer.bind(
            SimpleNamespace(
                input_batch=SimpleNamespace(
                    req_ids=[s.name for s in batch],
                    num_prompt_tokens=np.array([s.prompt for s in batch]),
                    num_computed_tokens_cpu=computed,
                    block_table=[table],
                ),
                verified=verified,
                scheduled_tokens=scheduled,
            )
        )
        drafts = proposer.propose(emitted, lengths, token_ids)
        assert len(drafts) == size
        for s, tokens, draft in zip(batch, emitted, drafts, strict=True):
            s.computed = len(s.text) - 1 if tokens else s.computed + scheduled[s.name]
            s.draft = draft
            self.check(s, len(tokens))
        for s, tokens in zip(batch, emitted, strict=True):
            ended = bool(tokens) and (tokens[-1] == 1 or len(s.text) >= self.max_len)
            if ended or s.left <= 0:
                self.finish(s)

    def check(self, s: Sequence, emitted: int) -> None:
        proposer = self.proposer
        request = proposer.requests[s.name]
        cached = int(proposer.drafting.state.cached[request.slot])
        tree = request.tree
        chain: list[int] = []
        if s.draft:
            assert tree.tokens.tolist() == s.draft
            paths = node_paths(tree)
            assert len(set(paths)) == len(paths) <= proposer.budget
            chain = tree.tokens[tree.sources == NodeSource.DRAFT].tolist()
            assert tree.tokens[: len(chain)].tolist() == chain
        if self.draft is None:
            assert chain == []
            return
        text = (*s.text, *chain)
        for p in range(cached):
            assert self.draft.kv[self.draft.slot(s.blocks, p)] == text[: p + 1]
        capacity = min(len(s.blocks) * BLOCK, self.draft.max_len)
        if not emitted:  # a prompt is cached as it comes
            assert cached >= min(s.computed, capacity)
        else:
            if len(s.text) - emitted == s.prompt:
                assert cached >= min(s.prompt, capacity)
            assert cached >= min(len(s.text) - 1, capacity) - MAX_KNOWN
        assert chain == self.draft.model.greedy(s.text, len(chain), (1,))


@given(
    seed=st.integers(0, 2**32 - 1),
    draft_len=st.sampled_from([0, 40, 80]),
    window=st.sampled_from([0, 3]),
    rows=st.sampled_from([24, 256]),
    scope=st.sampled_from(["global", "request"]),
)
@settings(max_examples=40, deadline=None)
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
            temperature=0 if rng.random() < 0.8 else 1, max_tokens=int(rng.integers(1, 40))
        )
        sequences.append(Sequence(str(i), prompt, params))
    waiting = list(sequences)
    for _ in range(400):
        while waiting and len(engine.sequences) < 4:
            engine.sequences.append(waiting.pop())
        if not engine.sequences:
            break
        engine.step()
    assert not engine.sequences
    for s in sequences:
        expected = target.greedy(s.text[: s.prompt], len(s.text) - s.prompt)
        assert s.text[s.prompt :] == expected
        assert len(s.text) <= 80
    stats = proposer.stats()
    assert {key: stats[key] for key in engine.expected} == engine.expected
    assert stats["accepted_from_draft"] + stats["accepted_from_suffix"] == stats["accepted_tokens"]
    assert stats["draft_forwards"] == (draft.forwards if draft else 0)
    assert proposer.requests == {}
    free = sorted(proposer.drafting._free)
    assert free == [0, 1, 2, 3], "a slot was lost or given back twice"


def simple(monkeypatch, **changes) -> OuroborosProposer:
    proposer = make(monkeypatch, None, **changes)
    proposer.admit("a", SimpleNamespace(sampling_params=SamplingParams(temperature=0)), 0)
    return proposer


TREE = DraftTree(
    np.array([5, 6, 7, 8], np.int32), np.array([-1, 0, 0, 2], np.int32), np.full(4, 2, np.int32)
)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_cut_list_is_the_same_tree_cut(monkeypatch, size) -> None:
    proposer = simple(monkeypatch)
    proposer.requests["a"].tree = TREE
    tree = proposer.tree_of("a", [5, 6, 7, 8][:size])
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
    tree = proposer.tree_of("a" if known else "stranger", scheduled)
    assert tree.tokens.tolist() == expected
    assert tree.is_chain
    assert (tree.tokens >= 0).all()


@pytest.mark.parametrize("known", [True, False])
def test_placeholders_alone_are_no_tree(monkeypatch, known) -> None:
    proposer = simple(monkeypatch)
    if known:
        proposer.requests["a"].tree = TREE
    assert proposer.tree_of("a", [-1] * 4) is None
    assert proposer.tree_of("b", [-1]) is None


def test_stops_are_those_of_the_request(monkeypatch) -> None:
    proposer = make(monkeypatch, None, eos=1)

    def stops(**params):
        proposer.forget("x")
        sampling = SamplingParams(temperature=0, **params)
        proposer.admit("x", SimpleNamespace(sampling_params=sampling), 0)
        return proposer.requests["x"].stops

    assert stops() == {1}
    assert stops(stop_token_ids=[4, 5]) == {1, 4, 5}
    assert stops(stop_token_ids=[4], ignore_eos=True) == {4}
    assert stops(ignore_eos=True) == set()


def test_slots_follow_the_life_of_a_request(monkeypatch) -> None:
    proposer = simple(monkeypatch, max_num_seqs=2)
    state = SimpleNamespace(sampling_params=SamplingParams(temperature=0))
    proposer.suspend("a")
    proposer.suspend("a")
    assert sorted(proposer.drafting._free) == [0, 1]
    proposer.admit("b", state, 0)
    proposer.admit("a", state, 12)
    assert proposer.drafting.state.cached[proposer.requests["a"].slot] == 12
    proposer.suspend("b")
    proposer.forget("b")
    proposer.forget("b")
    proposer.forget("nobody")
    proposer.suspend("nobody")
    proposer.forget("a")
    assert sorted(proposer.drafting._free) == [0, 1]


def test_an_unbound_proposer_says_what_to_do(monkeypatch) -> None:
    proposer = make(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"--worker-cls.*VLLM_PLUGINS"):
        proposer.load_model(None)


def test_a_wrong_setting_is_refused(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="draft_tokens = 0"):
        make(monkeypatch, None, draft_tokens=0)
    with pytest.raises(ConfigError, match=r"num_speculative_tokens = 3.*draft_tokens = 4"):
        make(monkeypatch, None, budget=3)


def test_origins_say_who_proposed_each_token(monkeypatch) -> None:
    proposer = simple(monkeypatch)
    proposer.tracing = True
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
    proposer.bind(SimpleNamespace(input_batch=batch, verified=verified, scheduled_tokens={"a": 4}))
    proposer.propose([[5, 7, 9]], np.array([5], np.int32), ids)
    proposer.forget("a")
    assert proposer.finished_origins == {"a": [1, 2, 0]}
    stats = proposer.stats()
    assert (stats["accepted_from_draft"], stats["accepted_from_suffix"]) == (1, 1)
    assert (stats["verified_nodes"], stats["emitted_tokens"], stats["steps"]) == (3, 3, 1)


def test_a_request_that_cannot_speculate_gets_no_draft(monkeypatch) -> None:
    proposer = make(monkeypatch, None)
    proposer.admit("a", SimpleNamespace(sampling_params=SamplingParams(temperature=1)), 0)
    ids = np.array([[3, 4, 3, 4, 3, 4, 0, 0]], np.int32)
    batch = SimpleNamespace(
        req_ids=["a"], num_prompt_tokens=np.array([5]), num_computed_tokens_cpu=np.array([0])
    )
    proposer.bind(SimpleNamespace(input_batch=batch, verified={}, scheduled_tokens={"a": 5}))
    assert proposer.propose([[4]], np.array([6], np.int32), ids) == [[]]
    assert len(proposer.drafting.pool) > 0  # but its text feeds the pool


def test_ancestors_of_the_fakes() -> None:
    assert ancestors(TREE.parents, 3) == [0, 2, 3]
