"""Matrix products for compiled code on the CPU, out of tiles whose sums stay in registers.

The right-hand matrix is read as it stands in a KV cache, as bits of bfloat16 or float32; sums are
float32. The compiler's own vectorizer keeps sums in memory, which takes twice the time; so the
innermost loops are written here as LLVM vectors, which it lowers to what the CPU has.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
ROWS = 4
"""Rows of a tile: the left-hand matrix has a multiple of them."""


def _tile(vectors: int):
    """A tile of `ROWS` rows and ``vectors * LANES`` columns."""
    index = ir.IntType(64)
    sums, words = (ir.VectorType(t, LANES) for t in (ir.FloatType(), ir.IntType(32)))

    def number(value: int) -> ir.Constant:
        return ir.Constant(index, value)

    def spread(builder, value):
        """All lanes of a vector set to a float."""
        empty = ir.Constant(sums, ir.Undefined)
        first = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(first, empty, ir.Constant(words, [0] * LANES))

    @intrinsic
    def tile(_, left, depth, right, start, stride, out, row, column):
        """Add to ``out`` [*, *], from (row, column) on, the product of ``left`` [*, :depth] and of
        a matrix that stands at ``start`` in the bits ``right`` [*], a row every ``stride``.
        """
        bits = right.dtype.bitwidth
        stored = ir.VectorType(ir.IntType(bits), LANES)

        def widened(builder, pointer):
            lanes = builder.load(builder.bitcast(pointer, stored.as_pointer()), align=bits // 8)
            if bits == 16:
                lanes = builder.shl(builder.zext(lanes, words), ir.Constant(words, [16] * LANES))
            return builder.bitcast(lanes, sums)

        def generate(context, builder, signature, args):
            _, depth, _, start, stride, _, row, column = args
            left, right, out = (
                context.make_array(signature.args[k])(context, builder, args[k]) for k in (0, 2, 5)
            )
            lanes = [number(v * LANES) for v in range(vectors)]
            places, rows = [], []
            for r in range(ROWS):
                at = builder.add(row, number(r))
                rows.append(builder.mul(at, builder.extract_value(left.shape, 1)))
                base = builder.add(builder.mul(at, builder.extract_value(out.shape, 1)), column)
                for lane in lanes:
                    pointer = builder.gep(out.data, [builder.add(base, lane)])
                    places.append(builder.bitcast(pointer, sums.as_pointer()))
            held = [cgutils.alloca_once(builder, sums) for _ in places]
            for place, sum_ in zip(places, held, strict=True):
                builder.store(builder.load(place, align=4), sum_)
            with cgutils.for_range(builder, depth) as loop:
                at = builder.add(start, builder.mul(loop.index, stride))
                factors = [
                    widened(builder, builder.gep(right.data, [builder.add(at, lane)]))
                    for lane in lanes
                ]
                for r in range(ROWS):
                    pointer = builder.gep(left.data, [builder.add(rows[r], loop.index)])
                    factor = spread(builder, builder.load(pointer))
                    for sum_, other in zip(held[r * vectors :], factors, strict=False):
                        product = builder.fmul(factor, other, flags=("contract",))
                        total = builder.fadd(builder.load(sum_), product, flags=("contract",))
                        builder.store(total, sum_)
            for place, sum_ in zip(places, held, strict=True):
                builder.store(builder.load(sum_), place, align=4)
            return context.get_dummy_value()

        arrays = left, depth, right, start, stride, out, row, column
        return types.void(*arrays), generate

    return tile


_wide, _narrow = _tile(4), _tile(1)


@njit(cache=True)
def add_product(left, depth, right, start, stride, columns, out):
    """``out[:, :columns] += left[:, :depth] @ right``.

    Columns are counted in steps of `LANES`: as many are read and written. Nothing is checked.

    Args:
        left: float32 [n, >= depth], contiguous; n is a multiple of `ROWS`.
        depth: int64.
        right: uint16 bits of bfloat16 or uint32 bits of float32, flat.
        start: int64, where its first row begins.
        stride: int64, from one row to the next.
        columns: int64.
        out: float32 [n, >= columns], contiguous.
    """
    for row in range(0, left.shape[0], ROWS):
        column = 0
        while column < columns:
            if columns - column > 3 * LANES:
                _wide(left, depth, right, start + column, stride, out, row, column)
                column += 4 * LANES
            else:
                _narrow(left, depth, right, start + column, stride, out, row, column)
                column += LANES
