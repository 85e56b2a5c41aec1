"""Matrices of whole numbers with scales (`quantised.Quantised`), as the kernels read them.

    form   levels of a panel, PANEL columns                                   scales of a panel
    int8   (K, PANEL) int8                                                    (1, PANEL)
    int4   (K / 8, PANEL) uint32: eight levels of a column, the first lowest  (K / GROUP, PANEL), times 2 ** -28
    both with offsets                                                         (K / GROUP, 2, PANEL): scale, offset

A weight is float32(level * scale), or float32((level + offset) * scale) with a whole offset, rounded once. The loops
here make that number in registers and do with it what `tile` does, in the same order: the results are, bit for bit,
those of the float32 kernels on these weights. Levels of 4 bits are moved to the top of a word, where their sign is, and
count there as 2 ** 28 times what they are; so do their offsets.

For up to six rows the weights go from the registers into the sums, for one or two those of two panels at once; for
more, a block of them is written out once for all rows. K is filled up to whole steps of STEP levels.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

from ..quantised import GROUP
from .jit import jit
from .layout import LEVELS, PANEL, STEP, TOP, per_element
from .machine import DISABLE_JIT
from .tile import add_row, ask_for, blocks


def make_tile(rows: int, panels: int) -> Callable[..., None]:
    """The tile with a fixed number of rows, over so many panels at once.

        tile(a, a_start, a_stride, b, b_start, b_next, scales, s_start, s_next, depth, terms,
             out, out_start, out_stride)

    does what `tile.make_tile` says with b, which is kept in one of LEVELS: its panels begin b_next elements apart, and
    those of the scales s_next. depth, terms: multiples of STEP.
    """
    width = panels * PANEL

    def tile_in_python(
        a, a_start, a_stride, b, b_start, b_next, scales, s_start, s_next, depth, terms, out, out_start, out_stride
    ):  # fmt: skip
        weights = np.empty((depth, width), out.dtype)
        for p in range(panels):
            panel = np.empty(depth * PANEL, out.dtype)
            widen_in_python(b, b_start + p * b_next, scales, s_start + p * s_next, 0, depth // STEP, panel)
            weights[:, p * PANEL : (p + 1) * PANEL] = panel.reshape(depth, PANEL)
        left, right = a.reshape(-1).astype(np.float64), weights.astype(np.float64)
        for r in range(rows):
            row = left[a_start + r * a_stride :][:depth]
            target = out.reshape(-1)[out_start + r * out_stride :][:width]
            for block in range(0, depth, terms):
                total = np.zeros(width, out.dtype)
                for k in range(block, min(depth, block + terms)):
                    total = (row[k] * right[k] + total).astype(out.dtype)
                target += total

    @intrinsic
    def tile(
        _, a, a_start, a_stride, b, b_start, b_next, scales, s_start, s_next, depth, terms, out, out_start, out_stride
    ):  # fmt: skip
        size = types.intp

        def generate(context, builder, _, values):
            def pointers(kind, place, count):
                array, start, step = place
                base = builder.gep(context.make_array(kind)(context, builder, array).data, [start])
                return [builder.gep(base, [builder.mul(step, step.type(i))]) for i in range(count)]

            a_rows = pointers(a, values[:3], rows)
            b_panels, s_panels = pointers(b, values[3:6], panels), pointers(scales, values[6:9], panels)
            depth, terms = values[9:11]
            later = [
                [builder.gep(panel, [builder.mul(step, depth.type(panels))]) for panel in those]
                for those, step in ((b_panels, values[5]), (s_panels, values[8]))
            ]

            def step(k, sums):
                for b_later, s_later in zip(*later, strict=True):
                    _ask_for_weights(builder, b.dtype, has_offsets(scales), b_later, s_later, k)
                places = zip(b_panels, s_panels, strict=True)
                weights = [_weights(builder, b.dtype, has_offsets(scales), *place, k) for place in places]
                for j in range(STEP):
                    k_and_j = builder.add(k, k.type(j))
                    sums = add_row(builder, a_rows, k_and_j, [weight(j) for weight in weights], sums)
                return sums

            blocks(builder, [(STEP, step)], depth, terms, pointers(out, values[11:], rows), panels)
            return context.get_dummy_value()

        numbers = b, size, size, scales, size, size, size, size
        return types.void(a, size, size, *numbers, out, size, size), generate

    chosen: Callable[..., None] = tile_in_python if DISABLE_JIT else tile
    return chosen


def _ask_for_weights(
    builder: ir.IRBuilder, kind: Any, offsets: bool, levels: ir.Value, scales: ir.Value, k: ir.Value
) -> None:
    """Have the memory read rows k to k + STEP - 1 of a panel, which will be needed soon, and their scales.

    A Zen 3 makes weights of levels for so long that it does not read on by itself meanwhile.
    """
    per = 8 if kind == types.uint32 else 1  # levels of a column in one element
    wanted = [(levels, builder.mul(k, k.type(PANEL // per)), STEP // per * PANEL, kind.bitwidth // 8)]
    if offsets or per > 1:  # they have enough scales for it to matter
        numbers = 2 * PANEL if offsets else PANEL
        wanted.append((scales, builder.mul(builder.udiv(k, k.type(GROUP)), k.type(numbers)), numbers, 4))
    for place in wanted:
        ask_for(builder, *place)


def _weights(
    builder: ir.IRBuilder, kind: Any, offsets: bool, levels: ir.Value, scales: ir.Value, k: ir.Value
) -> Callable[[int], Any]:
    """The code that makes row k + j of a panel, j < STEP, as floats; k: a multiple of STEP."""
    index, whole = k.type, ir.VectorType(ir.IntType(32), PANEL)
    vector, byte = ir.VectorType(ir.FloatType(), PANEL), ir.VectorType(ir.IntType(8), PANEL)

    def load(base: ir.Value, row: ir.Value, kind: ir.Type, align: int) -> ir.Value:
        place = builder.gep(base, [builder.mul(row, index(PANEL))])
        return builder.load(builder.bitcast(place, kind.as_pointer()), align=align)

    def every(number: int) -> ir.Constant:
        return ir.Constant(whole, [number] * PANEL)

    group = builder.udiv(k, index(GROUP)) if offsets or kind == types.uint32 else index(0)
    first = builder.mul(group, index(2)) if offsets else group
    scale = load(scales, first, vector, 4)
    offset = load(scales, builder.add(first, index(1)), vector, 4) if offsets else None
    word = load(levels, builder.udiv(k, index(STEP)), whole, 4) if kind == types.uint32 else None

    def row(j: int) -> ir.Value:
        if word is None:
            level = builder.sext(load(levels, builder.add(k, index(j)), byte, 1), whole)
        else:
            level = builder.and_(builder.shl(word, every(TOP - 4 * j)), every(15 << TOP))
        number = builder.sitofp(level, vector)
        return builder.fmul(number if offset is None else builder.fadd(number, offset), scale)

    return row


@intrinsic
def _widen(_, b, b_start, scales, s_start, k, steps, target):
    size = types.intp

    def generate(context, builder, _, values):
        b_array, b_start, s_array, s_start, k, steps, target_array = values
        index, vector = steps.type, ir.VectorType(ir.FloatType(), PANEL)
        levels, scale, base = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in ((b, b_array), (scales, s_array), (target, target_array))
        )
        levels, scale = builder.gep(levels, [b_start]), builder.gep(scale, [s_start])
        before, loop, after = builder.block, builder.append_basic_block("step"), builder.append_basic_block("end")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(index)
        start = builder.mul(step, index(STEP))
        later = builder.add(builder.add(k, start), builder.mul(steps, index(STEP)))
        _ask_for_weights(builder, b.dtype, has_offsets(scales), levels, scale, later)
        row = _weights(builder, b.dtype, has_offsets(scales), levels, scale, builder.add(k, start))
        for j in range(STEP):
            place = builder.gep(base, [builder.mul(builder.add(start, index(j)), index(PANEL))])
            builder.store(row(j), builder.bitcast(place, vector.as_pointer()), align=4)
        following = builder.add(step, index(1))
        step.add_incoming(index(0), before)
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(b, size, scales, size, size, size, target), generate


def widen_in_python(b: Any, b_start: int, scales: Any, s_start: int, k: int, steps: int, target: Any) -> None:
    """What `widen` does, in NumPy."""
    rows = b.reshape(-1)[b_start:].reshape(-1, PANEL)[k // per_element(b.dtype) :]
    parts = scales.reshape(-1)[s_start:].reshape(-1, 2 if has_offsets(scales) else 1, PANEL)
    if b.dtype == LEVELS["int8"]:
        levels = rows[: steps * STEP]
    else:
        shifts = np.arange(TOP, -4, -4, dtype=np.uint32)[:, None]
        levels = (rows[:steps, None] << shifts & np.uint32(15 << TOP)).reshape(-1, PANEL).view(np.int32)
    grouped = has_offsets(scales) or b.dtype == LEVELS["int4"]
    parts = np.repeat(parts[k // GROUP :], GROUP, axis=0)[: len(levels)] if grouped else parts[:1]
    weights = levels.astype(np.float32)
    weights = (weights + parts[:, 1] if has_offsets(scales) else weights) * parts[:, 0]
    target[: weights.size] = weights.reshape(-1)


# widen(b, b_start, scales, s_start, k, steps, target): STEP * steps rows of a panel as floats, from row k on, a
# multiple of GROUP; b_start and s_start: where the panel and its scales begin
widen: Callable[..., None] = widen_in_python if DISABLE_JIT else _widen


def holds_levels(array: Any) -> bool:
    """Whether numba's type of an array is one of LEVELS."""
    return array.dtype in (types.int8, types.uint32)


def has_offsets(scales: Any) -> bool:
    """Whether scales, or numba's type of them, come with offsets."""
    return scales.ndim == 4


def number(weight, scales, panel, k, column):
    """One number of a packed matrix."""
    level = _level_int8 if weight.dtype == LEVELS["int8"] else _level_int4
    times = _with_offset if has_offsets(scales) else _scaled
    return times(level(weight, panel, k, column), scales, panel, k, column)


@overload(number, inline="always")
def _(weight, scales, panel, k, column):
    level = _level_int8 if weight.dtype == types.int8 else _level_int4
    times = _with_offset if has_offsets(scales) else _scaled
    return lambda weight, scales, panel, k, column: times(level(weight, panel, k, column), scales, panel, k, column)


@jit()
def _level_int8(weight, panel, k, column):
    return np.float32(weight[panel, k, column])


@jit()
def _level_int4(weight, panel, k, column):
    level = (np.int64(weight[panel, k // STEP, column]) >> (4 * (k % STEP)) & 15 ^ 8) - 8
    return np.float32(level << TOP)


@jit()
def _scaled(level, scales, panel, k, column):
    return level * scales[panel, k // GROUP if scales.shape[1] > 1 else 0, column]


@jit()
def _with_offset(level, scales, panel, k, column):
    return (level + scales[panel, k // GROUP, 1, column]) * scales[panel, k // GROUP, 0, column]
