"""A draft model and a sampler that are functions of the text."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors

from .fakes import Language

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

    reads_features = False
    short_ids = None
    cannot_wait = staticmethod(lambda slot: False)
    has_read = staticmethod(lambda slot, tokens: None)

    def __init__(self, model: Language, max_len: int) -> None:
        self.model, self.max_len, self.kv_cache_gid = model, max_len, 0
        self.kv: dict[int, tuple[int, ...]] = {}
        self.forwards, self.max_rows = 0, 0

    def slot(self, blocks, position: int) -> int:
        return int(blocks[position // BLOCK]) * BLOCK + position % BLOCK

    def forward(self, clock, runner, rows, mask):
        """Sequences that the rows asked for see, in the place of hidden states."""
        del clock
        _, requests, tokens, positions, writes, query_start_loc, context_lens, asked, _ = rows
        self.forwards += 1
        if mask is None or len(requests) > 1:  # a round of one request may need more
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
                if mask is not None:
                    bits = mask[first + i].view(np.uint32)
                    path = [j for j in range(end - first) if bits[j // 32] >> (j % 32) & 1]
                    assert path[-1] == i
                sequence = (*past, *(int(tokens[first + j]) for j in path))
                assert positions[first + i] == min(len(sequence), self.max_len) - 1
                seen.append(sequence)
            for i in range(first, end):
                if writes[i] >= 0:
                    assert writes[i] == len(seen[i]) - 1
                    self.kv[self.slot(table[row], int(writes[i]))] = seen[i]
        assert len(seen) == len(tokens)
        return [seen[row] for row in asked.tolist()]

    def logits(self, hidden, *, short):
        """Logits, and in a last column the place of their row's sequence in ``asked``."""
        assert not short
        self.asked = hidden
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
