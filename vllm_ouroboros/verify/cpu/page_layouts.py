"""Layouts of the pages that vLLM's CPU kernels write, and products with pages of each.

A layout is an argument of compiled functions and chooses what they call by its type. Were these
functions variables of a closure, no process would find what another one has compiled: numba keeps
compiled closures by their variables, and functions are new in each process.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.extending import overload

from vllm_ouroboros.verify.cpu import amx_tile, matmul_tile
from vllm_ouroboros.verify.cpu.amx_tile import (
    add_amx_product,
    begin_tiles,
    end_tiles,
    set_amx_product,
)
from vllm_ouroboros.verify.cpu.matmul_tile import LANES, add_product


class Vec(NamedTuple):
    """Keys [D, block], values [block, D]; ``tile`` is the rows of a tile."""

    tile: int = matmul_tile.ROWS


class Amx(NamedTuple):
    """Keys [block / 16, D / 2, 16, 2], values [D / 16, block / 2, 16, 2], bits of bfloat16."""

    tile: int = amx_tile.ROWS


def page_scores(layout, bits, queries, n, scale, pages, page, block, seen, scores):
    """Write the scores of a page: ``scores[:n, :seen]``."""


def page_values(layout, scores, halves, n, seen, pages, at, block, result):
    """Add the values of a page to ``result``, by the weights in ``scores``."""


def begin(layout, rows, most):
    """Called before the pages; gives `page_values` its room, uint16 [rows, most]."""


def end(layout):
    """Called behind the pages."""


@overload(page_scores, jit_options={"fastmath": True})
def _page_scores(layout, bits, queries, n, scale, pages, page, block, seen, scores):
    def vec(layout, bits, queries, n, scale, pages, page, block, seen, scores):
        scores[:, : -(-seen // LANES) * LANES] = 0
        add_product(queries, queries.shape[1], pages, page, block, seen, scores)

    def amx(layout, bits, queries, n, scale, pages, page, block, seen, scores):
        dim = bits.shape[1]
        set_amx_product(bits, dim, pages, page, 16 * dim, seen, scores)
        for i in range(n):
            row = scores[i]
            for t in range(seen):
                row[t] *= scale

    return amx if layout.instance_class is Amx else vec


@overload(page_values)
def _page_values(layout, scores, halves, n, seen, pages, at, block, result):
    def vec(layout, scores, halves, n, seen, pages, at, block, result):
        add_product(scores, seen, pages, at, result.shape[1], result.shape[1], result)

    def amx(layout, scores, halves, n, seen, pages, at, block, result):
        depth = -(-seen // 32) * 32
        for i in range(n):
            words, row = scores[i].view(np.uint32), halves[i]
            for t in range(seen):  # to bfloat16, ties to even
                word = words[t]
                odd = (word >> np.uint32(16)) & np.uint32(1)
                row[t] = np.uint16((word + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            row[seen:depth] = 0
        add_amx_product(halves, depth, pages, at, 16 * block, result.shape[1], result)

    return amx if layout.instance_class is Amx else vec


@overload(begin)
def _begin(layout, rows, most):
    def vec(layout, rows, most):  # weights stay float32, and there are no tiles
        return np.empty((0, 0), np.uint16)

    def amx(layout, rows, most):
        begin_tiles()
        return np.zeros((rows, most), np.uint16)

    return amx if layout.instance_class is Amx else vec


@overload(end)
def _end(layout):
    def vec(layout):
        pass

    def amx(layout):
        end_tiles()

    return amx if layout.instance_class is Amx else vec
