"""How a launch of tree attention is cut into programs, from static sizes alone."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

STEP_KEYS = 32  # step keys in a tile: one word of the mask
MAX_SPLITS = 32


class GPU(NamedTuple):
    """What a launch depends on of a device; an H100 where there is none."""

    name: str = ""
    num_sms: int = 132  # multiprocessors
    shared_memory: int = 227 * 1024  # bytes that a program can have


class LaunchConfig(NamedTuple):
    """How a launch is cut into programs."""

    block_m: int  # rows of a tile: queries times heads of a group; a power of two from 16 on
    block_n: int  # context keys of a tile; a power of two from 16 on
    num_splits: int  # programs that share the keys of a tile of queries
    num_warps: int = 4
    num_stages: int = 2


def launch_config(
    *,
    num_rows: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    max_query_len: int,
    max_context_len: int,
    itemsize: int = 2,
    gpu: GPU = GPU(),  # noqa: B008 -- a constant
) -> LaunchConfig:
    """A sane configuration, from static sizes alone.

    Args:
        num_rows: T, rows of the step.
        num_kv_heads: Hkv.
        group: query heads of a KV head.
        head_dim: D.
        block_size: tokens of a page.
        max_query_len: most rows that a request has.
        max_context_len: most committed tokens that a request has.
        itemsize: bytes of a query's element.
        gpu: that runs it.
    """
    most_m, block_n = 128, 64
    if head_dim > 128 or itemsize > 2:  # so that a tile stays in registers
        most_m, block_n = (32 if itemsize > 2 else 64), 32
    block_m = power_of_two(min(max_query_len, num_rows) * group)
    block_m = max(min(block_m, most_m), 16, power_of_two(group))
    if block_size % 32 == 0 and block_size % block_n:
        block_n = 32
    num_stages = 2
    while _shared(block_m, block_n, num_stages, head_dim, itemsize) > gpu.shared_memory:
        if num_stages > 1:
            num_stages -= 1
        elif block_n > 16:
            block_n //= 2
        elif block_m > max(16, power_of_two(group)):
            block_m //= 2
        else:
            break
    programs = -(-num_rows // (block_m // group)) * num_kv_heads
    tiles = -(-max_context_len // block_n) + -(-max_query_len // STEP_KEYS)
    # two programs a multiprocessor, and no split of fewer than two tiles
    splits = min(2 * gpu.num_sms // max(programs, 1), tiles // 2, MAX_SPLITS)
    splits = 1 << max(splits.bit_length() - 1, 0)
    num_warps = 8 if block_m > 64 or block_n < 64 else 4
    return LaunchConfig(block_m, block_n, splits, num_warps, num_stages)


def _shared(block_m: int, block_n: int, num_stages: int, head_dim: int, itemsize: int) -> int:
    """Bytes of shared memory that a program takes at most: its queries, and tiles of K and V."""
    return (block_m + 2 * num_stages * block_n) * power_of_two(head_dim) * itemsize


@cache
def gpu_of(device: torch.device) -> GPU:
    """What is behind a device; asking does not synchronise."""
    if device.type != "cuda":
        return GPU()
    found = torch.cuda.get_device_properties(device)
    return GPU(found.name, found.multi_processor_count, found.shared_memory_per_block_optin)


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()
