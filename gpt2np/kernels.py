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

import functools
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding
import numba
import numpy as np
from numba import float32, prange
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python  # type: ignore[attr-defined]
from numba.extending import overload
from numba.np.ufunc.parallel import threading_layer

from . import tile
from .errors import InputError
from .reference import Tap, no_tap, split_heads
from .tile import PANEL, ROWS, SQUARE, config, fma, take, transpose
from .weights import MLP, Array, Attention, BlockWeights, GPT2Weights, LayerNorm, Linear, WeightSources

BLOCK = 128  # terms of one chain; shorter chains round less, longer ones read and write the totals less often
CHUNK = 48  # rows that share one pass over a panel of weights; a multiple of every ROWS
QUERIES = 96  # queries that share one transposition of the keys; likewise
LANES = 64  # running sums over a row: element i goes to sum i % LANES; enough to hide how long one addition takes
GRAIN = 1 << 17  # multiply-adds below which it is not worth waking another thread
READ = 8  # multiply-adds that take as long as to read one number from memory
READ_BYTES = 1 << 19  # of a file's weights at once, so that they are packed while they are in the caches
KNOWN_NUMBA = (0, 68)  # the newest version of which it is known what cached code needs: see `_link_runtime`


class _DiskCache(FunctionCache):
    """numba's cache of compiled code, which also sees changes of tile.py and never fails a call.

    The folder is numba's choice: NUMBA_CACHE_DIR, else __pycache__ beside this file, else the user's own cache.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        stamp = self._cache_file._source_stamp, hashlib.sha256(Path(tile.__file__).read_bytes()).hexdigest()
        self._cache_file._source_stamp = stamp

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            if numba.version_info.short > KNOWN_NUMBA:
                return super().load_overload(signature, context)
            _link_runtime()
            return self._load_overload(signature, context)
        except Exception:  # a damaged file, of which pickle may raise anything: compile anew
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        # a full or write-protected disk, or a damaged index there: compile anew the next time
        with suppress(Exception):
            super().save_overload(signature, data)

    def holds(self, machine: Any) -> bool:
        """Whether there is compiled code for this kind of machine."""
        try:
            return any(key[1] == machine for key in self._cache_file._load_index())
        except Exception:
            return False


def _jit(parallel: bool = False) -> Callable[[Any], Any]:
    """numba.njit with the settings that all kernels share; compiled code is kept on disk where that is possible."""

    def decorate(function: Any) -> Any:
        kernel: Any = numba.njit(nogil=True, parallel=parallel, error_model="numpy")(function)
        if not config.DISABLE_JIT:
            with suppress(RuntimeError):  # no folder to write to: compile anew in every process
                kernel._cache = _DiskCache(function)
        return kernel

    return decorate


@functools.cache
def _link_runtime() -> None:
    """Tell LLVM the addresses of numba's runtime.

    That is all that compiled code needs. `CPUContext.refresh`, by which numba prepares itself before it looks into
    its cache, is for compiling: 0.2 s and 45 MB. numba calls it itself when something is missing in the cache.
    """
    for name, address in _nrt_python.c_helpers.items():
        llvmlite.binding.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


def needs_compilation() -> bool:
    """Whether the first call will take some seconds longer, because compiled kernels are not on disk yet."""
    if config.DISABLE_JIT or _attend.signatures:
        return False
    machine = cpu_target.target_context.codegen().magic_tuple()
    return not (isinstance(_attend._cache, _DiskCache) and _attend._cache.holds(machine))


Sight = tuple[Array, Array, Array]  # mask (B, 1, T, S) or empty, keys (B, S), limits (B, T): see `_look`

tile_1, tile_2, tile_4, tile_full = (tile.make_tile(rows) for rows in (1, 2, 4, ROWS))


# ----------------------------------------------------------------------------------------------- vector loops
# They work on slices, from index 0: where numba cannot see that an index is not negative, LLVM makes no vectors.


@_jit()
def _copy(source, target):
    for i in range(target.size):
        target[i] = source[i]


@_jit()
def _add(source, target):
    for i in range(target.size):
        target[i] += source[i]


@_jit()
def _share(turn, parts, pieces, smallest):
    """The next share of all pieces, first..last-1, for whichever thread asks; first = pieces: nothing is left.

    A share is a fraction of what is left, and no smaller than `smallest`: long runs of pieces first, which read
    memory as one stream, and short ones at the end, so that all threads finish together even if one was held up.
    """
    first, last = 0, 0
    for _ in range(take(turn) + 1):
        first, last = last, min(pieces, last + max(smallest, -(-(pieces - last) // (2 * parts))))
    return first, last


@_jit()
def _sum(v, lanes):
    """The sum of a vector: LANES running sums over every LANES-th element, then these by halves."""
    lanes[:] = 0
    whole = v.size - v.size % LANES
    for start in range(0, whole, LANES):
        part = v[start : start + LANES]
        for i in range(LANES):
            lanes[i] += part[i]
    for i in range(v.size - whole):
        lanes[i] += v[whole + i]
    width = LANES
    while width > 1:
        width //= 2
        for i in range(width):
            lanes[i] += lanes[i + width]
    return lanes[0]


@_jit()
def _highest(v, lanes):
    """The greatest number of a vector; a NaN may be passed over."""
    lanes[:] = -np.inf
    whole = v.size - v.size % LANES
    for start in range(0, whole, LANES):
        part = v[start : start + LANES]
        for i in range(LANES):
            lanes[i] = part[i] if part[i] > lanes[i] else lanes[i]
    for i in range(v.size - whole):
        lanes[i] = v[whole + i] if v[whole + i] > lanes[i] else lanes[i]
    width = LANES
    while width > 1:
        width //= 2
        for i in range(width):
            lanes[i] = lanes[i + width] if lanes[i + width] > lanes[i] else lanes[i]
    return lanes[0]


@_jit()
def _span(numbers):
    """The least and the greatest of some integers."""
    least = greatest = numbers[0]
    for n in numbers:
        least, greatest = min(least, n), max(greatest, n)
    return least, greatest


@_jit()
def _transpose(source, s_start, s_stride, rows, columns, target, t_start, t_stride):
    """target[c, r] = source[r, c], addressed as in `transpose`."""
    for r in range(0, rows, SQUARE):
        for c in range(0, columns, SQUARE):
            s, t = s_start + r * s_stride + c, t_start + c * t_stride + r
            if r + SQUARE <= rows and c + SQUARE <= columns:
                transpose(source, s, s_stride, target, t, t_stride)
            else:
                for i in range(min(SQUARE, rows - r)):
                    for j in range(min(SQUARE, columns - c)):
                        target[t + j * t_stride + i] = source[s + i * s_stride + j]


# ---------------------------------------------------------------------------------------------- packed weights


class Panels(NamedTuple):
    """A matrix (K, N) cut into panels of PANEL columns; the last panel is filled up with zeros."""

    data: Array  # (ceil(N / PANEL), K, PANEL), data[p, k, c] = matrix[k, p * PANEL + c]
    columns: int  # N


def pack(sources: WeightSources, dtype: Any) -> dict[str, Any]:
    """Read every weight and put it into the layout that the kernels want.

    Linear maps become Panels of themselves, (inputs, outputs); wte and lm_head become Panels of their transpose,
    (C, V): logits multiplies by it, embed gathers its columns. Biases, layer norms and wpe stay arrays.

    Parameters
    ----------
    sources : mapping of name to WeightSource
        Named as in `weights.weight_shapes`.
    dtype : float32 or float64
    """
    shapes = {name: _packed_shape(name, source.shape) for name, source in sources.items()}
    sizes = [-(-math.prod(shape) // 16) * 16 for shape in shapes.values()]
    # One array for all of them: the system backs a large one with large pages, which are soon there and soon found
    parts = np.split(_aligned((sum(sizes),), dtype), np.cumsum(sizes)[:-1])
    places = {
        name: part[: math.prod(shape)].reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }

    def read(name: str) -> Any:
        source, place = sources[name], places[name]
        at, transposed = 0, name in TABLES
        for rows in _rows_of(source):
            if _is_matrix(name):
                _put(place, at, rows, transposed)
            else:
                place[at : at + len(rows)] = rows
            at += len(rows)
        return Panels(place, source.shape[0 if transposed else 1]) if _is_matrix(name) else place

    with ThreadPoolExecutor(_threads) as pool:  # other threads go on while a file is read or an array copied
        return dict(zip(sources, pool.map(read, sources), strict=True))


TABLES = ("wte.weight", "lm_head.weight")  # stored as rows for tokens


def _is_matrix(name: str) -> bool:
    return name in TABLES or (name.endswith(".weight") and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc"))


def _packed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not _is_matrix(name):
        return shape
    K, N = shape[::-1] if name in TABLES else shape
    return -(-N // PANEL), K, PANEL


def _rows_of(source: Any) -> Iterable[Array]:
    """A weight as blocks of rows that stay in the caches, from a source that can read so, else as a whole."""
    if not hasattr(source, "blocks"):
        return [source.load()]
    row = 4 * math.prod(source.shape[1:])  # bytes
    blocks: Iterable[Array] = source.blocks(max(1, READ_BYTES // (row * PANEL)) * PANEL)
    return blocks


def _put(panels: Array, first: int, rows: Array, transposed: bool) -> None:
    """Put rows of a matrix into its panels, from row `first` on; transposed: columns, first a multiple of PANEL."""
    if transposed:
        panels = panels[first // PANEL :][: -(-len(rows) // PANEL)].swapaxes(1, 2)  # (panel, column, k)
        whole, rest = divmod(len(rows), PANEL)
        panels[:whole] = rows[: len(rows) - rest].reshape(whole, PANEL, rows.shape[1])
        panels[whole:, :rest] = rows[len(rows) - rest :]
        panels[whole:, rest:] = 0
    else:
        panels = panels[:, first : first + len(rows)].swapaxes(0, 1)  # (k, panel, column)
        whole, rest = divmod(rows.shape[1], PANEL)
        panels[:, :whole] = rows[:, : rows.shape[1] - rest].reshape(len(rows), whole, PANEL)
        if rest:
            panels[:, whole, :rest] = rows[:, rows.shape[1] - rest :]
            panels[:, whole, rest:] = 0


def pack_matrix(matrix: Array, transposed: bool = False) -> Panels:
    """Panels of a matrix (K, N), or of the transpose of an (N, K) one."""
    K, N = matrix.shape[::-1] if transposed else matrix.shape
    data = _aligned((-(-N // PANEL), K, PANEL), matrix.dtype)
    _put(data, 0, matrix, transposed)
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
    # compiled code never warns of an overflow; the same code under NUMBA_DISABLE_JIT=1 should not either
    with np.errstate(all="ignore") if config.DISABLE_JIT else nullcontext():
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
    parallel(turn, parts, pieces, smallest, scratch, *arguments) deals them out to `parts` threads, `smallest` or more
    at a time; turn is [0].

    Arrays are made and reshaped here, in Python: numba's own code for it would take longer to load than all kernels.
    """
    parts = min(threads, pieces, work // GRAIN)
    if parts <= 1:
        alone(0, pieces, scratch[0], *arguments)
    else:
        parallel(np.zeros(1, np.int64), parts, pieces, max(1, pieces * GRAIN // work), scratch, *arguments)


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
    """1 - erf(x) of a float32; at most 6 ulp from the true value, made for vectors like _exp32.

    For a = |x|, erfc(a) = exp(-a ** 2) t p(t) with t = 1 / (1 + a / 2), as in Press et al., Numerical Recipes,
    section 6.2; p is a polynomial fitted to it, within 4e-9. What a * a loses in rounding is made up for after exp.
    """
    a = abs(x)
    a = np.float32(11.0) if a > np.float32(11.0) else a  # erfc is 0 there; a NaN is kept
    square = a * a
    lost = fma(a, a, -square)
    t = np.float32(1.0) / fma(np.float32(0.5), a, np.float32(1.0))
    p = np.float32(0.0355738988)
    p = fma(p, t, np.float32(-0.189885916))
    p = fma(p, t, np.float32(0.37843234))
    p = fma(p, t, np.float32(-0.285112582))
    p = fma(p, t, np.float32(-0.0262342674))
    p = fma(p, t, np.float32(0.0381105448))
    p = fma(p, t, np.float32(0.0537313576))
    p = fma(p, t, np.float32(0.185915638))
    p = fma(p, t, np.float32(0.245122665))
    p = fma(p, t, np.float32(0.282258046))
    p = fma(p, t, np.float32(0.282088278))
    y = t * p * _exp32(-square)
    y = fma(-lost, y, y)
    return np.float32(2.0) - y if x < np.float32(0.0) else y


exp = _by_dtype(_exp32, math.exp if not config.DISABLE_JIT else np.exp)
erfc = _by_dtype(_erfc32, math.erfc)

ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu_erf": 2, "gelu_quick": 3, "relu": 4, "silu": 5, "tanh": 6}


@_jit()
def _activate(v, activation):
    """Apply an activation to a vector in place; the formulas are those of `reference.py`.

    0.5 (1 + tanh u) is written as 1 / (1 + exp(-2u)), and 1 + erf(z) as erfc(-z): the same numbers without the
    cancellation for negative x.
    """
    number = v.dtype.type
    one = number(1)
    if activation == 1:
        linear, cubic = number(-2 * 0.7978845608028654), number(-2 * 0.7978845608028654 * 0.044715)
        for i in range(v.size):
            x = v[i]
            v[i] = x / (one + exp(x * (linear + cubic * (x * x))))
    elif activation == 2:
        half, root = number(0.5), number(-0.7071067811865476)
        for i in range(v.size):
            v[i] = half * v[i] * erfc(root * v[i])
    elif activation == 3 or activation == 5:
        slope = number(-1.702) if activation == 3 else number(-1)
        for i in range(v.size):
            v[i] = v[i] / (one + exp(slope * v[i]))
    elif activation == 4:
        for i in range(v.size):
            v[i] = number(0) if v[i] < number(0) else v[i]
    elif activation == 6:
        for i in range(v.size):
            v[i] = number(math.tanh(np.float64(v[i])))


# ------------------------------------------------------------------------------------------------ linear maps


@_jit()
def _multiply(rows, a, a_start, a_stride, b, b_start, b_stride, depth, out, out_start, out_stride):
    """One panel: out[r] += a[r] @ b for r < rows, see `tile.make_tile`."""
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
def _linear_range(first, last, scratch, x, weight, bias, activation, add, block, out):
    """Pieces first..last-1; a piece is one panel of columns for one chunk of rows. block: see BLOCK."""
    (R, K), N = x.shape, out.shape[1]
    chunks = -(-R // CHUNK)
    for piece in range(first, last):
        column, row = piece // chunks * PANEL, piece % chunks * CHUNK
        rows, width = min(CHUNK, R - row), min(PANEL, N - column)
        totals = scratch[: rows * PANEL]

        # 1. the bias, then the product, block by block of the sum; what one block reads stays in the caches
        totals[:] = 0
        if bias.size > 0:
            for r in range(rows):
                _copy(bias[column : column + width], totals[r * PANEL : r * PANEL + width])
        for k in range(0, K, block):
            depth = min(block, K - k)
            _multiply(rows, x, row * K + k, K, weight, column * K + k * PANEL, PANEL, depth, totals, 0, PANEL)

        # 2. the activation, and the way out: stored, or added to the residual stream
        _activate(totals, activation)
        for r in range(rows):
            if add:
                _add(totals[r * PANEL : r * PANEL + width], out[row + r, column : column + width])
            else:
                _copy(totals[r * PANEL : r * PANEL + width], out[row + r, column : column + width])


@_jit(parallel=True)
def _linear(turn, parts, pieces, smallest, scratch, x, weight, bias, activation, add, block, out):
    for part in prange(parts):
        first, last = _share(turn, parts, pieces, smallest)
        while first < pieces:
            _linear_range(first, last, scratch[part], x, weight, bias, activation, add, block, out)
            first, last = _share(turn, parts, pieces, smallest)


# --------------------------------------------------------------------------------------------- embedding, norm


@_jit()
def _embed_range(first, last, scratch, ids, positions, wte, wpe, out):
    for r in range(first, last):
        panel, column = ids[r] // PANEL, ids[r] % PANEL
        for c in range(out.shape[1]):
            out[r, c] = wte[panel, c, column] + wpe[positions[r], c]


@_jit(parallel=True)
def _embed(turn, parts, pieces, smallest, scratch, ids, positions, wte, wpe, out):
    for part in prange(parts):
        first, last = _share(turn, parts, pieces, smallest)
        while first < pieces:
            _embed_range(first, last, scratch[part], ids, positions, wte, wpe, out)
            first, last = _share(turn, parts, pieces, smallest)


@_jit()
def _layer_norm_range(first, last, scratch, x, weight, bias, epsilon, out):
    C = x.shape[1]
    number = x.dtype.type
    lanes, squares = scratch[:LANES], scratch[LANES : LANES + C]
    for r in range(first, last):
        row, normed = x[r], out[r]
        # 1. take off the mean
        mean = _sum(row, lanes) / number(C)
        for c in range(C):
            normed[c] = row[c] - mean
            squares[c] = normed[c] * normed[c]
        # 2. divide by the root of what is left on average, the variance
        deviation = np.sqrt(_sum(squares, lanes) / number(C) + number(epsilon))
        for c in range(C):
            normed[c] = normed[c] / deviation * weight[c] + bias[c]


@_jit(parallel=True)
def _layer_norm(turn, parts, pieces, smallest, scratch, x, weight, bias, epsilon, out):
    for part in prange(parts):
        first, last = _share(turn, parts, pieces, smallest)
        while first < pieces:
            _layer_norm_range(first, last, scratch[part], x, weight, bias, epsilon, out)
            first, last = _share(turn, parts, pieces, smallest)


# --------------------------------------------------------------------------------------------------- attention


@_jit()
def _remember(qkv, cache, start, T):
    """Write the new keys and values into the cache: (B * T, 3HD) -> (2, B, H, start:start + T, D)."""
    _, B, H, _, D = cache.shape
    for b in range(B):
        for h in range(H):
            for t in range(T):
                row = qkv[b * T + t]
                _copy(row[(H + h) * D : (H + h + 1) * D], cache[0, b, h, start + t])
                _copy(row[(2 * H + h) * D : (2 * H + h + 1) * D], cache[1, b, h, start + t])


@_jit()
def _look(mask, start, keys, limits):
    """Which keys the queries may see: keys (B, S) lists those of each sequence that any query may see, limits
    (B, T) says how many of that list each query looks at. mask: (B, 1, T, S), or empty for the causal mask.

    A key whose mask is -inf for all queries (padding) is left out of every loop from here on, so that a padded
    sequence goes through the very operations of the sequence without padding.
    """
    (B, S), T = keys.shape, limits.shape[1]
    for b in range(B):
        count = 0
        for j in range(S):
            seen = mask.size == 0
            for t in range(T if mask.size > 0 else 0):
                seen = seen or mask[b, 0, t, j] != -np.inf
            if seen:
                keys[b, count] = j
                count += 1
        for t in range(T):
            if mask.size == 0:
                limits[b, t] = start + t + 1
            else:
                limits[b, t] = count
                while limits[b, t] > 0 and mask[b, 0, t, keys[b, limits[b, t] - 1]] == -np.inf:
                    limits[b, t] -= 1


@_jit()
def _softmax(scores, limit, scale, masked, mask, keys, lanes):
    """Turn the first `limit` scores of a query into exp(score - highest), the others into 0; return the sum."""
    number = scores.dtype.type
    if limit == 0:  # a query that may see no key gets zeros, as in reference.softmax
        scores[:] = 0
        return number(1)
    lowest = number(-np.inf)
    scale = number(scale)
    for j in range(scores.size):
        scores[j] *= scale
    if masked:
        for j in range(limit):
            scores[j] += mask[keys[j]]
    scores[limit:] = lowest
    highest = _highest(scores, lanes)
    for j in range(scores.size):
        scores[j] = exp(scores[j] - highest)
    return _sum(scores, lanes)


@_jit()
def _attend_range(first, last, scratch, qkv, cache, cached, scale, mask, keys, limits, heads, probs):
    """Pieces first..last-1; a piece is one chunk of queries of one head of one sequence.

    cached is the cache as one row of numbers.
    """
    H, room, D = cache.shape[2:]
    T = limits.shape[1]
    width = -(-D // PANEL) * PANEL  # D, filled up to whole panels
    chunks = -(-T // QUERIES)
    value_plane = cached.size // 2
    for piece in range(first, last):
        b, h, chunk = piece // chunks // H, piece // chunks % H, piece % chunks * QUERIES
        queries = min(QUERIES, T - chunk)
        limit = limits[b, chunk : chunk + queries]
        lowest, S = _span(limit)  # S keys that this chunk looks at
        panels = -(-S // PANEL)
        length = panels * PANEL
        # the thread's scratch: keys (panels, D, PANEL), values (S, width), then for ROWS queries at a time
        # scores (ROWS, length), heads (ROWS, width), sums of probabilities (ROWS,), and LANES running sums
        at_values = length * D
        at_scores = at_values + length * width
        at_heads = at_scores + ROWS * length
        at_sums = at_heads + ROWS * width
        sums, lanes = scratch[at_sums : at_sums + ROWS], scratch[at_sums + ROWS : at_sums + ROWS + LANES]

        # 1. keys transposed into panels of PANEL keys; values as they lie in the cache if their rows fill whole
        #    panels and no key is left out, else copied together
        plane = (b * H + h) * room * D
        together = S == 0 or keys[b, S - 1] == S - 1
        in_place = together and width == D
        values, value_start = (cached, value_plane + plane) if in_place else (scratch, at_values)
        if together:
            for p in range(panels):
                row = p * PANEL
                _transpose(cached, plane + row * D, D, min(PANEL, S - row), D, scratch, row * D, PANEL)
        else:
            for j in range(S):
                for d in range(D):
                    scratch[(j // PANEL * D + d) * PANEL + j % PANEL] = cache[0, b, h, keys[b, j], d]
        if not in_place:
            for j in range(S):
                row = scratch[at_values + j * width : at_values + (j + 1) * width]
                row[D:] = 0
                _copy(cache[1, b, h, keys[b, j]], row[:D])

        # A query's sum ends at its own last key: what lies behind must not matter. For a group of queries the sum
        # runs on to the last key of all, with probability 0, which only is the same if those values are finite.
        behind = values[value_start + lowest * width : value_start + S * width]
        finite = _sum(behind, lanes) * 0 == 0

        for t in range(0, queries, ROWS):
            rows = min(ROWS, queries - t)
            query = ((b * T + chunk + t) * 3 * H + h) * D
            shortest, longest = _span(limit[t : t + rows])
            wide = -(-longest // PANEL) * PANEL

            # 2. scores = q . k, for ROWS queries and PANEL keys at a time
            scratch[at_scores : at_scores + rows * length] = 0
            for j in range(0, wide, PANEL):
                for d in range(0, D, BLOCK):
                    _multiply(
                        rows, qkv, query + d, 3 * H * D, scratch, j * D + d * PANEL, PANEL, min(BLOCK, D - d),
                        scratch, at_scores + j, length,
                    )  # fmt: skip

            # 3. softmax, without the division by its sum, which is left to the end
            for r in range(rows):
                row = scratch[at_scores + r * length : at_scores + r * length + wide]
                mask_row = mask[b, 0, chunk + t + r] if mask.size > 0 else row
                sums[r] = _softmax(row, limit[t + r], scale, mask.size > 0, mask_row, keys[b], lanes)

            # 4. the values, weighted
            scratch[at_heads : at_heads + rows * width] = 0
            for j in range(0, longest, BLOCK):
                for d in range(0, width, PANEL):
                    value = value_start + j * width + d
                    if finite or j + BLOCK <= shortest:
                        _multiply(
                            rows, scratch, at_scores + j, length, values, value, width, min(BLOCK, longest - j),
                            scratch, at_heads + d, width,
                        )  # fmt: skip
                    else:
                        for r in range(rows):
                            if j < limit[t + r]:
                                _multiply(
                                    1, scratch, at_scores + r * length + j, length, values, value, width,
                                    min(BLOCK, limit[t + r] - j), scratch, at_heads + r * width + d, width,
                                )  # fmt: skip
            for r in range(rows):
                out = heads[b * T + chunk + t + r, h * D : (h + 1) * D]
                row = scratch[at_heads + r * width : at_heads + r * width + D]
                for d in range(D):
                    out[d] = row[d] / sums[r]
                if probs.size > 0:
                    for j in range(limit[t + r]):
                        probs[b, h, chunk + t + r, keys[b, j]] = scratch[at_scores + r * length + j] / sums[r]


@_jit(parallel=True)
def _attend(turn, parts, pieces, smallest, scratch, qkv, cache, cached, scale, mask, keys, limits, heads, probs):
    for part in prange(parts):
        first, last = _share(turn, parts, pieces, smallest)
        while first < pieces:
            _attend_range(first, last, scratch[part], qkv, cache, cached, scale, mask, keys, limits, heads, probs)
            first, last = _share(turn, parts, pieces, smallest)


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


def _scratch(threads: int, dtype: Any, C: int = 0, S: int = 0, D: int = 0) -> Array:
    """Room for each thread: for linear maps, layer norms of C numbers, and attention over S keys of size D."""
    length, width = -(-S // PANEL) * PANEL, -(-D // PANEL) * PANEL
    size = max(CHUNK * PANEL, LANES + C, length * (D + width + ROWS) + ROWS * (width + 1) + LANES)
    return _aligned((threads, -(-size // 16) * 16), dtype)


def _rows(x: Array) -> Array:
    """(..., C) -> (R, C), contiguous and writable as the compiled kernels expect it (none of them writes to it)."""
    return np.require(x.reshape(-1, x.shape[-1]), requirements=["C", "A", "W"])


def _linear_into(
    out: Array, x: Array, weight: Any, bias: Array, threads: int, scratch: Array, activation: int = 0,
    add: bool = False, block: int = BLOCK,
) -> None:  # fmt: skip
    """out = activation(x @ weight + bias), or out += that: (R, K) @ (K, N) -> (R, N)."""
    pieces = len(weight.data) * -(-len(x) // CHUNK)
    work = (READ + len(x)) * weight.data.size
    _deal(pieces, work, threads, _linear_range, _linear, scratch, x, weight.data, bias, activation, add, block, out)


def _layer_norm_into(
    out: Array, x: Array, weight: Array, bias: Array, epsilon: float, threads: int, scratch: Array
) -> None:
    """out = layer_norm(x): (R, C) -> (R, C)."""
    _deal(len(x), 4 * x.size, threads, _layer_norm_range, _layer_norm, scratch, x, weight, bias, epsilon, out)


def _attend_into(
    heads: Array, probs: Array, qkv: Array, cache: Array, start: int, scale: float, sight: Sight,
    threads: int, scratch: Array,
) -> None:  # fmt: skip
    """heads = softmax(q . k * scale, causal or + mask) @ v over the cache: (R, 3HD) -> (R, HD)."""
    _, B, H, _, D = cache.shape
    T = len(qkv) // B
    _remember(qkv, cache, start, T)
    pieces, work = B * H * -(-T // QUERIES), 2 * (READ + T) * B * (start + T) * H * D
    _deal(
        pieces,
        work,
        threads,
        _attend_range,
        _attend,
        scratch,
        qkv,
        cache,
        cache.reshape(-1),
        scale,
        *sight,
        heads,
        probs,
    )


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
        _layer_norm_into(_rows(out), _rows(x), weight, bias, epsilon, threads, _scratch(threads, x.dtype, x.shape[-1]))
    return out


def linear(x: Array, weight: Any, bias: Array) -> Array:
    """x @ weight + bias: (..., inputs) -> (..., outputs)."""
    out = _aligned((*x.shape[:-1], weight.columns), x.dtype)
    with _pool() as threads:
        _linear_into(_rows(out), _rows(x), weight, bias, threads, _scratch(threads, x.dtype))
    return out


def chained_product(x: Array, matrix: Array, bias: Array, block: int) -> Array:
    """x @ matrix + bias with sums cut into blocks of so many terms: (R, K) @ (K, N) -> (R, N); bias (N,) or empty.

    For those who compute what other programs compute, to the bit; `linear` itself has blocks of BLOCK.
    """
    out = _aligned((len(x), matrix.shape[1]), x.dtype)
    with _pool() as threads:
        _linear_into(
            out, _rows(x), pack_matrix(matrix), bias, threads, _scratch(threads, x.dtype), block=block
        )  # fmt: skip
    return out


def _sight(mask: Array | None, B: int, T: int, start: int, dtype: Any) -> Sight:
    """What the queries may see, for `_attend_into`."""
    if mask is None:
        mask = np.empty((0, 0, 0, 0), dtype)
    mask = np.require(mask, dtype, ["C", "A", "W"])
    keys, limits = np.empty((B, start + T), np.int64), np.empty((B, T), np.int64)
    _look(mask, start, keys, limits)
    return mask, keys, limits


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
        scratch = _scratch(threads, x.dtype, S=start + T, D=D)
        sight = _sight(mask, B, T, start, x.dtype)
        _attend_into(_rows(heads), probs, _rows(qkv), cache, start, w.scale, sight, threads, scratch)
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
        _activate(out.reshape(-1), ACTIVATIONS[activation])
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


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return activate(x, "silu")


def tanh(x: Array) -> Array:
    """The hyperbolic tangent."""
    return activate(x, "tanh")


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
    R, HD, F, dtype = B * T, H * D, w.h[0].mlp.c_fc.bias.size, x.dtype
    normed, shared = _aligned((R, C), dtype), _aligned((R * max(4 * HD, F),), dtype)
    qkv, heads = shared[: R * 3 * HD].reshape(R, 3 * HD), shared[R * 3 * HD : R * 4 * HD].reshape(R, HD)
    hidden = shared[: R * F].reshape(R, F)  # made when qkv and heads are done with
    rows, no_probs = _rows(x), np.empty((0, 0, 0, 0), dtype)
    with _pool() as threads:
        sight = _sight(mask, B, T, start, dtype)
        scratch = _scratch(threads, dtype, C, start + T, D)
        for b, cache in zip(w.h, caches, strict=True):
            _layer_norm_into(normed, rows, *b.ln_1, threads, scratch)
            _linear_into(qkv, normed, *b.attn.c_attn, threads, scratch)
            _attend_into(heads, no_probs, qkv, cache, start, b.attn.scale, sight, threads, scratch)
            _linear_into(rows, heads, *b.attn.c_proj, threads, scratch, add=True)
            _layer_norm_into(normed, rows, *b.ln_2, threads, scratch)
            _linear_into(hidden, normed, *b.mlp.c_fc, threads, scratch, ACTIVATIONS[b.mlp.activation])
            _linear_into(rows, hidden, *b.mlp.c_proj, threads, scratch, add=True)


def logits(hidden: Array, lm_head: Any, lm_head_bias: Array, tap: Tap = no_tap) -> Array:
    """A score for every token of the vocabulary: (B, T, C) @ (C, V) -> (B, T, V)."""
    scores = linear(hidden, lm_head, lm_head_bias)
    tap("logits", scores)
    return scores


def warmup(dtype: Any = np.float32) -> None:
    """Compile every kernel for one dtype, or load it from disk, by running a model of zeros.

    It is just large enough that each kernel deals work out to threads for many tokens, and does not for one.
    """
    if config.DISABLE_JIT:
        return
    C, V, H = 64, 4096, 2
    T = 2 * GRAIN // C  # tokens of which the embedding, the lightest kernel, is worth two threads

    def zeros(*shape: int) -> Array:
        return np.zeros(shape, dtype)

    def zero_map(K: int, N: int) -> Linear:
        weight: Any = pack_matrix(zeros(K, N))
        return Linear(weight, zeros(N))

    norm = LayerNorm(zeros(C), zeros(C), 1e-5)
    attend = Attention(zero_map(C, 3 * C), zero_map(C, C), H, 1.0)
    block_weights = BlockWeights(norm, attend, norm, MLP(zero_map(C, C), zero_map(C, C), "gelu_tanh"))
    wte: Any = pack_matrix(zeros(V, C), transposed=True)
    w = GPT2Weights(wte, zeros(1, C), (block_weights,), norm, wte, zeros(0))
    for tokens in (1, T):
        ids = np.zeros((1, tokens), np.int64)
        for tap in (no_tap, lambda name, value: None):
            hidden = transformer(ids, ids, w, [zeros(2, 1, H, tokens, C // H)], 0, None, tap if tokens == 1 else no_tap)
            logits(hidden[:, -1:], w.lm_head, w.lm_head_bias)
