"""The kernels: linear maps, embedding, layer norm and attention over a range of independent pieces of work.

`..._range` does pieces first..last-1 on one thread; several threads take chunks of pieces until none is left (see
`threads.run_pieces`). scratch is memory of the thread.

    B batch   T new positions   S cached + new positions   C width (n_embd)   H heads   D head size
    R rows = B * T   K, N inputs and outputs of a linear map
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..arrays import Array
from .jit import jit
from .layout import LANES, PANEL, PIECE_PANELS, PIECE_QUERIES, PIECE_ROWS, ROWS, TERMS
from .products import WIDE, add_product, multiply, number, tile_wide
from .tile import SQUARE, fma, query_scores
from .vectors import activate_in_place, add, copy, exp, highest, span, total, transpose_block

# ------------------------------------------------------------------------------------------------ linear maps


@jit()
def linear_range(first, last, scratch, x, weight, scales, bias, activation, added, terms, group, out):
    """out (R, N) = activation(x (R, K) @ weight + bias), or with `added` out += that; weight: see `Panels`.

    A piece is `group` panels of columns for PIECE_ROWS rows. terms: of one chain, see TERMS.
    """
    R, N = len(x), out.shape[1]
    row_pieces = -(-R // PIECE_ROWS)
    block = scratch[PIECE_ROWS * PIECE_PANELS * PANEL :][: TERMS * PANEL]
    for piece in range(first, last):
        panel, row = piece // row_pieces * group, piece % row_pieces * PIECE_ROWS
        rows, panels = min(PIECE_ROWS, R - row), min(group, len(weight) - panel)
        column, stride = panel * PANEL, panels * PANEL
        width, totals = min(stride, N - column), scratch[: rows * stride]

        # 1. the bias, then the product, block by block of the sum; what one block reads stays in the caches
        totals[:] = 0
        if bias.size > 0:
            for r in range(rows):
                copy(bias[column : column + width], totals[r * stride : r * stride + width])
        add_product(rows, x, row, weight, scales, panel, panels, terms, totals, block)

        # 2. the activation, and the way out: stored, or added to the residual stream
        activate_in_place(totals, activation)
        for r in range(rows):
            if added:
                add(totals[r * stride : r * stride + width], out[row + r, column : column + width])
            else:
                copy(totals[r * stride : r * stride + width], out[row + r, column : column + width])


# --------------------------------------------------------------------------------------------- embedding, norm


@jit()
def embed_range(first, last, scratch, ids, positions, wte, scales, wpe, out):
    """out (R, C) = token vector plus position vector; a piece is one row. wte: Panels of the transposed table."""
    for r in range(first, last):
        panel, column = ids[r] // PANEL, ids[r] % PANEL
        for c in range(out.shape[1]):
            out[r, c] = number(wte, scales, panel, c, column) + wpe[positions[r], c]


@jit()
def layer_norm_range(first, last, scratch, x, weight, bias, epsilon, out):
    """out (R, C) = each row of x with mean 0 and variance 1, scaled and shifted; a piece is one row."""
    C = x.shape[1]
    number = x.dtype.type
    lanes, squares = scratch[:LANES], scratch[LANES : LANES + C]
    for r in range(first, last):
        row, normed = x[r], out[r]
        # 1. take off the mean
        mean = total(row, lanes) / number(C)
        for c in range(C):
            normed[c] = row[c] - mean
            squares[c] = normed[c] * normed[c]
        # 2. divide by the root of what is left on average, the variance
        deviation = np.sqrt(total(squares, lanes) / number(C) + number(epsilon))
        for c in range(C):
            normed[c] = normed[c] / deviation * weight[c] + bias[c]


# --------------------------------------------------------------------------------------------------- attention


@jit()
def find_visible_keys(mask, keys, limits):
    """Fill in keys and limits of VisibleKeys for a mask (B, 1, T, S).

    A key whose mask is -inf for all queries (padding) is left out of every loop from here on, so that a padded
    sequence goes through the very operations of the sequence without padding.
    """
    (B, S), T = keys.shape, limits.shape[1]
    for b in range(B):
        count = 0
        for j in range(S):
            seen = False
            for t in range(T):
                seen = seen or mask[b, 0, t, j] != -np.inf
            if seen:
                keys[b, count] = j
                count += 1
        for t in range(T):
            limits[b, t] = count
            while limits[b, t] > 0 and mask[b, 0, t, keys[b, limits[b, t] - 1]] == -np.inf:
                limits[b, t] -= 1


@jit()
def append_range(first, last, scratch, qkv, cache, start):
    """Write the new keys and values into the cache: (B * T, 3HD) -> (2, B, H, start:start + T, D).

    A piece is one head of one sequence.
    """
    _, B, H, _, D = cache.shape
    T = len(qkv) // B
    for piece in range(first, last):
        b, h = piece // H, piece % H
        for t in range(T):
            row = qkv[b * T + t]
            copy(row[(H + h) * D : (H + h + 1) * D], cache[0, b, h, start + t])
            copy(row[(2 * H + h) * D : (2 * H + h + 1) * D], cache[1, b, h, start + t])


# The steps of `attend_range` are inlined: as functions of their own they take a tenth of a single token's attention.


class AttentionRoom(NamedTuple):
    """Where a thread keeps the parts of one piece of attention: slices of its scratch, each of one dimension.

    S keys in panels of PANEL make `length` scores of a query; D in whole panels is the `width` of a value.
    """

    keys: Array  # (length / PANEL, D, PANEL)
    values: Array  # (S, width)
    scores: Array  # (ROWS, length)
    heads: Array  # (ROWS, width)
    sums: Array  # (ROWS,): of the probabilities before they are divided by it
    lanes: Array  # (LANES,)


@jit(inline="always")
def attention_room(scratch, S, D):
    """See AttentionRoom; `forward.scratch_for` knows how much it takes."""
    length, width = -(-S // PANEL) * PANEL, -(-D // PANEL) * PANEL
    values = length * D
    scores = values + length * width
    heads = scores + ROWS * length
    sums = heads + ROWS * width
    lanes = sums + ROWS
    return AttentionRoom(
        scratch[:values],
        scratch[values:scores],
        scratch[scores:heads],
        scratch[heads:sums],
        scratch[sums:lanes],
        scratch[lanes : lanes + LANES],
    )


@jit(inline="always")
def gather_keys(room, cache, flat_cache, b, h, keys):
    """Put the keys of one head into panels of PANEL keys: (S, D) -> (S / PANEL, D, PANEL)."""
    _, _, H, length, D = cache.shape
    S = keys.size
    if S == 0 or keys[S - 1] == S - 1:  # none is left out
        plane = (b * H + h) * length * D
        for j in range(0, S, PANEL):
            transpose_block(flat_cache, plane + j * D, D, min(PANEL, S - j), D, room.keys, j * D, PANEL)
    else:
        for j in range(S):
            for d in range(D):
                room.keys[(j // PANEL * D + d) * PANEL + j % PANEL] = cache[0, b, h, keys[j], d]


@jit(inline="always")
def gather_values(room, cache, flat_cache, b, h, keys):
    """Copy the values of one head together, filled up to whole panels: (S, D) -> (S, width)."""
    _, B, H, length, D = cache.shape
    S, width = keys.size, -(-D // PANEL) * PANEL
    if width == D and (S == 0 or keys[S - 1] == S - 1):
        start = ((B + b) * H + h) * length * D
        copy(flat_cache[start : start + S * D], room.values[: S * D])
    else:
        for j in range(S):
            row = room.values[j * width : (j + 1) * width]
            row[D:] = 0
            copy(cache[1, b, h, keys[j]], row[:D])


@jit(inline="always")
def score_queries(rows, qkv, query, stride, D, room, length, wide):
    """scores[r, j] = q[r] . k[j] for j < wide; the queries are numbers query + r * stride ... of qkv."""
    room.scores[: rows * length] = 0
    for j in range(0, wide, PANEL):
        multiply(rows, qkv, query, stride, room.keys, j * D, PANEL, D, TERMS, room.scores, j, length)


@jit(inline="always")
def score_one_query(qkv, query, flat_cache, plane, S, D, room):
    """scores[j] = q . k[j] for j < S, SQUARE or more; flat_cache: the keys from number `plane` on."""
    for j in range(0, S, SQUARE):
        key = min(j, S - SQUARE)  # the last SQUARE: some of them once more, which changes nothing
        start, end = plane + key * D, plane + (key + SQUARE) * D
        copy(flat_cache[start:end], room.keys[: SQUARE * D])  # read as they lie in memory, which is faster
        query_scores(qkv, query, room.keys, D, flat_cache, end, room.scores, key)


@jit()
def softmax(scores, limit, scale, visible, b, t, lanes):
    """Turn the first `limit` scores of query t into exp(score - highest), the others into 0; return the sum."""
    number = scores.dtype.type
    if limit == 0:  # a query that may see no key gets zeros, as in reference.softmax
        scores[:] = 0
        return number(1)
    lowest = number(-np.inf)
    scale = number(scale)
    for j in range(scores.size):
        scores[j] *= scale
    counts = True
    if visible.mask.size > 0:
        counts = visible.kept[b, t] > 0
        if not counts:
            scores[:] = 0
        mask = visible.mask[b, 0, t]
        for j in range(limit):
            scores[j] += mask[visible.keys[b, j]]
    scores[limit:] = lowest
    peak = highest(scores, lanes)
    finite = -np.inf < peak < np.inf  # infinities and NaN, which `highest` passes over, show in the result as they are
    if counts and finite and (peak < visible.safe[0] or peak > visible.safe[1]):
        visible.unsafe[0] = 1
    for j in range(scores.size):
        scores[j] = exp(scores[j] - peak)
    return total(scores, lanes)


@jit(inline="always")
def weigh_values(limits, finite, room, length, values, value_start, width):
    """heads[r] = sum over j < limits[r] of probability[r, j] * value[j], before the division by the sum.

    A query's sum ends at its own last key: what comes after must not matter. For a group of queries the sum runs on
    to the last key of all, with probability 0, which only is the same if the values after are `finite`.
    """
    rows = limits.size
    shortest, longest = span(limits)
    room.heads[: rows * width] = 0
    if rows == 1:
        for d in range(0, width if longest > 0 else 0, WIDE):
            if d + WIDE <= width:
                tile_wide(
                    room.scores, 0, 0, values, value_start + d, width, PANEL, longest, TERMS, room.heads, d, 0,
                )  # fmt: skip
            else:
                for rest in range(d, width, PANEL):
                    multiply(
                        1, room.scores, 0, 0, values, value_start + rest, width, longest, TERMS, room.heads, rest, 0,
                    )  # fmt: skip
        return
    for j in range(0, longest, TERMS):
        for d in range(0, width, PANEL):
            value = value_start + j * width + d
            if finite or j + TERMS <= shortest:
                multiply(
                    rows, room.scores, j, length, values, value, width, min(TERMS, longest - j), TERMS,
                    room.heads, d, width,
                )  # fmt: skip
            else:
                for r in range(rows):
                    if j < limits[r]:
                        multiply(
                            1, room.scores, r * length + j, length, values, value, width, min(TERMS, limits[r] - j),
                            TERMS, room.heads, r * width + d, width,
                        )  # fmt: skip


@jit()
def attend_range(first, last, scratch, qkv, cache, flat_cache, scale, visible, heads, probs):
    """heads (R, HD) = softmax(q . k * scale + mask) @ v; a piece is PIECE_QUERIES queries of one head of one sequence.

    qkv: (R, 3HD), of which the queries are read. flat_cache: the cache as one row of numbers. probs: (B, H, T, S),
    or empty where nobody wants the probabilities.
    """
    _, _, H, room_length, D = cache.shape
    T = visible.limits.shape[1]
    width, half = -(-D // PANEL) * PANEL, flat_cache.size // 2
    query_pieces = -(-T // PIECE_QUERIES)
    for piece in range(first, last):
        b, h, start = piece // query_pieces // H, piece // query_pieces % H, piece % query_pieces * PIECE_QUERIES
        limits = visible.limits[b, start : start + PIECE_QUERIES]
        nearest, S = span(limits)
        keys = visible.keys[b, :S]
        room, length = attention_room(scratch, S, D), -(-S // PANEL) * PANEL

        # 1. keys in panels, but for a single query; values as they lie in the cache if their rows fill whole panels.
        # Where a key is left out neither is so. For a few queries reading values by panels would take longer than to
        # copy them first, in the order of memory; for many it is nothing beside the rest.
        all_kept, plane = S == 0 or keys[S - 1] == S - 1, (b * H + h) * room_length * D
        as_they_lie = all_kept and limits.size == 1 and S >= SQUARE and D % SQUARE == 0 and D <= TERMS
        if not as_they_lie:
            gather_keys(room, cache, flat_cache, b, h, keys)
        if width == D and all_kept and not 1 < limits.size <= ROWS:
            values, value_start = flat_cache, half + plane
        else:
            gather_values(room, cache, flat_cache, b, h, keys)
            values, value_start = room.values, 0
        finite = total(values[value_start + nearest * width : value_start + S * width], room.lanes) * 0 == 0

        for t in range(0, limits.size, ROWS):
            group = limits[t : t + ROWS]
            row, wide = b * T + start + t, -(-span(group)[1] // PANEL) * PANEL

            # 2. scores = q . k, for ROWS queries and PANEL keys at a time
            query = (row * 3 * H + h) * D
            if as_they_lie:
                score_one_query(qkv, query, flat_cache, plane, S, D, room)
            else:
                score_queries(group.size, qkv, query, 3 * H * D, D, room, length, wide)

            # 3. softmax, without the division by its sum, which is left to the end
            for r in range(group.size):
                scores = room.scores[r * length : r * length + wide]
                room.sums[r] = softmax(scores, group[r], scale, visible, b, start + t + r, room.lanes)

            # 4. the values, weighted
            weigh_values(group, finite, room, length, values, value_start, width)
            for r in range(group.size):
                head = heads[row + r, h * D : (h + 1) * D]
                for d in range(D):
                    head[d] = room.heads[r * width + d] / room.sums[r]
                if probs.size > 0:
                    for j in range(group[r]):
                        probs[b, h, start + t + r, keys[j]] = room.scores[r * length + j] / room.sums[r]


@jit()
def all_scores(qkv, cache, start, T, scale, scores):
    """The tap `attn.scores`: q . k * scale for all keys, visible or not, as `score_queries` computes it."""
    _, B, H, _, D = cache.shape
    number = qkv.dtype.type
    for b in range(B):
        for h in range(H):
            for t in range(T):
                for j in range(start + T):
                    score = number(0)
                    for d in range(0, D, TERMS):
                        chain = number(0)
                        for i in range(d, min(D, d + TERMS)):
                            chain = fma(qkv[b * T + t, h * D + i], cache[0, b, h, j, i], chain)
                        score += chain
                    scores[b, h, t, j] = score * number(scale)
