"""Compile what the launchers launch for a GPU that is not there, and say what was compiled."""

from __future__ import annotations

from itertools import product

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CARDS = {80: 163, 89: 99, 90: 227}
"""KiB of shared memory that a program can have, by compute capability: A100, L4, H100."""


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    driver.set_active(Driver(90))
    launch = JITFunction.run

    def compile_only(self, *args, warmup=None, **kwargs):
        kernel = launch(self, *args, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        capability = driver.active.get_current_target().arch
        shared = kernel.metadata.shared
        assert shared <= CARDS[capability] * 1024, (capability, shared, kwargs)
        print(self.__name__)
        return kernel

    JITFunction.run = compile_only

    from vllm_ouroboros.kernels.kv_compact import kv_compact, kv_layers
    from vllm_ouroboros.kernels.launch import GPU
    from vllm_ouroboros.kernels.tree_accept import accept_trees, choose_tokens
    from vllm_ouroboros.kernels.tree_attention import launch_config, tree_attention

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    q = torch.zeros(8, 8, 128, dtype=torch.bfloat16)
    new = torch.zeros(8, 2, 128, dtype=torch.bfloat16)
    cache = torch.zeros(4, 2, 16, 2, 128, dtype=torch.bfloat16)
    lengths = (ints(2, 64), ints(2), ints(3), ints(8, 1))
    keys, values = cache.unbind(1)
    launched = tree_attention(
        q, new, new, keys, values, *lengths, 1.0, q, sliding_window=5, soft_cap=2.0
    )
    assert launched.config.num_splits > 1
    q, new, keys, values = (t[..., :80] for t in (q, new, keys, values))
    keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
    one = torch.ones(1)
    tree_attention(q, new, new, keys, values, *lengths, 1.0, q, k_scale=one, v_scale=one)

    logits, predicted = torch.zeros(8, 40000), torch.zeros(8, dtype=torch.int64)
    rows = (ints(3), ints(8))
    noise = torch.zeros(2, 3, 40000)
    choose_tokens(logits, *rows, None, predicted)
    choose_tokens(logits, *rows, torch.zeros(2), predicted, noise=noise)
    seeds = torch.zeros(2, dtype=torch.int64)
    choose_tokens(logits, *rows, torch.zeros(2), predicted, seeds=seeds, positions=ints(2))
    outs = (ints(2, 4), ints(2), ints(2, 5))
    accept_trees(ints(8), ints(8), ints(3), predicted, *outs, stops=ints(2, 3))
    accept_trees(ints(8), ints(8), ints(3), predicted, *outs)
    kv_compact(kv_layers([cache[:, 0]], [cache[:, 1]]), ints(2, 4), ints(2), ints(2, 4))

    for capability, dim, dtype in product((80, 89), (128, 256), (torch.bfloat16, torch.float32)):
        driver.set_active(Driver(capability))
        config = launch_config(
            num_rows=64, num_kv_heads=2, group=4, head_dim=dim, block_size=16, max_query_len=32,
            max_context_len=64, itemsize=dtype.itemsize,
            gpu=GPU("", 100, CARDS[capability] * 1024),
        )  # fmt: skip
        q, new = torch.zeros(64, 8, dim, dtype=dtype), torch.zeros(64, 2, dim, dtype=dtype)
        keys, values = torch.zeros(4, 2, 16, 2, dim, dtype=dtype).unbind(1)
        tree_attention(
            q, new, new, keys, values, ints(2, 4), ints(2), ints(3), ints(64, 1), 1.0, q,
            config=config,
        )  # fmt: skip


if __name__ == "__main__":
    main()
