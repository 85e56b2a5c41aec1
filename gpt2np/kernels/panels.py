"""Matrices as the kernels read them: cut into panels of PANEL columns, all rows of one panel before the next.

A matrix of float32 numbers that 16 bits can hold is kept in 16 bits, one of whole numbers with scales
(`quantised.py`) in 8 or 4; the results are those of the float32 numbers, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..arrays import ALIGNMENT, NARROW, Array, empty_aligned, narrow_form, narrowed, widened
from ..quantised import Quantised, Rounded, as_stored
from ..weights import TABLES, WeightSources, is_matrix
from .layout import FORMS, LEVELS, PANEL, STEP, TOP, per_element
from .threads import get_num_threads

READ_BYTES = 1 << 19  # of a file's weights at once, so that they are packed while they are in the caches
NO_SCALES = np.empty((0, 0, PANEL), np.float32)
Kept = str | Quantised | None  # how a weight can be kept: in a form of 16 bits, as levels, or as it is


class Panels(NamedTuple):
    """A matrix (K, N) cut into panels of PANEL columns; the last panel is filled up with zeros."""

    data: Array  # (ceil(N / PANEL), K, PANEL), data[p, k, c] = matrix[k, p * PANEL + c]; floats, or NARROW bits of
    # them, or what `levels` says
    columns: int  # N
    scales: Array = NO_SCALES  # of levels
    depth: int | None = None  # K of levels, whose data is filled up to whole steps

    @property
    def form(self) -> str:
        """What the numbers are kept as: "float32", "float64", "float16", "bfloat16", "int8" or "int4"."""
        forms = NARROW | LEVELS
        return next((form for form, dtype in forms.items() if dtype == self.data.dtype), self.data.dtype.name)


def pack(sources: WeightSources, dtype: Any) -> dict[str, Any]:
    """Read every weight and put it into the layout that the kernels want.

    Linear maps become Panels of themselves, (inputs, outputs); wte and lm_head become Panels of their transpose,
    (C, V): logits multiplies by it, embed gathers its columns. Biases, layer norms and wpe stay arrays.

    Parameters
    ----------
    sources : mapping of name to WeightSource
        Named as in `weights.weight_shapes`.
    dtype : float32 or float64
        What results are computed in.
    """
    # Other threads go on while a file is read or an array copied.
    with ThreadPoolExecutor(get_num_threads()) as pool:
        forms = dict(zip(sources, pool.map(lambda name: _form(name, sources[name], dtype), sources), strict=True))
        return _pack(sources, forms, dtype, pool)


def _pack(sources: WeightSources, forms: dict[str, Kept], dtype: Any, pool: ThreadPoolExecutor) -> dict[str, Any]:
    places: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name, source in sources.items():
        form = forms[name]
        if isinstance(form, Quantised):
            places[name], places[f"{name} scales"] = _places_of_levels(form)
        else:
            places[name] = _packed_shape(name, source.shape), np.dtype(dtype) if form is None else NARROW[form]
    sizes = [-(-math.prod(shape) * kind.itemsize // ALIGNMENT) * ALIGNMENT for shape, kind in places.values()]
    # One array for all of them: the system backs a large one with large pages, which are soon there and soon found
    parts = np.split(empty_aligned((sum(sizes),), np.uint8), np.cumsum(sizes)[:-1])
    arrays = {
        name: part[: math.prod(shape) * kind.itemsize].view(kind).reshape(shape)
        for (name, (shape, kind)), part in zip(places.items(), parts, strict=True)
    }

    def read(name: str) -> Any:
        source, place, form = sources[name], arrays[name], forms[name]
        if isinstance(form, Quantised):
            return _put_levels(place, arrays[f"{name} scales"], form)
        at, transposed = 0, name in TABLES
        for rows in _rows_of(source):
            rows = rows if form is None else narrowed(rows, form)
            if is_matrix(name):
                _put(place, at, rows, transposed)
            else:
                place[at : at + len(rows)] = rows
            at += len(rows)
        return Panels(place, source.shape[0 if transposed else 1]) if is_matrix(name) else place

    return dict(zip(sources, pool.map(read, sources), strict=True))


def _form(name: str, source: Any, dtype: Any) -> Kept:
    """In how few bits a weight is kept without a change of any number, or in those that it is asked to be kept in."""
    if not is_matrix(name) or np.dtype(dtype) != np.float32:
        return None
    if isinstance(source, Rounded):
        return source.quantised() or (source.form if source.form in FORMS else None)
    return as_stored(name, source) or narrow_form(_rows_of(source), FORMS)


def _packed_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not is_matrix(name):
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


def _places_of_levels(matrix: Quantised) -> tuple[tuple[tuple[int, ...], np.dtype], tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the data and the scales of its Panels."""
    (K, N), kind = matrix.levels.shape, LEVELS[matrix.form]
    panels, steps, pair = -(-N // PANEL), -(-K // STEP), () if matrix.offsets is None else (2,)
    rows = steps * STEP // per_element(kind)
    return ((panels, rows, PANEL), kind), ((panels, len(matrix.scales), *pair, PANEL), np.dtype(np.float32))


def _put_levels(data: Array, scales: Array, matrix: Quantised) -> Panels:
    """Fill data and scales with a matrix."""
    K, N = matrix.levels.shape
    if matrix.form == "int8":
        _put(data, 0, matrix.levels, False)
        data[:, K:] = 0
    else:
        words = np.zeros((len(data[0]), N), np.uint32)
        for j in range(STEP):
            part = matrix.levels[j::STEP].view(np.uint8).astype(np.uint32) & 15
            words[: len(part)] |= part << 4 * j
        _put(data, 0, words, False)
    top = np.float32(1 if matrix.form == "int8" else 2.0**TOP)
    if matrix.offsets is None:
        _put(scales, 0, matrix.scales / top, False)
    else:
        _put(scales[:, :, 0], 0, matrix.scales / top, False)
        _put(scales[:, :, 1], 0, matrix.offsets * top, False)
    return Panels(data, N, scales, K)


def pack_levels(matrix: Quantised) -> Panels:
    """Panels of a matrix of whole numbers."""
    (shape, kind), (scales, dtype) = _places_of_levels(matrix)
    return _put_levels(empty_aligned(shape, kind), empty_aligned(scales, dtype), matrix)


def pack_matrix(matrix: Array, transposed: bool = False, form: str | None = None) -> Panels:
    """Panels of a matrix (K, N), or of the transpose of an (N, K) one; form: one of FORMS that holds it, if any."""
    if form is not None:
        matrix = narrowed(matrix, form)
    K, N = matrix.shape[::-1] if transposed else matrix.shape
    data = empty_aligned((-(-N // PANEL), K, PANEL), matrix.dtype)
    _put(data, 0, matrix, transposed)
    return Panels(data, N)


def unpack(panels: Panels) -> Array:
    """The matrix (K, N) that was packed, as floats."""
    data = panels.data
    if panels.form in LEVELS:
        from . import levels

        steps = len(data[0]) * per_element(data.dtype) // STEP
        data = np.empty((len(data), steps * STEP, PANEL), np.float32)
        for panel, place in enumerate(data):
            scales = panels.scales[panel : panel + 1]
            levels.widen_in_python(panels.data[panel], 0, scales, 0, 0, steps, place.reshape(-1))
    count, K, _ = data.shape
    matrix = data.transpose(1, 0, 2).reshape(K, count * PANEL)[: panels.depth, : panels.columns]
    return np.ascontiguousarray(widened(matrix))
