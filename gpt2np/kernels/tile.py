"""The register tile: the one loop in which a GPT-2 spends its time, written so that the machine runs it well.

A product out += a @ b is cut into tiles of a few rows by PANEL columns. One tile keeps its sums in vector
registers and walks down the depth once. Each step reads PANEL numbers of b and one number of every row of a:

                   |----------- PANEL -----------|
            b[k]   |  .  .  .  .  .  .  .  .  .  |
    a[0, k]  x     |  sum[0]                     |
    a[1, k]  x     |  sum[1]                     |      sum[r] = fma(a[r, k], b[k], sum[r])
    ...            |  ...                        |

numba has no vector type, so this loop is written for LLVM directly (`numba.extending.intrinsic`). LLVM cuts
the vectors to what the machine has: a row is two 512-bit registers with AVX-512, two of 256 bits with AVX2,
four of 128 bits on arm64. For float32 rows with AVX2 the loop stands in `avx2.py`, instruction by instruction. Every
element of the result is one chain of multiply-adds in the order of k, for any number of rows: the bits do not
depend on how rows are grouped.

b may be kept in 16 bits (`arrays.NARROW`). Each form has a tile of its own, which widens b[k] on the way into the
registers. A float16 is made a float32 by an instruction for it. Of two bfloat16 numbers in a word of 32 bits a shift
makes the first one a float32, a mask the second one; so the even columns of a block's sums come before the odd ones.

Under NUMBA_DISABLE_JIT=1 the same names are plain Python functions, which also define what is computed.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..arrays import widened
from . import avx2
from .layout import LANES, PANEL
from .machine import DISABLE_JIT, has

BY_HAND = has("avx2") and has("fma") and not has("avx512f")  # whether `avx2.steps` is the loop for float32 rows
if BY_HAND:
    llvm.initialize_native_asmparser()  # which numba has no need of; code from its cache may be compiled once more, too
FORM = {types.float32: "float32", types.uint16: "bfloat16", types.int16: "float16"}  # of b, in numba's words
EVEN_FIRST = [column // 2 + column % 2 * (PANEL // 2) for column in range(PANEL)]  # the place of each column
SQUARE = 16  # rows and columns that `transpose` turns at once
Step = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]  # see `blocks`


def make_tile(rows: int, panels: int = 1, ask: int = 0) -> Callable[..., None]:
    """The tile with a fixed number of rows, over so many panels at once.

    ask: have the memory read the next block of b while this one is used: all of it for 1, for 2 or more one part of
    so many, from element b_next of that block on.

        tile(a, a_start, a_stride, b, b_start, b_stride, b_next, depth, terms, out, out_start, out_stride)

    computes out[r, c] += sum over k of a[r, k] * b[k, c] for r < rows and c < panels * PANEL, block by block: a sum
    over the first `terms` k by itself, started from zero, then one over the next, until all of `depth` is done.
    The arrays are C-contiguous, of any shape and one float dtype; b may also be in one of FORMS. a[r, k] is their
    element number a_start + r * a_stride + k in memory order, and so on; panels of b are b_next elements apart.
    depth, terms >= 1.
    """
    width = panels * PANEL

    def tile_in_python(a, a_start, a_stride, b, b_start, b_stride, b_next, depth, terms, out, out_start, out_stride):
        def window(array, start, stride, height, width):
            strides = (stride * array.itemsize, array.itemsize)
            return np.lib.stride_tricks.as_strided(array.reshape(-1)[start:], (height, width), strides)

        left = window(a, a_start, a_stride, rows, depth).astype(np.float64)
        places = [b_start + panel * b_next for panel in range(panels)]
        right = widened(np.hstack([window(b, place, b_stride, depth, PANEL) for place in places])).astype(np.float64)
        for block in range(0, depth, terms):
            total = np.zeros((rows, width), out.dtype)
            for k in range(block, min(depth, block + terms)):
                total = (left[:, k, None] * right[k] + total).astype(out.dtype)
            window(out, out_start, out_stride, rows, width)[:] += total

    @intrinsic
    def tile(_, a, a_start, a_stride, b, b_start, b_stride, b_next, depth, terms, out, out_start, out_stride):
        size = types.intp

        def generate(context, builder, _, values):
            def pointer(kind, array, start):
                return builder.gep(context.make_array(kind)(context, builder, array).data, [start])

            a_array, a_start, a_stride, b_array, b_start, b_stride, b_next, depth, terms = values[:9]
            out_array, out_start, out_stride = values[9:]
            a_base, b_base, out_base = (
                pointer(a, a_array, a_start),
                pointer(b, b_array, b_start),
                pointer(out, out_array, out_start),
            )
            a_rows, out_rows = (
                [builder.gep(base, [builder.mul(stride, depth.type(r))]) for r in range(rows)]
                for base, stride in ((a_base, a_stride), (out_base, out_stride))
            )
            b_panels = [builder.gep(b_base, [builder.mul(b_next, depth.type(p))]) for p in range(panels)]
            steps: list[tuple[int, Step]] = [(1, partial(_step, builder, a_rows, b_panels, b.dtype, b_stride))]
            if BY_HAND and panels == 1 and a.dtype == types.float32:
                by_hand = partial(avx2.steps, builder, FORM[b.dtype], rows, a_base, a_stride, b_base, b_stride)
                steps.insert(0, (avx2.STEPS, by_hand))
            if ask:
                begin = builder.gep(b_base, [b_next]) if ask > 1 else b_base
                asked = partial(_ask_for_rows, builder, begin, b.dtype, b_stride, terms, ask)
                steps = [(many, partial(asked, many, step)) for many, step in steps]
            order = EVEN_FIRST if b.dtype == types.uint16 else range(PANEL)
            blocks(builder, steps, depth, terms, out_rows, panels, order)
            return context.get_dummy_value()

        return types.void(a, size, size, b, size, size, size, size, size, out, size, size), generate

    chosen: Callable[..., None] = tile_in_python if DISABLE_JIT else tile
    return chosen


def _make_transpose() -> Callable[..., None]:
    """transpose(source, s_start, s_stride, target, t_start, t_stride, following): target[c, r] = source[r, c].

    r and c < SQUARE. Element [r, c] of an array is number start + r * stride + c in memory order, as for a tile. The
    SQUARE ** 2 numbers from `following` on are asked for, see `query_scores`.
    """

    def transpose_in_python(source, s_start, s_stride, target, t_start, t_stride, following):
        step = np.arange(SQUARE)
        rows = source.reshape(-1)[s_start + s_stride * step[:, None] + step]
        target.reshape(-1)[t_start + t_stride * step[:, None] + step] = rows.T

    @intrinsic
    def transpose(_, source, s_start, s_stride, target, t_start, t_stride, following):
        size = types.intp

        def generate(context, builder, _, values):
            source_array, s_start, s_stride, target_array, t_start, t_stride, following = values
            vector = ir.VectorType(context.get_value_type(source.dtype), SQUARE)
            align = source.dtype.bitwidth // 8

            def row_pointer(kind, array, start, stride, r):
                offset = builder.add(start, builder.mul(stride, stride.type(r)))
                base = context.make_array(kind)(context, builder, array).data
                return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

            rows = [
                builder.load(row_pointer(source, source_array, s_start, s_stride, r), align=align)
                for r in range(SQUARE)
            ]
            numbers = context.make_array(source)(context, builder, source_array).data
            ask_for(builder, numbers, following, SQUARE**2, align)
            rows = _turned(builder, rows)
            for r, row in enumerate(rows):
                builder.store(row, row_pointer(target, target_array, t_start, t_stride, r), align=align)
            return context.get_dummy_value()

        return types.void(source, size, size, target, size, size, size), generate

    chosen: Callable[..., None] = transpose_in_python if DISABLE_JIT else transpose
    return chosen


def _turned(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of a square, from vectors of its rows.

    Step 1, 2, 4, ... swaps the off-diagonal squares of that size in each pair of rows.
    """
    rows, size, step = list(rows), len(rows), 1
    while step < size:
        upper = [c if not c & step else size + c - step for c in range(size)]
        lower = [c + step if not c & step else size + c for c in range(size)]
        for r in range(size):
            if not r & step:
                pair = rows[r], rows[r + step]
                for target_row, lanes in ((r, upper), (r + step, lower)):
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), size), lanes)
                    rows[target_row] = builder.shuffle_vector(*pair, mask)
        step *= 2
    return rows


transpose = _make_transpose()


def _add_query_scores(
    builder: ir.IRBuilder, query: ir.Value, keys: ir.Value, depth: ir.Value, following: ir.Value, out: ir.Value
) -> None:
    """The loop of `query_scores`, for pointers to the first elements."""
    half = SQUARE // 2  # a square of half the size fits into the registers of AVX2
    index, vector = depth.type, ir.VectorType(query.type.pointee, half)
    zeros, align = ir.Constant(vector, [0.0] * half), 8 if isinstance(vector.element, ir.DoubleType) else 4

    def vectors(places: list[ir.Value]) -> list[ir.Value]:
        return [builder.bitcast(place, vector.as_pointer()) for place in places]

    rows = [builder.gep(keys, [builder.mul(depth, index(r))]) for r in range(SQUARE)]
    before, loop, after = builder.block, builder.append_basic_block("step"), builder.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    d, *sums = [builder.phi(kind) for kind in (index, vector, vector)]
    new_sums = list(sums)
    ask_for(builder, following, builder.mul(d, index(SQUARE)), SQUARE * SQUARE, align)
    for part in (0, half):
        column = builder.add(d, index(part))
        numbers = [_splat(builder, builder.gep(query, [builder.add(column, index(i))]), half) for i in range(half)]
        for side in range(2):
            places = vectors([builder.gep(row, [column]) for row in rows[side * half :][:half]])
            turned = _turned(builder, [builder.load(place, align=align) for place in places])
            for number, these in zip(numbers, turned, strict=True):
                new_sums[side] = fmuladd(builder, number, these, new_sums[side])
    next_d = builder.add(d, index(SQUARE))
    for phi, start, new in zip([d, *sums], [index(0), zeros, zeros], [next_d, *new_sums], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", next_d, depth), loop, after)
    builder.position_at_end(after)
    for total, place in zip(new_sums, vectors([builder.gep(out, [index(i)]) for i in (0, half)]), strict=True):
        builder.store(total, place, align=align)


@intrinsic
def _query_scores(_, query, q_start, keys, depth, following, f_start, out, out_start):
    size = types.intp

    def generate(context, builder, _, values):
        q_array, q_start, k_array, depth, f_array, f_start, out_array, out_start = values
        none = depth.type(0)
        places = (
            (query, q_array, q_start),
            (keys, k_array, none),
            (following, f_array, f_start),
            (out, out_array, out_start),
        )
        first, second, third, fourth = (
            builder.gep(context.make_array(kind)(context, builder, array).data, [start])
            for kind, array, start in places
        )
        _add_query_scores(builder, first, second, depth, third, fourth)
        return context.get_dummy_value()

    return types.void(query, size, keys, size, following, size, out, size), generate


def _query_scores_in_python(query, q_start, keys, depth, following, f_start, out, out_start):
    numbers = query.reshape(-1)[q_start : q_start + depth].astype(np.float64)
    columns = keys[: SQUARE * depth].reshape(SQUARE, depth).T.astype(np.float64)
    total = np.zeros(SQUARE, out.dtype)
    for number, column in zip(numbers, columns, strict=True):
        total = (number * column + total).astype(out.dtype)
    out.reshape(-1)[out_start : out_start + SQUARE] = total


# query_scores(query, q_start, keys, depth, following, f_start, out, out_start): out[j] = query . keys[j], j < SQUARE,
# by one chain over `depth` numbers, a multiple of SQUARE: what a tile computes of keys in panels. To make panels of
# them is worth its while for several queries; for one they are turned in registers. keys: (SQUARE * depth,). As many
# numbers from f_start on are asked for, in the order in which they lie there: a Zen 3 reads lines that are asked for in
# this order half again as fast as those of a few columns of all keys after the other columns.
query_scores: Callable[..., None] = _query_scores_in_python if DISABLE_JIT else _query_scores


@intrinsic
def _raise_lanes(_, lanes, v, start):
    def generate(context, builder, _, values):
        vector = ir.VectorType(context.get_value_type(v.dtype), LANES)
        data, numbers = (
            context.make_array(k)(context, builder, a).data for k, a in zip((lanes, v), values, strict=False)
        )
        places = [builder.bitcast(p, vector.as_pointer()) for p in (data, builder.gep(numbers, [values[2]]))]
        low, new = (builder.load(place, align=v.dtype.bitwidth // 8) for place in places)
        high = builder.select(builder.fcmp_ordered(">", new, low), new, low)
        builder.store(high, places[0], align=v.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(lanes, v, types.intp), generate


def _raise_lanes_in_python(lanes, v, start):
    new = v[start : start + LANES]
    lanes[:] = np.where(new > lanes, new, lanes)


# raise_lanes(lanes, v, start): lanes[i] = v[start + i] if that is greater, for all LANES; a loop that LLVM makes of
# this stores them one by one, where they change
raise_lanes: Callable[..., None] = _raise_lanes_in_python if DISABLE_JIT else _raise_lanes


def blocks(
    builder: ir.IRBuilder, steps: list[tuple[int, Step]], depth: ir.Value, terms: ir.Value, out_rows: list[ir.Value],
    panels: int, order: Sequence[int] = range(PANEL),
) -> None:  # fmt: skip
    """The loops of a tile, for pointers to the rows of out.

    steps: from k and the sums of each row and panel, what they are after so many k, for numbers of k that fall;
    depth and terms are multiples of the last. order: the place of each column of a panel in its sums.
    """
    index, vector = depth.type, ir.VectorType(out_rows[0].type.pointee, PANEL)
    zeros, align = ir.Constant(vector, [0.0] * PANEL), 8 if isinstance(vector.element, ir.DoubleType) else 4
    before = builder.block
    block_begins, after = (builder.append_basic_block(name) for name in ("block", "after"))

    # block = 0; do { end = min(block + terms, depth) ...
    builder.branch(block_begins)
    builder.position_at_end(block_begins)
    block = builder.phi(index)
    end = builder.add(block, terms)
    end = builder.select(builder.icmp_signed("<", end, depth), end, depth)

    # sum[r] = fma(a[r, k], b[k], sum[r]) for k = block to end, the sums in registers
    k, sums = block, [zeros] * (len(out_rows) * panels)
    for many, step in steps:
        k, sums = _while_there_are(builder, many, step, k, sums, end)

    # out[r] += sum[r] } while ((block = end) < depth)
    places = ir.Constant(ir.VectorType(ir.IntType(32), PANEL), list(order))
    for i, total in enumerate(sums):
        place = builder.gep(out_rows[i // panels], [index(i % panels * PANEL)])
        target = builder.bitcast(place, vector.as_pointer())
        columns = builder.shuffle_vector(total, total, places)
        builder.store(builder.fadd(builder.load(target, align=align), columns), target, align=align)
    block.add_incoming(index(0), before)
    block.add_incoming(end, builder.block)
    builder.cbranch(builder.icmp_signed("<", end, depth), block_begins, after)
    builder.position_at_end(after)


def _while_there_are(
    builder: ir.IRBuilder, many: int, step: Step, k: ir.Value, sums: list[ir.Value], end: ir.Value
) -> tuple[ir.Value, list[ir.Value]]:
    """while (k + many <= end) { sums = step(k, sums); k += many }; k and the sums after it."""
    before, (test, body, after) = builder.block, [builder.append_basic_block(n) for n in ("test", "step", "end")]
    builder.branch(test)
    builder.position_at_end(test)
    old = [builder.phi(value.type) for value in (k, *sums)]
    next_k = builder.add(old[0], k.type(many))
    builder.cbranch(builder.icmp_signed("<=", next_k, end), body, after)
    builder.position_at_end(body)
    for phi, first, new in zip(old, (k, *sums), (next_k, *step(old[0], old[1:])), strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(new, body)
    builder.branch(test)
    builder.position_at_end(after)
    return old[0], old[1:]


def _step(
    builder: ir.IRBuilder, a_rows: list[ir.Value], b_panels: list[ir.Value], b_dtype: Any, b_stride: ir.Value,
    k: ir.Value, sums: list[ir.Value],
) -> list[ir.Value]:  # fmt: skip
    """sums[r, panel] + a[r, k] * b[panel, k]."""
    places = [builder.gep(panel, [builder.mul(k, b_stride)]) for panel in b_panels]
    return add_row(builder, a_rows, k, [_row_of(builder, place, b_dtype) for place in places], sums)


def _row_of(builder: ir.IRBuilder, place: ir.Value, dtype: Any) -> ir.Value:
    """A row of a panel as floats, that of bfloat16 numbers in the order EVEN_FIRST."""

    def load(element: ir.Type, count: int) -> ir.Value:
        vector = ir.VectorType(element, count)
        return builder.load(builder.bitcast(place, vector.as_pointer()), align=dtype.bitwidth // 8)

    if dtype != types.uint16:
        return _widen(builder, load(place.type.pointee, PANEL), dtype)
    words = load(ir.IntType(32), PANEL // 2)
    even, odd = (ir.Constant(words.type, [number] * (PANEL // 2)) for number in (16, 0xFFFF0000))
    floats = ir.VectorType(ir.FloatType(), PANEL // 2)
    halves = [builder.bitcast(half, floats) for half in (builder.shl(words, even), builder.and_(words, odd))]
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(ir.IntType(32), PANEL), list(range(PANEL))))


def _ask_for_rows(
    builder: ir.IRBuilder, b: ir.Value, b_dtype: Any, b_stride: ir.Value, ahead: ir.Value, part: int, many: int,
    step: Step, k: ir.Value, sums: list[ir.Value],
) -> list[ir.Value]:  # fmt: skip
    """A step over so many k, while the memory reads rows of b that are so far ahead: one for `part` of them."""
    for i in range(max(1, many // part)):
        row = builder.add(builder.add(builder.udiv(k, k.type(part)), ahead), k.type(i))
        ask_for(builder, b, builder.mul(row, b_stride), PANEL, b_dtype.bitwidth // 8)
    return step(k, sums)


def add_row(
    builder: ir.IRBuilder, a_rows: list[ir.Value], k: ir.Value, b_vectors: list[ir.Value], sums: list[ir.Value]
) -> list[ir.Value]:
    """sums[r, panel] + a[r, k] * one row of each panel of b."""
    new_sums = []
    for r, a_row in enumerate(a_rows):
        a_vector = _splat(builder, builder.gep(a_row, [k]), PANEL)
        for panel, b_vector in enumerate(b_vectors):
            new_sums.append(fmuladd(builder, a_vector, b_vector, sums[r * len(b_vectors) + panel]))
    return new_sums


def _splat(builder: ir.IRBuilder, place: ir.Value, lanes: int) -> ir.Value:
    """The number at a place, in each lane of a vector."""
    undefined = ir.Constant(ir.VectorType(place.type.pointee, lanes), ir.Undefined)
    vector = builder.insert_element(undefined, builder.load(place), ir.IntType(32)(0))
    return builder.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


def fmuladd(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c, with one rounding where the machine can, with two where it cannot (never a slow library call)."""
    element, lanes = (a.type.element, f"v{a.type.count}") if isinstance(a.type, ir.VectorType) else (a.type, "")
    name = f"llvm.fmuladd.{lanes}{'f32' if isinstance(element, ir.FloatType) else 'f64'}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _widen(builder: ir.IRBuilder, bits: ir.Value, kind: Any) -> ir.Value:
    """A number of NARROW bits, or a vector of those of a float16, as float32; floats stay as they are."""
    if kind == types.uint16:  # bfloat16
        word = builder.zext(bits, ir.IntType(32))
        return builder.bitcast(builder.shl(word, word.type(16)), ir.FloatType())
    if kind == types.int16:  # float16
        half, whole = ir.HalfType(), ir.FloatType()
        if isinstance(bits.type, ir.VectorType):
            half, whole = (ir.VectorType(element, bits.type.count) for element in (half, whole))
        return builder.fpext(builder.bitcast(bits, half), whole)
    return bits


@intrinsic
def _wide(_, x):
    wide = types.float32 if x in (types.int16, types.uint16) else x
    return wide(x), lambda context, builder, signature, values: _widen(builder, values[0], x)


def _wide_in_python(x: Any) -> Any:
    return widened(np.asarray(x))[()]


# wide(x): the number that one element of a matrix stands for, see `arrays.NARROW`
wide: Callable[..., Any] = _wide_in_python if DISABLE_JIT else _wide


def ask_for(builder: ir.IRBuilder, base: ir.Value, first: ir.Value, count: int, size: int) -> None:
    """Prefetch `count` elements of so many bytes, from element `first` on."""
    for place in range(0, count, 64 // size):
        prefetch(builder, builder.gep(base, [builder.add(first, first.type(place))]))


def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for a cache line that will be read soon, into the L2 cache; an address outside any array does no harm."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    to_read, into_l2, data = word(0), word(2), word(1)
    builder.call(function, [builder.bitcast(address, byte), to_read, into_l2, data])


@intrinsic
def _fma(_, a, b, c):
    return a(a, a, a), lambda context, builder, signature, values: fmuladd(builder, *values)


def _fma_in_python(a: Any, b: Any, c: Any) -> Any:
    return type(c)(float(a) * float(b) + float(c))


# fma(a, b, c): a * b + c of three numbers of one float type; LLVM makes vectors of it in a loop over an array
fma: Callable[..., Any] = _fma_in_python if DISABLE_JIT else _fma
