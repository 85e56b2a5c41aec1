"""Matrices as the kernels read them: cut into panels of PANEL columns, all rows of one panel before the next.

A matrix of float32 numbers that 16 bits can hold is kept in 16 bits; the results are the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ..arrays import ALIGNMENT, NARROW, Array, empty_aligned, narrow_form, narrowed, widened
from ..weights import TABLES, WeightSources, is_matrix
from .threads import get_num_threads
from .tile import FORMS, PANEL

READ_BYTES = 1 << 19  # of a file's weights at once, so that they are packed while they are in the caches


class Panels(NamedTuple):
    """A matrix (K, N) cut into panels of PANEL columns; the last panel is filled up with zeros."""

    data: Array  # (ceil(N / PANEL), K, PANEL), data[p, k, c] = matrix[k, p * PANEL + c]; floats, or NARROW bits of them
    columns: int  # N

    @property
    def form(self) -> str:
        """What the numbers are kept as: "float32", "float64", "float16" or "bfloat16"."""
        return next((form for form, dtype in NARROW.items() if dtype == self.data.dtype), self.data.dtype.name)


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


def _pack(sources: WeightSources, forms: dict[str, str | None], dtype: Any, pool: ThreadPoolExecutor) -> dict[str, Any]:
    places, sizes = {}, []
    for name, source in sources.items():
        shape, form = _packed_shape(name, source.shape), forms[name]
        places[name] = shape, np.dtype(dtype) if form is None else NARROW[form]
        sizes.append(-(-math.prod(shape) * places[name][1].itemsize // ALIGNMENT) * ALIGNMENT)
    # One array for all of them: the system backs a large one with large pages, which are soon there and soon found
    parts = np.split(empty_aligned((sum(sizes),), np.uint8), np.cumsum(sizes)[:-1])
    arrays = {
        name: part[: math.prod(shape) * kind.itemsize].view(kind).reshape(shape)
        for (name, (shape, kind)), part in zip(places.items(), parts, strict=True)
    }

    def read(name: str) -> Any:
        source, place, form = sources[name], arrays[name], forms[name]
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


def _form(name: str, source: Any, dtype: Any) -> str | None:
    """In which 16 bits a weight can be kept, if in any."""
    return narrow_form(_rows_of(source), FORMS) if is_matrix(name) and np.dtype(dtype) == np.float32 else None


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
    count, K, _ = panels.data.shape
    matrix = panels.data.transpose(1, 0, 2).reshape(K, count * PANEL)[:, : panels.columns]
    return np.ascontiguousarray(widened(matrix))
