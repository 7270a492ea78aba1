"""Matrix products in AMX tiles for compiled code: bfloat16 factors, float32 sums.

The right-hand matrix is read as vLLM's "amx" KV cache holds it: groups of `LANES` columns, in each
of them pairs of rows, and in each of those the two elements of each column. Only CPUs that have
AMX may compile what calls this.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
ROWS = 16
"""Rows of a tile: the left-hand matrix has a multiple of them."""
DEPTH = 32
"""Rows of the right-hand matrix in a tile: their number is a multiple."""

_BYTE, _INDEX = ir.IntType(8), ir.IntType(64)
_POINTER = _BYTE.as_pointer()
_LEFT, _RIGHT = 6, 7  # tiles of the factors; those before them hold sums


def _call(builder, name: str, *args) -> None:
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


def _tile(number: int) -> ir.Constant:
    return ir.Constant(_BYTE, number)


@intrinsic
def begin_tiles(_):
    """Configure this thread's tiles: all of them have 16 rows of 64 bytes."""

    def generate(context, builder, signature, args):
        # palette 1; 8 row lengths of 2 bytes from byte 16 on, 8 numbers of rows from byte 48 on
        values = [1] + [0] * 15 + [64, 0] * 8 + [0] * 16 + [ROWS] * 8 + [0] * 8
        content = ir.Constant(ir.ArrayType(_BYTE, 64), bytearray(values))
        place = cgutils.alloca_once(builder, content.type)
        builder.store(content, place)
        _call(builder, "ldtilecfg", builder.bitcast(place, _POINTER))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def end_tiles(_):
    """Give the tiles back."""

    def generate(context, builder, signature, args):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _product(groups: int, add: bool):
    """The product of one block of rows and so many groups of columns; ``add`` to what is there."""

    @intrinsic
    def product(_, left, left_at, left_stride, right, right_at, right_step, depth, out, out_at,
                out_stride):  # fmt: skip
        def generate(context, builder, signature, args):
            def pointer(array, at):
                data = context.make_array(signature.args[array])(context, builder, args[array]).data
                return builder.bitcast(builder.gep(data, [at]), _POINTER)

            def number(value: int) -> ir.Constant:
                return ir.Constant(_INDEX, value)

            _, left_at, left_stride, _, right_at, right_step, depth, _, out_at, out_stride = args
            left_bytes = builder.mul(left_stride, number(2))
            out_bytes = builder.mul(out_stride, number(4))
            places = [
                pointer(7, builder.add(out_at, number(group * LANES))) for group in range(groups)
            ]
            for group, place in enumerate(places):
                if add:
                    _call(builder, "tileloadd64", _tile(group), place, out_bytes)
                else:
                    _call(builder, "tilezero", _tile(group))
            steps = builder.udiv(depth, number(DEPTH))
            with cgutils.for_range(builder, steps) as loop:
                at = builder.add(left_at, builder.mul(loop.index, number(DEPTH)))
                _call(builder, "tileloadd64", _tile(_LEFT), pointer(0, at), left_bytes)
                for group in range(groups):
                    at = builder.add(right_at, builder.mul(right_step, number(group)))
                    at = builder.add(at, builder.mul(loop.index, number(DEPTH * LANES)))
                    _call(builder, "tileloadd64", _tile(_RIGHT), pointer(3, at), number(64))
                    _call(builder, "tdpbf16ps", _tile(group), _tile(_LEFT), _tile(_RIGHT))
            for group, place in enumerate(places):
                _call(builder, "tilestored64", _tile(group), place, out_bytes)
            return context.get_dummy_value()

        parts = (left, left_at, left_stride, right, right_at, right_step, depth, out, out_at,
                 out_stride)  # fmt: skip
        return types.void(*parts), generate

    return product


def _multiplier(add: bool):
    wide, narrow = _product(4, add), _product(1, add)

    @njit  # a closure: no process would find what another one keeps of it
    def multiply(left, depth, right, start, step, columns, out):
        width, stride = left.shape[1], out.shape[1]
        groups = (columns + LANES - 1) // LANES
        for row in range(0, left.shape[0], ROWS):
            group = 0
            while group < groups:
                at, to = start + group * step, row * stride + group * LANES
                if groups - group > 3:
                    wide(left, row * width, width, right, at, step, depth, out, to, stride)
                    group += 4
                else:
                    narrow(left, row * width, width, right, at, step, depth, out, to, stride)
                    group += 1

    return multiply


set_amx_product, add_amx_product = _multiplier(False), _multiplier(True)
"""``out[:, :columns] = left[:, :depth] @ right``, and ``+=``.

Columns are counted in steps of `LANES`: as many are read and written. Nothing is checked.

Args:
    left: bits uint16 of bfloat16 [n, >= depth], contiguous; n is a multiple of `ROWS`.
    depth: int64, a multiple of `DEPTH`.
    right: bits uint16, flat.
    start: int64, where its first group of columns begins.
    step: int64, from one group to the next.
    columns: int64.
    out: float32 [n, >= columns], contiguous.
"""
