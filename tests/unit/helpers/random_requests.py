"""Random sampling parameters, logits processors of users and trees."""

from __future__ import annotations

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    LogitsProcessor,
    process_dict_updates,
)

from vllm_ouroboros.trees.draft_tree import ROOT, DraftTree, NodeSource

from .fakes import trie

CPU = torch.device("cpu")
VOCAB = 12
EOS = frozenset([11])
COUNT, DEEPEST = 16, 5  # tokens of the reference, nodes of a path
MODES = ("raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits")


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
