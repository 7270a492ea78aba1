"""Where a draft model's KV lies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.draft.model import DraftModel


def bind(groups: list[list[str]], kernel_block_size: int | None = None) -> DraftModel:
    """A draft of layers "d0" and "d1", bound to a runner with these groups of layers."""
    draft = DraftModel.__new__(DraftModel)
    draft.layer_names = ["d0", "d1"]
    draft.model_config = SimpleNamespace(model="draft")
    draft.bind_kv_cache(
        SimpleNamespace(
            kv_cache_config=SimpleNamespace(
                kv_cache_groups=[SimpleNamespace(layer_names=names) for names in groups]
            ),
            attn_groups=[
                [SimpleNamespace(layer_names=names, kernel_block_size=kernel_block_size)]
                for names in groups
            ],
            input_batch=SimpleNamespace(
                block_table=[SimpleNamespace(block_size=16 + i) for i in range(len(groups))]
            ),
        )
    )
    return draft


def test_its_layers_share_one_group() -> None:
    draft = bind([["t0"], ["t1", "d0", "d1"]])
    assert (draft.kv_cache_gid, draft.block_size) == (1, 17)
    assert [names for _, names in draft.attn_groups] == [["d0", "d1"]]


def test_two_kinds_of_attention_are_refused() -> None:
    with pytest.raises(ConfigError, match="fall into 2 KV cache groups"):
        bind([["t0", "d0"], ["d1"]])


def test_blocks_that_are_smaller_than_the_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match="use --block-size 8"):
        bind([["d0", "d1"]], kernel_block_size=8)
