"""Products with matrices in Panels, whatever their numbers are kept as: floats, 16 bits of them, or levels with scales.

Each form has a register tile of its own (`tile`, `levels`); here is which tile takes which rows.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

from numba.extending import overload

from . import levels, tile
from .jit import jit
from .layout import LEVELS, PANEL, ROWS, STEP, STREAMS, TERMS
from .tile import wide

tile_1, tile_2, tile_3, tile_4, tile_5, tile_6, tile_7 = (
    tile.make_tile(min(rows, ROWS), ask=1) for rows in range(1, 8)
)  # those of ROWS or more are never called
tile_full, tile_again = tile.make_tile(ROWS, ask=1), tile.make_tile(ROWS)
levels_1_1, levels_1_2, levels_2_1, levels_2_2 = (levels.make_tile(*n) for n in ((1, 1), (1, 2), (2, 1), (2, 2)))
levels_3, levels_4, levels_5, levels_6 = (levels.make_tile(rows, 1) for rows in range(3, 7))
half_3, half_4, half_5, half_full = (tile.make_tile(rows, ask=2) for rows in (3, 4, 5, ROWS))
quarter_full = tile.make_tile(ROWS, ask=4)
WIDE = 64  # columns of a tile of one row that makes use of all of a row of values
MANY = tile.BY_HAND  # `multiply_many` is for the loop that is written by hand
tile_wide = tile.make_tile(1, WIDE // PANEL)
streams_1, streams_2, streams_3 = (tile.make_tile(rows, (*STREAMS, 1, 1, 1)[rows]) for rows in (1, 2, 3))


@jit()
def multiply(rows, a, a_start, a_stride, b, b_start, b_stride, depth, terms, out, out_start, out_stride):
    """One panel: out[r] += a[r] @ b for r < rows, see `tile.make_tile`."""
    r = 0
    while r < rows:
        left = rows - r
        # A tile of a few rows waits for its own sums; of the last ones two like tiles take less time than a full one
        # and what is left
        n = left if left <= ROWS else ROWS if left >= 2 * ROWS else -(-left // 2)
        a_row, out_row = a_start + r * a_stride, out_start + r * out_stride
        if n == ROWS and r > 0:
            tile_again(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == ROWS:
            tile_full(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == 4:
            tile_4(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == 5:
            tile_5(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == 3:
            tile_3(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == 2:
            tile_2(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == 1:
            tile_1(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == 6:
            tile_6(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        else:
            tile_7(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        r += n


@jit()
def multiply_many(rows, a, a_start, a_stride, b, b_start, b_stride, depth, terms, out, out_start, out_stride):
    """`multiply` for more than ROWS rows, of which each of the first tiles asks for a part of the next block of b.

    That is read while all of them compute, and not in the time of the first one, which would have to wait for it. A
    tile at the end asks for all of it: that takes little time where it is there, and some of it may not be.
    """
    parts, part, r = 2 if rows < 3 * ROWS else 4, 0, 0
    while r < rows:
        left = rows - r
        n = left if left <= ROWS else ROWS if left >= 2 * ROWS else -(-left // 2)
        a_row, out_row, next_part = (
            a_start + r * a_stride,
            out_start + r * out_stride,
            part * (depth // parts) * b_stride,
        )
        half, quarter = part < parts == 2, part < parts == 4
        if n == ROWS and quarter:
            quarter_full(a, a_row, a_stride, b, b_start, b_stride, next_part, depth, terms, out, out_row, out_stride)
        elif n == ROWS and half:
            half_full(a, a_row, a_stride, b, b_start, b_stride, next_part, depth, terms, out, out_row, out_stride)
        elif n == ROWS:
            tile_again(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == 5 and half:
            half_5(a, a_row, a_stride, b, b_start, b_stride, next_part, depth, terms, out, out_row, out_stride)
        elif n == 5:
            tile_5(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif n == 4 and half:
            half_4(a, a_row, a_stride, b, b_start, b_stride, next_part, depth, terms, out, out_row, out_stride)
        elif n == 4:
            tile_4(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        elif half:
            half_3(a, a_row, a_stride, b, b_start, b_stride, next_part, depth, terms, out, out_row, out_stride)
        else:
            tile_3(a, a_row, a_stride, b, b_start, b_stride, 0, depth, terms, out, out_row, out_stride)
        r, part = r + n, part + 1


@jit()
def multiply_few(rows, a, a_start, a_stride, b, b_start, b_stride, b_next, depth, terms, out, out_start, out_stride):
    """STREAMS[rows] panels at once, for less than len(STREAMS) rows."""
    if rows == 1:
        streams_1(a, a_start, a_stride, b, b_start, b_stride, b_next, depth, terms, out, out_start, out_stride)
    elif rows == 2:
        streams_2(a, a_start, a_stride, b, b_start, b_stride, b_next, depth, terms, out, out_start, out_stride)
    else:
        streams_3(a, a_start, a_stride, b, b_start, b_stride, b_next, depth, terms, out, out_start, out_stride)


@jit()
def add_floats(rows, x, row, weight, scales, panel, panels, terms, totals, block):
    """totals (rows, panels * PANEL) += rows of x @ panels of weight, in chains of so many terms."""
    K, width = x.shape[1], panels * PANEL
    few = rows < len(STREAMS) and panels == STREAMS[rows]
    if few and (rows < 3 or weight.itemsize == x.itemsize):  # LLVM has too few registers to widen two panels for three
        multiply_few(rows, x, row * K, K, weight, panel * PANEL * K, PANEL, PANEL * K, K, terms, totals, 0, width)
        return
    step = K if rows <= ROWS else terms  # so that what all tiles of a panel read stays in the caches
    for k in range(0, K, step):
        depth = min(step, K - k)
        for p in range(panels):
            place = ((panel + p) * K + k) * PANEL
            if MANY and rows > ROWS and x.itemsize == 4:
                multiply_many(
                    rows, x, row * K + k, K, weight, place, PANEL, depth, terms, totals, p * PANEL, width,
                )  # fmt: skip
            else:
                multiply(rows, x, row * K + k, K, weight, place, PANEL, depth, terms, totals, p * PANEL, width)


@jit()
def multiply_levels(rows, x, start, K, weight, b, scales, s, out, column, width):
    """One panel for 3 to 6 rows: out[r] += x[r] @ weight, see `levels.make_tile`."""
    if rows == 3:
        levels_3(x, start, K, weight, b, 0, scales, s, 0, K, TERMS, out, column, width)
    elif rows == 4:
        levels_4(x, start, K, weight, b, 0, scales, s, 0, K, TERMS, out, column, width)
    elif rows == 5:
        levels_5(x, start, K, weight, b, 0, scales, s, 0, K, TERMS, out, column, width)
    else:
        levels_6(x, start, K, weight, b, 0, scales, s, 0, K, TERMS, out, column, width)


@jit()
def add_levels(rows, x, row, weight, scales, panel, panels, terms, totals, block):
    """The same for weights that are kept as levels; terms is TERMS."""
    K, width, r = x.shape[1], panels * PANEL, row * x.shape[1]
    b_next, s_next = weight[0].size, scales[0].size
    if rows <= 2 and K % STEP == 0:
        p = 0
        while p < panels:
            b, s, two = (panel + p) * b_next, (panel + p) * s_next, p + 2 <= panels
            if rows == 1 and two:
                levels_1_2(x, r, K, weight, b, b_next, scales, s, s_next, K, TERMS, totals, p * PANEL, width)
            elif rows == 1:
                levels_1_1(x, r, K, weight, b, b_next, scales, s, s_next, K, TERMS, totals, p * PANEL, width)
            elif two:
                levels_2_2(x, r, K, weight, b, b_next, scales, s, s_next, K, TERMS, totals, p * PANEL, width)
            else:
                levels_2_1(x, r, K, weight, b, b_next, scales, s, s_next, K, TERMS, totals, p * PANEL, width)
            p += 2 if two else 1
        return
    if rows <= 6 and K % STEP == 0:  # of more, each tile would make floats of the same levels
        for p in range(panels):
            b, s = (panel + p) * b_next, (panel + p) * s_next
            multiply_levels(rows, x, r, K, weight, b, scales, s, totals, p * PANEL, width)
        return
    for k in range(0, K, TERMS):
        depth = min(TERMS, K - k)
        for p in range(panels):
            levels.widen(weight, (panel + p) * b_next, scales, (panel + p) * s_next, k, -(-depth // STEP), block)
            multiply(rows, x, r + k, K, block, 0, PANEL, depth, depth, totals, p * PANEL, width)


def add_product(rows, x, row, weight, scales, panel, panels, terms, totals, block):
    """`add_floats` or `add_levels`, by what the weights are kept as."""
    add = add_levels if weight.dtype in LEVELS.values() else add_floats
    add(rows, x, row, weight, scales, panel, panels, terms, totals, block)


@overload(add_product, inline="always")
def _(rows, x, row, weight, scales, panel, panels, terms, totals, block):
    add = add_levels if levels.holds_levels(weight) else add_floats
    return lambda rows, x, row, weight, scales, panel, panels, terms, totals, block: add(
        rows, x, row, weight, scales, panel, panels, terms, totals, block
    )


def number(weight, scales, panel, k, column):
    """One number of a matrix in Panels."""
    if weight.dtype in LEVELS.values():
        return levels.number(weight, scales, panel, k, column)
    return wide(weight[panel, k, column])


@overload(number, inline="always")
def _(weight, scales, panel, k, column):
    if levels.holds_levels(weight):
        return lambda weight, scales, panel, k, column: levels.number(weight, scales, panel, k, column)
    return lambda weight, scales, panel, k, column: wide(weight[panel, k, column])
