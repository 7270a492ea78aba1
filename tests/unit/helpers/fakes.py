"""Stand-ins for models, deterministic functions from a token sequence to what follows it, and the
parts of vLLM's engine that sampling goes through, without an engine around them.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np


class Language:
    """A language that is mostly Markov, so that phrases repeat, and sometimes looks far back.

    The far look hashes the whole sequence with the order of its tokens: a prediction made from a
    wrong context differs sooner or later.

    Args:
        seed: picks the language.
        vocab: token ids run from 0 to ``vocab - 1``.
        surprise: one prediction in so many depends on the whole sequence; 1 makes all of them.
        twist: one prediction in so many differs from the same language without a twist; 0: none.
    """

    def __init__(self, seed: int, vocab: int = 8, surprise: int = 4, twist: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.integers(0, vocab, vocab).tolist()
        self.seed, self.vocab, self.surprise, self.twist = seed, vocab, surprise, twist

    def digest(self, sequence) -> int:
        """A number that depends on all tokens and on their order."""
        digest = self.seed % 1000 + 1
        for token in sequence:
            digest = (digest * 1_000_003 + int(token) + 17) % 2_147_483_647
        return digest

    def __call__(self, sequence) -> int:
        digest = self.digest(sequence)
        if self.twist and digest // 7 % self.twist == 0:
            return (digest // 11) % self.vocab
        if digest % self.surprise == 0:
            return (digest // 13) % self.vocab
        return self.table[int(sequence[-1])]

    def logits(self, sequence) -> np.ndarray:
        """Logits float32 [vocab]; the language's own next token is the most probable."""
        noise = np.random.default_rng(self.digest(sequence)).standard_normal(self.vocab)
        noise[self(sequence)] = noise.max() + 0.5
        return noise.astype(np.float32)

    def greedy(self, sequence, count: int, stops=()) -> list[int]:
        """The next ``count`` tokens, up to and including the first stop."""
        text = list(sequence)
        for _ in range(count):
            text.append(self(text))
            if text[-1] in stops:
                break
        return text[len(sequence) :]


def ancestors(parents, row: int) -> list[int]:
    """Rows on the way from the first ancestor of a row to the row itself."""
    path = [row]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path[::-1]


def trie(paths, budget: int) -> list[tuple[int, ...]]:
    """Nodes of the merged paths in the order of their addition, each as its path from the root."""
    nodes: list[tuple[int, ...]] = []
    for path in paths:
        for length in range(1, len(path) + 1):
            if path[:length] not in nodes:
                if len(nodes) == budget:
                    break
                nodes.append(path[:length])
    return nodes


def node_paths(tree) -> list[tuple[int, ...]]:
    """Each node of a tree as its path from the root."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        assert -1 <= parent < len(paths), "a node before its parent"
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def engine_config(max_num_seqs: int = 8, processors=()) -> SimpleNamespace:
    """What vLLM's logits processors read of an engine's configuration."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
        model_config=SimpleNamespace(logits_processors=[*processors]),
        speculative_config="ours",
    )


def input_batch(vocab: int, processors, size: int = 8, custom: bool = False, **more):
    """vLLM's own batch, which makes the sampling metadata."""
    import torch
    from vllm.v1.worker.gpu_input_batch import InputBatch

    return InputBatch(
        max_num_reqs=size, max_model_len=64, max_num_batched_tokens=64,
        device=torch.device("cpu"), vocab_size=vocab, block_sizes=[16],
        max_num_blocks_per_req=[4], logitsprocs=processors,
        logitsprocs_need_output_token_ids=custom, **more,
    )  # fmt: skip


def request_state(name: str, prompt, params, output=(), generator=None):
    """A request as vLLM's runner knows it."""
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    return CachedRequestState(
        req_id=name, prompt_token_ids=list(prompt), mm_features=[], sampling_params=params,
        generator=generator, block_ids=([],), num_computed_tokens=0,
        output_token_ids=list(output),
    )  # fmt: skip
