"""Which layouts of the KV cache and which models the backend takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder, _get_attn_isa

from vllm_ouroboros.config import ConfigError
from vllm_ouroboros.verify.cpu import attention
from vllm_ouroboros.verify.cpu.attention import (
    TreeAttentionBackend,
    TreeAttentionImpl,
    TreeAttentionMetadataBuilder,
    check_layout,
)
from vllm_ouroboros.verify.tree_step import attach

from ...helpers.attention_forward import make_impl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block, dim", [(32, 32), (64, 80), (128, 64), (32, 128)])
def test_this_machines_layout_is_known(dtype, block, dim) -> None:
    isa = _get_attn_isa(dtype, block, dim)
    check_layout(isa, dtype, block, dim)
    if isa == "amx":
        check_layout("vec", dtype, block, dim)


@pytest.mark.parametrize("swap", ["keys", "values", "both"])
def test_another_layout_is_refused(monkeypatch, swap) -> None:
    def wrong(keys, values, key_cache, value_cache, *rest, **named):
        ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, *rest, **named)
        block, dim = key_cache.shape[2:]
        if swap != "values":
            key_cache[1, 0] = key_cache[1, 0].view(dim, block).T.clone().view(block, dim)
        if swap != "keys":
            value_cache[1, 0] = value_cache[1, 0].roll(1, dims=0)

    monkeypatch.setattr(attention, "ops", SimpleNamespace(cpu_attn_reshape_and_cache=wrong))
    with pytest.raises(ConfigError, match=r"'vec'.*float32.*block size 32.*head size 64"):
        check_layout("vec", torch.float32, 32, 64)


def test_the_builder_checks_the_layout_that_its_layers_have(monkeypatch) -> None:
    checked = []

    def init(self):
        self.isa, self.dtype, self.block_size, self.head_dim = "amx", torch.bfloat16, 32, 64

    monkeypatch.setattr(CPUAttentionMetadataBuilder, "__init__", init)
    monkeypatch.setattr(attention, "check_layout", lambda *args: checked.append(args))
    assert TreeAttentionMetadataBuilder().isa == "amx"
    assert checked == [("amx", torch.bfloat16, 32, 64)]


@pytest.mark.parametrize(
    "changes, name",
    [({"alibi_slopes": [0.5] * 4}, "ALiBi"), ({"sinks": torch.zeros(4)}, "attention sinks")],
)
def test_what_the_kernel_cannot_do_is_refused(vllm_config, changes, name) -> None:
    with pytest.raises(ConfigError, match=name):
        make_impl(4, 2, 32, **changes)


def test_the_backend_names_its_parts() -> None:
    assert TreeAttentionBackend.get_impl_cls() is TreeAttentionImpl
    assert TreeAttentionBackend.get_builder_cls() is TreeAttentionMetadataBuilder
    assert TreeAttentionBackend.get_name() == "CPU_ATTN"


def test_attach_reaches_every_metadata_object() -> None:
    one, two = SimpleNamespace(), SimpleNamespace()
    step = object()
    attach({"a": one, "b": one, "c": two}, step)
    assert one.tree is step
    assert two.tree is step


def test_a_profiling_run_has_no_metadata(vllm_config) -> None:
    output = torch.ones(3, 4, 32)
    impl = make_impl(4, 2, 32)
    got = impl.forward(SimpleNamespace(), output, None, None, None, None, output)
    assert got is output
    assert (output == 1).all()
