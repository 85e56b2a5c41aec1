"""GPT-2 in numba: the functions of `reference.py` under the same names and arguments, made for speed.

`reference.py` says what is computed; here is how. Four kernels do all the work, each of them a function that
does a range of independent pieces (`_..._range`) and one that deals the pieces out to threads:

    _linear       x @ weight + bias, with the activation or the residual addition done on the way out
    _attend       queries against the KV cache: scores, softmax, weighted values
    _layer_norm   rows to mean 0 and variance 1
    _embed        rows gathered from wte and wpe

Matrices lie in memory as panels (`pack`): PANEL columns side by side, all rows of one panel before the next, so
that the tile of `tile.py` reads weights as one stream.

Every number of a result is computed by one fixed chain of operations: sums over a long axis are cut into blocks
of BLOCK terms, a block is one chain of fused multiply-adds from zero, and the blocks are added up in order. The
chain depends on neither the number of rows, nor the batch, nor the threads, nor how a text was cut into calls:
one call over a whole text, chunks, single tokens and padded batches give the same bits.

    B batch   T new positions   S cached + new positions   C width (n_embd)   H heads   D head size
    F MLP width   V vocabulary   N context length   R rows = B * T
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import float32, prange
from numba.extending import overload
from numba.np.ufunc.parallel import threading_layer

from .errors import InputError
from .reference import Tap, no_tap, split_heads
from .tile import PANEL, ROWS, config, fma, make_tile
from .weights import MLP, Array, Attention, BlockWeights, GPT2Weights, WeightSource

BLOCK = 64  # terms of one chain; shorter chains round less, longer ones read and write the totals less often
CHUNK = 96  # rows (or queries) that share one pass over a panel of weights (or over the keys); a multiple of ROWS
LANES = 16  # running sums over a row: element i goes to sum i % LANES
GRAIN = 1 << 16  # multiply-adds below which it is not worth waking another thread


def _jit(parallel: bool = False) -> Callable[[Any], Any]:
    """numba.njit with the settings that all kernels share: compiled code is kept on disk if that is possible."""

    def compile_(function: Any) -> Any:
        options: dict[str, Any] = {"nogil": True, "parallel": parallel, "error_model": "numpy"}
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that can be written to: compile anew in every process
            return numba.njit(**options)(function)

    return compile_


MaskArguments = tuple[Array, Array, Array]  # mask (B, 1, T, S), keys (B, S), counts (B,): see `_visible_keys`

tile_1, tile_2, tile_4, tile_full = make_tile(1), make_tile(2), make_tile(4), make_tile(ROWS)


# ---------------------------------------------------------------------------------------------- packed weights


class Panels(NamedTuple):
    """A matrix (K, N) cut into panels of PANEL columns; the last panel is filled up with zeros."""

    data: Array  # (ceil(N / PANEL), K, PANEL), data[p, k, c] = matrix[k, p * PANEL + c]
    columns: int  # N


def pack(name: str, source: WeightSource, dtype: Any) -> Any:
    """Read one weight and put it into the layout that the kernels want.

    Parameters
    ----------
    name : str
        As in `weights.weight_shapes`. Linear maps become Panels of themselves, (inputs, outputs); wte and
        lm_head become Panels of their transpose, (C, V): logits multiplies by it, embed gathers its columns.
        Biases, layer norms and wpe stay arrays.
    source : WeightSource
        Its array is dropped after packing: one copy of the weights stays in memory.
    dtype : float32 or float64
    """
    array = np.ascontiguousarray(source.load(), dtype)
    if name in ("wte.weight", "lm_head.weight"):
        return pack_matrix(array, transpose=True)
    if name.split(".")[-2] in ("c_attn", "c_proj", "c_fc") and name.endswith(".weight"):
        return pack_matrix(array)
    return array


def pack_matrix(matrix: Array, transpose: bool = False) -> Panels:
    """Panels of a C-contiguous matrix (K, N), or of the transpose of an (N, K) one."""
    K, N = matrix.shape[::-1] if transpose else matrix.shape
    data = _aligned((-(-N // PANEL), K, PANEL), matrix.dtype)
    with _pool() as threads:
        _deal(
            len(data), data.size, threads, _pack_range, _pack, _scratch(threads, data.dtype), matrix, transpose, data, N
        )
    return Panels(data, N)


def unpack(panels: Panels) -> Array:
    """The matrix (K, N) that was packed."""
    count, K, _ = panels.data.shape
    return np.ascontiguousarray(panels.data.transpose(1, 0, 2).reshape(K, count * PANEL)[:, : panels.columns])


def _aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """np.empty at a multiple of 64 bytes, so that no vector of the tile straddles two cache lines."""
    dtype = np.dtype(dtype)
    raw: Array = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    aligned: Array = raw[start : raw.size - 64 + start].view(dtype).reshape(shape)
    return aligned


@_jit()
def _pack_range(first, last, scratch, matrix, transpose, data, N):
    for p in range(first, last):
        column = p * PANEL
        width = min(PANEL, N - column)
        for k in range(data.shape[1]):
            for c in range(width):
                data[p, k, c] = matrix[column + c, k] if transpose else matrix[k, column + c]
            for c in range(width, PANEL):
                data[p, k, c] = 0


@_jit(parallel=True)
def _pack(parts, pieces, scratch, matrix, transpose, data, N):
    for part in prange(parts):
        first, last = pieces * part // parts, pieces * (part + 1) // parts
        _pack_range(first, last, scratch[part], matrix, transpose, data, N)


# ----------------------------------------------------------------------------------------------------- threads

_lock = threading.Lock()
_threads = int(config.NUMBA_NUM_THREADS)
_forked = False


def set_num_threads(n: int) -> None:
    """Let the kernels use `n` threads, at most NUMBA_NUM_THREADS (default: the cores of this machine).

    Results do not depend on it.

    Raises
    ------
    InputError
        If n is not in 1..NUMBA_NUM_THREADS.
    """
    global _threads
    if not 1 <= n <= config.NUMBA_NUM_THREADS:
        raise InputError(f"the number of threads must be in 1..{config.NUMBA_NUM_THREADS}, got {n}")
    _threads = int(n)


def get_num_threads() -> int:
    """The number of threads that the kernels may use."""
    return _threads


@contextmanager
def _pool() -> Iterator[int]:
    """How many threads a call may use: all of them for one caller at a time, its own thread for any other.

    numba's thread pools cannot all be used by two Python threads at once ("workqueue" aborts), and a GNU
    OpenMP pool does not survive a fork. Since results do not depend on the number of threads, whoever finds the
    pool taken, or lost in a fork, goes on alone.
    """
    if _forked or not _lock.acquire(blocking=False):
        yield 1
        return
    try:
        yield _threads
    finally:
        _lock.release()


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.Lock()
    try:
        _forked = threading_layer() != "workqueue"  # that pool starts anew by itself
    except ValueError:  # no pool was ever started
        _forked = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _deal(pieces: int, work: int, threads: int, alone: Any, parallel: Any, scratch: Array, *arguments: Any) -> None:
    """Run a kernel on its pieces, `work` multiply-adds in all, by as many threads as that is worth.

    alone(first, last, scratch of one thread, *arguments) does pieces first..last-1 on the caller's own thread;
    parallel(parts, pieces, scratch, *arguments) deals all pieces out to `parts` threads.
    """
    parts = min(threads, pieces, work // GRAIN)
    if parts <= 1:
        alone(0, pieces, scratch[0], *arguments)
    else:
        parallel(parts, pieces, scratch, *arguments)


# ------------------------------------------------------------------------------------- elementary functions


def _by_dtype(single: Callable[[Any], Any], double: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of one number: `single` for a float32, `double` for a float64."""

    def choose(x: Any) -> Any:
        return single(x) if isinstance(x, np.float32) else type(x)(double(x))

    @overload(choose, inline="always")
    def compiled(x):
        return (lambda x: single(x)) if x == float32 else (lambda x: double(x))

    return choose


@_jit()
def _exp32(x):
    """e ** x of a float32; at most 1 ulp from the true value, down to the smallest subnormal.

    x = n ln 2 + r with |r| <= ln(2) / 2; a polynomial for e ** r; 2 ** n made from bits, in two halves so that
    neither overflows. No branch, so that LLVM makes vectors of it, and no conversion of floats to integers, which
    would be undefined for NaN: adding 1.5 * 2 ** 23 leaves round(x / ln 2) in the low bits of the sum.
    """
    x = np.float32(105.0) if x > np.float32(105.0) else x  # comparisons that keep a NaN
    x = np.float32(-105.0) if x < np.float32(-105.0) else x
    shifted = np.float32(fma(x, np.float32(1.4426950408889634), np.float32(12582912.0)))
    n = shifted - np.float32(12582912.0)
    r = fma(n, np.float32(-0.693145751953125), x)
    r = fma(n, np.float32(-1.42860676533018704e-06), r)
    p = np.float32(1.0 / 5040)
    p = fma(p, r, np.float32(1.0 / 720))
    p = fma(p, r, np.float32(1.0 / 120))
    p = fma(p, r, np.float32(1.0 / 24))
    p = fma(p, r, np.float32(1.0 / 6))
    p = fma(p, r, np.float32(0.5))
    p = fma(p, r, np.float32(1.0))
    p = fma(p, r, np.float32(1.0))
    bits = np.int32(shifted.view(np.int32) - np.int32(0x4B400000))  # n as an integer
    half = np.int32(bits >> np.int32(1))
    rest = np.int32(bits - half)
    p = p * np.int32(np.int32(half + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * np.int32(np.int32(rest + np.int32(127)) << np.int32(23)).view(np.float32)


@_jit()
def _erfc32(x):
    return np.float32(math.erfc(x))


exp = _by_dtype(_exp32, math.exp if not config.DISABLE_JIT else np.exp)
erfc = _by_dtype(_erfc32, math.erfc)

ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu_erf": 2, "gelu_quick": 3, "relu": 4}


@_jit()
def _activate(v, start, count, activation):
    """Apply an activation to v[start : start + count] in place; the formulas are those of `reference.py`.

    0.5 (1 + tanh u) is written as 1 / (1 + exp(-2u)), and 1 + erf(z) as erfc(-z): the same numbers without the
    cancellation for negative x.
    """
    number = v.dtype.type
    one = number(1)
    if activation == 1:
        linear, cubic = number(-2 * 0.7978845608028654), number(-2 * 0.7978845608028654 * 0.044715)
        for i in range(start, start + count):
            x = v[i]
            v[i] = x / (one + exp(x * (linear + cubic * (x * x))))
    elif activation == 2:
        half, root = number(0.5), number(-0.7071067811865476)
        for i in range(start, start + count):
            v[i] = half * v[i] * erfc(root * v[i])
    elif activation == 3:
        slope = number(-1.702)
        for i in range(start, start + count):
            v[i] = v[i] / (one + exp(slope * v[i]))
    elif activation == 4:
        for i in range(start, start + count):
            v[i] = number(0) if v[i] < number(0) else v[i]


# ------------------------------------------------------------------------------------------------ linear maps


@_jit()
def _multiply(rows, a, a_start, a_stride, b, b_start, b_stride, depth, out, out_start, out_stride):
    """One panel: out[r] += a[r] @ b for r < rows, see `make_tile`."""
    r = 0
    while r < rows:
        left = rows - r
        a_row, out_row = a_start + r * a_stride, out_start + r * out_stride
        if left >= ROWS:
            tile_full(a, a_row, a_stride, b, b_start, b_stride, depth, out, out_row, out_stride)
            r += ROWS
        elif left >= 4:
            tile_4(a, a_row, a_stride, b, b_start, b_stride, depth, out, out_row, out_stride)
            r += 4
        elif left >= 2:
            tile_2(a, a_row, a_stride, b, b_start, b_stride, depth, out, out_row, out_stride)
            r += 2
        else:
            tile_1(a, a_row, a_stride, b, b_start, b_stride, depth, out, out_row, out_stride)
            r += 1


@_jit()
def _linear_range(first, last, totals, x, weight, bias, activation, add, out):
    """Pieces first..last-1; a piece is one panel of columns for one chunk of rows."""
    (R, K), N = x.shape, out.shape[1]
    chunks = -(-R // CHUNK)
    for piece in range(first, last):
        column, row = piece // chunks * PANEL, piece % chunks * CHUNK
        rows, width = min(CHUNK, R - row), min(PANEL, N - column)

        # 1. the product, block by block of the sum; what a block reads of the weights stays in the L1 cache
        for i in range(rows * PANEL):
            totals[i] = 0
        for k in range(0, K, BLOCK):
            depth = min(BLOCK, K - k)
            _multiply(rows, x, row * K + k, K, weight, column * K + k * PANEL, PANEL, depth, totals, 0, PANEL)

        # 2. the bias, then the activation, then the way out: stored, or added to the residual stream
        if bias.size > 0:
            for r in range(rows):
                for c in range(width):
                    totals[r * PANEL + c] += bias[column + c]
        _activate(totals, 0, rows * PANEL, activation)
        for r in range(rows):
            for c in range(width):
                total = totals[r * PANEL + c]
                out[row + r, column + c] = out[row + r, column + c] + total if add else total


@_jit(parallel=True)
def _linear(parts, pieces, scratch, x, weight, bias, activation, add, out):
    for part in prange(parts):
        first, last = pieces * part // parts, pieces * (part + 1) // parts
        _linear_range(first, last, scratch[part], x, weight, bias, activation, add, out)


# --------------------------------------------------------------------------------------------- embedding, norm


@_jit()
def _embed_range(first, last, scratch, ids, positions, wte, wpe, out):
    for r in range(first, last):
        panel, column = ids[r] // PANEL, ids[r] % PANEL
        for c in range(out.shape[1]):
            out[r, c] = wte[panel, c, column] + wpe[positions[r], c]


@_jit(parallel=True)
def _embed(parts, pieces, scratch, ids, positions, wte, wpe, out):
    for part in prange(parts):
        first, last = pieces * part // parts, pieces * (part + 1) // parts
        _embed_range(first, last, scratch[part], ids, positions, wte, wpe, out)


@_jit()
def _sum_of_lanes(sums):
    """The sum of LANES running sums, by halves."""
    width = LANES
    while width > 1:
        width //= 2
        for i in range(width):
            sums[i] += sums[i + width]
    return sums[0]


@_jit()
def _layer_norm_range(first, last, sums, x, weight, bias, epsilon, out):
    C = x.shape[1]
    number = x.dtype.type
    for r in range(first, last):
        # 1. the mean
        sums[:LANES] = 0
        for c in range(0, C, LANES):
            for i in range(min(LANES, C - c)):
                sums[i] += x[r, c + i]
        mean = _sum_of_lanes(sums) / number(C)
        # 2. the variance: the mean square of what is left without the mean
        sums[:LANES] = 0
        for c in range(0, C, LANES):
            for i in range(min(LANES, C - c)):
                centred = x[r, c + i] - mean
                sums[i] += centred * centred
        deviation = np.sqrt(_sum_of_lanes(sums) / number(C) + number(epsilon))
        # 3. normalise, scale and shift
        for c in range(C):
            out[r, c] = (x[r, c] - mean) / deviation * weight[c] + bias[c]


@_jit(parallel=True)
def _layer_norm(parts, pieces, scratch, x, weight, bias, epsilon, out):
    for part in prange(parts):
        first, last = pieces * part // parts, pieces * (part + 1) // parts
        _layer_norm_range(first, last, scratch[part], x, weight, bias, epsilon, out)


# --------------------------------------------------------------------------------------------------- attention


@_jit()
def _remember(qkv, cache, start, T):
    """Write the new keys and values into the cache: (B * T, 3HD) -> (2, B, H, start:start + T, D)."""
    _, B, H, _, D = cache.shape
    for b in range(B):
        for h in range(H):
            for t in range(T):
                for d in range(D):
                    cache[0, b, h, start + t, d] = qkv[b * T + t, (H + h) * D + d]
                    cache[1, b, h, start + t, d] = qkv[b * T + t, (2 * H + h) * D + d]


@_jit()
def _visible_keys(mask, keys, counts):
    """List the keys of each sequence that any query may see: mask (B, 1, T, S) -> keys (B, S), counts (B,).

    A key whose mask is -inf for all queries (padding) is left out of every loop from here on, so that a padded
    sequence goes through the very operations of the sequence without padding.
    """
    B, _, T, S = mask.shape
    for b in range(B):
        counts[b] = 0
        for j in range(S):
            seen = False
            for t in range(T):
                seen = seen or mask[b, 0, t, j] != -np.inf
            if seen:
                keys[b, counts[b]] = j
                counts[b] += 1


@_jit()
def _attend_range(first, last, scratch, qkv, cache, start, T, scale, mask, keys, counts, heads, probs):
    """Pieces first..last-1; a piece is one chunk of queries of one head of one sequence."""
    H, D = cache.shape[2], cache.shape[4]
    width = -(-D // PANEL) * PANEL  # D, filled up to whole panels
    chunks = -(-T // CHUNK)
    number = qkv.dtype.type
    row_stride = 3 * H * D
    for piece in range(first, last):
        b, h, t_first = piece // chunks // H, piece // chunks % H, piece % chunks * CHUNK
        t_last = min(t_first + CHUNK, T)
        S = counts[b] if mask.size > 0 else start + t_last
        room = -(-S // PANEL) * PANEL
        at_values = room * D
        at_scores = at_values + room * width
        at_totals = at_scores + ROWS * room

        # 1. keys into panels of PANEL keys (their transpose), values into rows of whole panels
        for j in range(room):
            panel, lane = j // PANEL * PANEL * D, j % PANEL
            if j < S:
                position = keys[b, j] if mask.size > 0 else j
                for d in range(D):
                    scratch[panel + d * PANEL + lane] = cache[0, b, h, position, d]
                    scratch[at_values + j * width + d] = cache[1, b, h, position, d]
                for d in range(D, width):
                    scratch[at_values + j * width + d] = 0
            else:
                for d in range(D):
                    scratch[panel + d * PANEL + lane] = 0

        for t in range(t_first, t_last, ROWS):
            rows = min(ROWS, t_last - t)
            query = (b * T + t) * row_stride + h * D
            # the number of keys that the last query of the group looks at
            longest = 0
            for r in range(rows):
                longest = max(longest, _limit(b, t + r, S, start, mask, keys))
            panels = -(-longest // PANEL)

            # 2. scores = q . k, for groups of queries and panels of keys
            for i in range(ROWS * room):
                scratch[at_scores + i] = 0
            for panel in range(panels):
                for d in range(0, D, BLOCK):
                    _multiply(
                        rows, qkv, query + d, row_stride, scratch, (panel * D + d) * PANEL, PANEL, min(BLOCK, D - d),
                        scratch, at_scores + panel * PANEL, room,
                    )  # fmt: skip

            # 3. softmax, not yet divided by its sum; keys past a query's limit get probability 0
            shortest = longest
            for r in range(rows):
                limit = _limit(b, t + r, S, start, mask, keys)
                shortest = min(shortest, limit)
                row = at_scores + r * room
                highest = number(-np.inf)
                for j in range(limit):
                    score = scratch[row + j] * number(scale)
                    if mask.size > 0:
                        score += mask[b, 0, t + r, keys[b, j]]
                    scratch[row + j] = score
                    highest = score if score > highest else highest
                for j in range(limit):
                    scratch[row + j] = exp(scratch[row + j] - highest)
                for j in range(limit, panels * PANEL):
                    scratch[row + j] = 0

            # 4. the sum of the probabilities, and of the values weighted by them
            for i in range(rows * width):
                scratch[at_totals + i] = 0
            for j in range(0, longest, BLOCK):
                for d in range(0, width, PANEL):
                    value = at_values + j * width + d
                    if j + BLOCK <= shortest:
                        _multiply(
                            rows, scratch, at_scores + j, room, scratch, value, width, BLOCK,
                            scratch, at_totals + d, width,
                        )  # fmt: skip
                    else:  # each query stops at its own last key: what lies after it must not matter, NaN or not
                        for r in range(rows):
                            depth = min(BLOCK, _limit(b, t + r, S, start, mask, keys) - j)
                            if depth > 0:
                                _multiply(
                                    1, scratch, at_scores + r * room + j, room, scratch, value, width, depth,
                                    scratch, at_totals + r * width + d, width,
                                )  # fmt: skip
            for r in range(rows):
                row = at_scores + r * room
                sums = scratch[at_totals + ROWS * width : at_totals + ROWS * width + LANES]
                sums[:] = 0
                for j in range(0, panels * PANEL, LANES):
                    for i in range(LANES):
                        sums[i] += scratch[row + j + i]
                total = _sum_of_lanes(sums)
                if total == 0:  # a query that may see no key gets zeros
                    total = number(1)
                for d in range(D):
                    heads[b * T + t + r, h * D + d] = scratch[at_totals + r * width + d] / total
                if probs.size > 0:
                    for j in range(_limit(b, t + r, S, start, mask, keys)):
                        position = keys[b, j] if mask.size > 0 else j
                        probs[b, h, t + r, position] = scratch[row + j] / total


@_jit()
def _limit(b, t, S, start, mask, keys):
    """One past the last key that query t may see, counted in the list of visible keys."""
    if mask.size == 0:
        return start + t + 1
    limit = S
    while limit > 0 and mask[b, 0, t, keys[b, limit - 1]] == -np.inf:
        limit -= 1
    return limit


@_jit(parallel=True)
def _attend(parts, pieces, scratch, qkv, cache, start, T, scale, mask, keys, counts, heads, probs):
    for part in prange(parts):
        first, last = pieces * part // parts, pieces * (part + 1) // parts
        _attend_range(first, last, scratch[part], qkv, cache, start, T, scale, mask, keys, counts, heads, probs)


@_jit()
def _scores(qkv, cache, start, T, scale, scores):
    """The tap `attn.scores`: q . k * scale for all keys, visible or not, as step 2 of `_attend_range` computes it."""
    _, B, H, _, D = cache.shape
    number = qkv.dtype.type
    for b in range(B):
        for h in range(H):
            for t in range(T):
                for j in range(start + T):
                    score = number(0)
                    for d in range(0, D, BLOCK):
                        total = number(0)
                        for i in range(d, min(D, d + BLOCK)):
                            total = fma(qkv[b * T + t, h * D + i], cache[0, b, h, j, i], total)
                        score += total
                    scores[b, h, t, j] = score * number(scale)


# ------------------------------------------------------------------------- the functions of reference.py


def _scratch(threads: int, dtype: Any, S: int = 0, D: int = 0) -> Array:
    """Room for each thread's totals, or for attention over S keys of size D."""
    room, width = -(-S // PANEL) * PANEL, -(-D // PANEL) * PANEL
    attention_room = room * D + room * width + ROWS * room + ROWS * width + LANES
    size = max(CHUNK * PANEL, attention_room, LANES)
    return _aligned((threads, -(-size // 16) * 16), dtype)


def _rows(x: Array) -> Array:
    """(..., C) -> (R, C), contiguous and writable as the compiled kernels expect it (none of them writes to it)."""
    return np.require(x.reshape(-1, x.shape[-1]), requirements=["C", "A", "W"])


def _linear_into(
    out: Array, x: Array, weight: Any, bias: Array, threads: int, scratch: Array, activation: int = 0, add: bool = False
) -> None:
    """out = activation(x @ weight + bias), or out += that: (R, K) @ (K, N) -> (R, N)."""
    pieces = len(weight.data) * -(-len(x) // CHUNK)
    work = len(x) * weight.data.size
    _deal(pieces, work, threads, _linear_range, _linear, scratch, x, weight.data, bias, activation, add, out)


def _layer_norm_into(
    out: Array, x: Array, weight: Array, bias: Array, epsilon: float, threads: int, scratch: Array
) -> None:
    """out = layer_norm(x): (R, C) -> (R, C)."""
    _deal(len(x), 4 * x.size, threads, _layer_norm_range, _layer_norm, scratch, x, weight, bias, epsilon, out)


def _attend_into(
    heads: Array, probs: Array, qkv: Array, cache: Array, start: int, scale: float, mask: MaskArguments,
    threads: int, scratch: Array,
) -> None:  # fmt: skip
    """heads = softmax(q . k * scale, causal or + mask) @ v over the cache: (R, 3HD) -> (R, HD)."""
    _, B, H, _, D = cache.shape
    T = len(qkv) // B
    _remember(qkv, cache, start, T)
    pieces, work = B * H * -(-T // CHUNK), 2 * len(qkv) * (start + T) * H * D
    _deal(pieces, work, threads, _attend_range, _attend, scratch, qkv, cache, start, T, scale, *mask, heads, probs)


def embed(input_ids: Array, position_ids: Array, wte: Any, wpe: Array) -> Array:
    """Token vector plus position vector: ids and positions (B, T) -> (B, T, C)."""
    out = _aligned((*input_ids.shape, wpe.shape[1]), wpe.dtype)
    rows = _rows(out)
    ids, positions = (np.require(i.reshape(-1), np.int64, ["C", "A", "W"]) for i in (input_ids, position_ids))
    with _pool() as threads:
        scratch = _scratch(threads, out.dtype)
        _deal(len(rows), out.size, threads, _embed_range, _embed, scratch, ids, positions, wte.data, wpe, rows)
    return out


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Give each vector mean 0 and variance 1, then scale and shift: (..., C) -> (..., C)."""
    out = _aligned(x.shape, x.dtype)
    with _pool() as threads:
        _layer_norm_into(_rows(out), _rows(x), weight, bias, epsilon, threads, _scratch(threads, x.dtype))
    return out


def linear(x: Array, weight: Any, bias: Array) -> Array:
    """x @ weight + bias: (..., inputs) -> (..., outputs)."""
    out = _aligned((*x.shape[:-1], weight.columns), x.dtype)
    with _pool() as threads:
        _linear_into(_rows(out), _rows(x), weight, bias, threads, _scratch(threads, x.dtype))
    return out


def _mask_arguments(mask: Array | None, B: int, dtype: Any) -> MaskArguments:
    """mask, keys, counts for `_attend`; all empty for a causal mask."""
    if mask is None:
        return np.empty((0, 0, 0, 0), dtype), np.empty((0, 0), np.int64), np.empty(0, np.int64)
    mask = np.require(mask, dtype, ["C", "A", "W"])
    keys, counts = np.empty((B, mask.shape[-1]), np.int64), np.empty(B, np.int64)
    _visible_keys(mask, keys, counts)
    return mask, keys, counts


def attention(x: Array, w: Attention, cache: Array, start: int, mask: Array | None, tap: Tap, name: str) -> Array:
    """Causal self-attention of T new positions over all S = start + T: (B, T, C) -> (B, T, C).

    cache: (2, B, H, >= S, D), the keys and values; positions 0..start-1 are read, start..S-1 written.
    mask: (B, 1, T, S), added to the scores instead of the causal mask where a file's padding asks for it.
    """
    B, T, _ = x.shape
    H, D = cache.shape[2], cache.shape[4]
    qkv = linear(x, *w.c_attn)  # (B, T, C) -> (B, T, 3HD)
    heads = _aligned((B, T, H * D), x.dtype)
    shape = (B, H, T, start + T) if tap is not no_tap else (0, 0, 0, 0)
    scores, probs = np.zeros(shape, x.dtype), np.zeros(shape, x.dtype)
    with _pool() as threads:
        scratch = _scratch(threads, x.dtype, start + T, D)
        mask_arguments = _mask_arguments(mask, B, x.dtype)
        _attend_into(_rows(heads), probs, _rows(qkv), cache, start, w.scale, mask_arguments, threads, scratch)
        if tap is not no_tap:
            _scores(_rows(qkv), cache, start, T, w.scale, scores)
    for part, value in zip("qkv", split_heads(qkv, w.n_head), strict=True):
        tap(f"{name}.{part}", value)
    tap(f"{name}.scores", scores)
    tap(f"{name}.probs", probs)
    tap(f"{name}.heads", heads)
    out = linear(heads, *w.c_proj)  # (B, T, HD) -> (B, T, C)
    tap(f"{name}.out", out)
    return out


def activate(x: Array, activation: str) -> Array:
    """One of ACTIVATIONS, element by element."""
    out = x.copy()
    with _pool():
        _activate(out.reshape(-1), 0, out.size, ACTIVATIONS[activation])
    return out


def gelu_tanh(x: Array) -> Array:
    """GELU as GPT-2 computes it."""
    return activate(x, "gelu_tanh")


def gelu_erf(x: Array) -> Array:
    """GELU exactly, x times the normal distribution's cumulative probability."""
    return activate(x, "gelu_erf")


def gelu_quick(x: Array) -> Array:
    """GELU by a sigmoid, x * sigmoid(1.702 x)."""
    return activate(x, "gelu_quick")


def relu(x: Array) -> Array:
    """max(x, 0); a NaN stays a NaN."""
    return activate(x, "relu")


def mlp(x: Array, w: MLP, tap: Tap, name: str) -> Array:
    """Two linear maps with a GELU between, each position by itself: (B, T, C) -> (B, T, C)."""
    hidden = linear(x, *w.c_fc)  # (B, T, C) -> (B, T, F)
    tap(f"{name}.c_fc", hidden)
    hidden = activate(hidden, w.activation)
    tap(f"{name}.gelu", hidden)
    out = linear(hidden, *w.c_proj)  # (B, T, F) -> (B, T, C)
    tap(f"{name}.out", out)
    return out


def block(x: Array, w: BlockWeights, cache: Array, start: int, mask: Array | None, tap: Tap, name: str) -> Array:
    """One transformer block; each half reads a normalised copy and adds to the stream: (B, T, C) -> (B, T, C)."""
    normed = layer_norm(x, *w.ln_1)
    tap(f"{name}.ln_1", normed)
    x = x + attention(normed, w.attn, cache, start, mask, tap, f"{name}.attn")
    tap(f"{name}.resid_mid", x)
    normed = layer_norm(x, *w.ln_2)
    tap(f"{name}.ln_2", normed)
    x = x + mlp(normed, w.mlp, tap, f"{name}.mlp")
    tap(f"{name}.resid_post", x)
    return x


def transformer(
    input_ids: Array,
    position_ids: Array,
    w: GPT2Weights,
    caches: list[Array],
    start: int = 0,
    mask: Array | None = None,
    tap: Tap = no_tap,
) -> Array:
    """The whole stack: ids and positions (B, T) -> last_hidden_state (B, T, C).

    caches: L arrays (2, B, H, >= start + T, D), read up to `start` and written from there, see `attention`.
    Without a tap the residual additions and the activation happen inside the linear maps, with the same bits.
    """
    x = embed(input_ids, position_ids, w.wte, w.wpe)  # (B, T) -> (B, T, C)
    tap("embed", x)
    if tap is no_tap:
        _blocks(x, w, caches, start, mask)
    else:
        for i, (block_weights, cache) in enumerate(zip(w.h, caches, strict=True)):
            x = block(x, block_weights, cache, start, mask, tap, f"h.{i}")
    x = layer_norm(x, *w.ln_f)
    tap("ln_f", x)
    return x


def _blocks(x: Array, w: GPT2Weights, caches: list[Array], start: int, mask: Array | None) -> None:
    """All blocks on the residual stream x (B, T, C), in place; they share their buffers."""
    B, T, C = x.shape
    H, D = caches[0].shape[2], caches[0].shape[4]
    R, F, dtype = B * T, w.h[0].mlp.c_fc.bias.size, x.dtype
    normed, qkv, heads, hidden = (_aligned((R, width), dtype) for width in (C, 3 * H * D, H * D, F))
    rows, no_probs = _rows(x), np.empty((0, 0, 0, 0), dtype)
    with _pool() as threads:
        mask_arguments = _mask_arguments(mask, B, dtype)
        scratch = _scratch(threads, dtype, start + T, D)
        for b, cache in zip(w.h, caches, strict=True):
            _layer_norm_into(normed, rows, *b.ln_1, threads, scratch)
            _linear_into(qkv, normed, *b.attn.c_attn, threads, scratch)
            _attend_into(heads, no_probs, qkv, cache, start, b.attn.scale, mask_arguments, threads, scratch)
            _linear_into(rows, heads, *b.attn.c_proj, threads, scratch, add=True)
            _layer_norm_into(normed, rows, *b.ln_2, threads, scratch)
            _linear_into(hidden, normed, *b.mlp.c_fc, threads, scratch, ACTIVATIONS[b.mlp.activation])
            _linear_into(rows, hidden, *b.mlp.c_proj, threads, scratch, add=True)


def logits(hidden: Array, lm_head: Any, lm_head_bias: Array, tap: Tap = no_tap) -> Array:
    """A score for every token of the vocabulary: (B, T, C) @ (C, V) -> (B, T, V)."""
    scores = linear(hidden, lm_head, lm_head_bias)
    tap("logits", scores)
    return scores
