"""Which full graph serves which batch, and which rows of a step attend by masks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor

from vllm_ouroboros.integration.cuda_runner import OuroborosCUDARunner
from vllm_ouroboros.integration.runner import TreeBatch
from vllm_ouroboros.integration.tree_graphs import TreeDispatcher
from vllm_ouroboros.trees.draft_tree import DraftTree

BOTH = CUDAGraphMode.FULL_AND_PIECEWISE


def dispatcher(mode=BOTH, max_num_seqs=3, sizes=(1, 2, 4, 8, 16), lora=None) -> TreeDispatcher:
    """Of an engine with trees of up to 4 nodes."""
    found = TreeDispatcher.__new__(TreeDispatcher)
    found.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs), lora_config=lora
    )
    found.compilation_config = SimpleNamespace(
        cudagraph_capture_sizes=[*sizes], max_cudagraph_capture_size=sizes[-1], compile_sizes=[],
        cudagraph_specialize_lora=True,
    )  # fmt: skip
    found.uniform_decode_query_len = 5
    found.specialize_lora_count = False
    found.cudagraph_keys = {CUDAGraphMode.PIECEWISE: set(), CUDAGraphMode.FULL: set()}
    found.initialize_cudagraph_keys(mode, 1)
    return found


@pytest.mark.parametrize(
    "rows, masked, mode, padded, num_reqs",
    [
        (1, True, CUDAGraphMode.FULL, 1, 1),
        (3, True, CUDAGraphMode.FULL, 4, 3),  # no more requests than an engine has
        (7, True, CUDAGraphMode.FULL, 8, 3),
        (7, False, CUDAGraphMode.PIECEWISE, 8, None),
        (9, True, CUDAGraphMode.PIECEWISE, 16, None),  # 16 rows are more than 3 trees can have
        (17, True, CUDAGraphMode.NONE, 17, None),
    ],
)
def test_a_graph_is_for_a_number_of_rows(rows, masked, mode, padded, num_reqs) -> None:
    found = dispatcher().dispatch(rows, uniform_decode=masked)
    uniform = mode == CUDAGraphMode.FULL
    assert found == (mode, BatchDescriptor(padded, num_reqs=num_reqs, uniform=uniform))


@pytest.mark.parametrize(
    "mode, full", [(BOTH, 4), (CUDAGraphMode.FULL_DECODE_ONLY, 4), (CUDAGraphMode.PIECEWISE, 0)]
)
def test_what_is_captured(mode, full) -> None:
    found = dict(dispatcher(mode).get_capture_descs())
    sizes = [one.num_tokens for one in found.get(CUDAGraphMode.FULL, [])]
    assert sizes == [8, 4, 2, 1][:full]
    assert (CUDAGraphMode.PIECEWISE in found) == (mode != CUDAGraphMode.FULL_DECODE_ONLY)


def test_adapters_have_graphs_of_their_own() -> None:
    found = dispatcher(lora=SimpleNamespace(max_loras=2, specialize_active_lora=False))
    adapters = {one.num_active_loras for one in found.cudagraph_keys[CUDAGraphMode.FULL]}
    assert adapters == {0, 3}
    mode, key = found.dispatch(5, uniform_decode=True, has_lora=True, num_active_loras=1)
    assert (mode, key.num_active_loras) == (CUDAGraphMode.FULL, 3)


def runner(starts, **more) -> OuroborosCUDARunner:
    """A runner in a step whose requests have these first rows; trees of up to 4 nodes."""
    found = OuroborosCUDARunner.__new__(OuroborosCUDARunner)
    found.uniform_decode_query_len, found.is_mm_prefix_lm, found.trees = 5, False, None
    found.query_start_loc = SimpleNamespace(np=np.array(starts))
    found.__dict__.update(more)
    return found


@pytest.mark.parametrize("lengths, masked", [([1, 5, 3], 3), ([1, 5, 6, 1], 2), ([9], 0), ([5], 1)])
def test_requests_of_few_rows_attend_by_masks(lengths, masked) -> None:
    assert runner([])._num_masked(np.array(lengths)) == masked


def test_images_are_left_to_vllm() -> None:
    """Where rows of a prompt see what comes behind them, short chunks are prompts as well."""
    batch = SimpleNamespace(
        num_prompt_tokens=np.array([4, 9, 9]), num_computed_tokens_cpu=np.array([4, 8, 9])
    )
    found = runner([], is_mm_prefix_lm=True, input_batch=batch)
    assert found._num_masked(np.array([1, 1, 1])) == 1
    assert not found._is_uniform_decode(1, 5, 3, 3)


@pytest.mark.parametrize(
    "most, forced, full",
    [(5, None, True), (1, None, True), (6, None, False), (9, True, True), (1, False, False)],
)
def test_batches_for_a_full_graph(most, forced, full) -> None:
    assert runner([])._is_uniform_decode(most, 5, 2 * most, 2, forced) is full


def test_masks_of_a_step() -> None:
    """A tree, a request without a draft, a chunk of a prompt, a chain, a tree."""
    bush = DraftTree(*(np.array(a, np.int32) for a in ([1, 2, 3], [-1, -1, 0], [1, 1, 1])))
    trees = TreeBatch(
        [bush, None, None, DraftTree.chain([7, 8]), bush],
        np.array([3, 0, 0, 2, 3]),
        np.array([4, 5, 8, 11, 15]),
    )
    batch = SimpleNamespace(num_computed_tokens_cpu=np.array([40, 41, 42, 43, 44, 0]))
    found = runner([0, 4, 5, 8, 11, 15], trees=trees, input_batch=batch)
    starts, contexts, mask = found._masks(5)
    assert starts.tolist() == [0, 4, 5, 8, 11, 15]
    assert contexts.tolist() == [40, 41, 42, 43, 44]
    of_bush = [0b1, 0b11, 0b101, 0b1011]
    assert mask[:, 0].tolist() == [*of_bush, 1, 1, 0b11, 0b111, 1, 0b11, 0b111, *of_bush]
    assert found._roots(trees) == [(0, 0), (4, 11)]


def test_masks_of_a_dummy_run() -> None:
    """Requests that make up a graph's number have no rows."""
    starts, contexts, mask = runner([0, 2, 4, 4])._masks(3)
    assert starts.tolist() == [0, 2, 4, 4]
    assert contexts.tolist() == [0, 0, 0]
    assert mask[:, 0].tolist() == [1, 0b11, 1, 0b11]
