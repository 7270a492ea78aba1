"""How a launch of tree attention is cut into programs, from static sizes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

STEP_KEYS = 32  # step keys in a tile: one word of the mask
MAX_SPLITS = 32


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
    num_sms: int = 132,
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
        num_sms: multiprocessors of the GPU.
    """
    most_m, block_n = 128, 64
    if head_dim > 128 or itemsize > 2:  # so that a tile stays in registers
        most_m, block_n = (32 if itemsize > 2 else 64), 32
    block_m = power_of_two(min(max_query_len, num_rows) * group)
    block_m = max(min(block_m, most_m), 16, power_of_two(group))
    if block_size % 32 == 0 and block_size % block_n:
        block_n = 32
    programs = -(-num_rows // (block_m // group)) * num_kv_heads
    tiles = -(-max_context_len // block_n) + -(-max_query_len // STEP_KEYS)
    # two programs a multiprocessor, and no split of fewer than two tiles
    splits = min(2 * num_sms // max(programs, 1), tiles // 2, MAX_SPLITS)
    splits = 1 << max(splits.bit_length() - 1, 0)
    return LaunchConfig(block_m, block_n, splits, 8 if block_m > 64 or block_n < 64 else 4)


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device (no synchronisation); an H100's where there is none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def gpu_name(device: torch.device) -> str:
    """Name of a CUDA device (no synchronisation); "" for other devices."""
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else ""


def power_of_two(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()
