"""Weights in fewer bits: whole numbers (levels) times scales, and how float weights are rounded to them.

A level counts steps of its scale: the weight is float32(level * scale), rounded once. The forms:

    int8   levels -128..127, one scale a column
    int4   levels -8..7, one scale for GROUP numbers of a column, one below the other
    either with offsets: float32((level + offset) * scale), one scale and one whole offset for GROUP numbers of a column

A column is all that is multiplied by the inputs to give one output; a token's row of wte or of the head counts as one.
Rounding to nearest, ties to even, with these scales:

    int8   the column's largest magnitude is 127 steps
    int4   the group's number of largest magnitude is -8 steps, so that the scale has its sign turned; what would be
           8 steps on the other side becomes 7. That is the rule of llama.cpp's Q4_0 and of ONNX Runtime's quantiser.

Numbers so small that a scale would be below TINY become 0. Layer norms, biases and wpe are not rounded.

Files that are quantised already have levels and scales of their own; `as_stored` finds those in one of the forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .arguments import one_of
from .arrays import NARROW, Array, narrowed, widened
from .errors import WeightError
from .weights import TABLES, WeightSource, WeightSources, is_matrix

GROUP = 32
LARGEST = {"int8": 127, "int4": -8}  # the level of the number of largest magnitude
LEVELS = {"int8": (-128, 127), "int4": (-8, 7)}
TINY = 2.0**-90  # of scales: far enough from where float32 numbers lose bits for any order of exact operations
FORMS = ("float32", *NARROW, *LEVELS)
ROWS_AT_ONCE = 1024  # of a table
NUMBERS_AT_ONCE = 1 << 17  # that stay in the caches while they are looked at
MOST = 255  # levels of 8 bits with any zero point of 8 bits


class Quantised(NamedTuple):
    """A matrix (K, N) of whole numbers with scales."""

    form: str  # "int8" or "int4"
    levels: Array  # (K, N) int8
    scales: Array  # float32, (1, N) for int8 without offsets, else (ceil(K / GROUP), N)
    offsets: Array | None = None  # float32, of the same shape

    def floats(self) -> Array:
        """The weights (K, N), float32."""
        K, numbers = len(self.levels), self.levels.astype(np.float32)
        return (numbers if self.offsets is None else numbers + spread(self.offsets, K)) * spread(self.scales, K)


def spread(scales: Array, K: int) -> Array:
    """The scales, or offsets, of K rows, (K, N) or (1, N), which broadcasts to it."""
    return scales if len(scales) == 1 else np.repeat(scales, GROUP, axis=0)[:K]


def quantise(matrix: Array, form: str) -> Quantised:
    """Round a matrix (K, N) of finite numbers to "int8" or "int4"."""
    matrix = np.asarray(matrix, np.float32)
    starts = range(0, len(matrix), GROUP if form == "int4" else len(matrix))
    high, low = np.maximum.reduceat(matrix, starts, axis=0), np.minimum.reduceat(matrix, starts, axis=0)
    scales = np.where(high > -low, high, low) / np.float32(LARGEST[form])
    scales = np.abs(scales) if form == "int8" else scales
    scales[np.abs(scales) < TINY] = 0
    return Quantised(form, np.clip(_nearest(matrix, scales), *LEVELS[form]).astype(np.int8), scales)


def as_stored(name: str, source: WeightSource) -> Quantised | None:
    """A matrix in the scales that a file holds it with, (K, N), tables transposed, in as few bits as hold the levels.

    None unless the source knows its scales (`steps`), these and the levels have one of the forms, and what they stand
    for is every number to the bit.
    """
    steps: Array | None = source.steps() if hasattr(source, "steps") else None
    if steps is None:
        return None
    matrix = source.load()
    matrix, steps = (matrix.T, steps.T) if name in TABLES else (matrix, steps)
    scales, K = np.ascontiguousarray(steps[::GROUP]), len(matrix)
    size = np.abs(scales)
    if matrix.dtype != np.float32 or not ((size >= TINY) & (size < np.inf) | (size == 0)).all():
        return None
    levels, starts = np.empty(matrix.shape, np.int16), np.arange(0, K, GROUP)
    least, most = np.empty(scales.shape, np.int16), np.empty(scales.shape, np.int16)
    width = max(1, NUMBERS_AT_ONCE // K)
    for start in range(0, matrix.shape[1], width):
        part = np.s_[:, start : start + width]
        numbers, spaced = matrix[part], spread(scales[part], K)
        found = _nearest(numbers, scales[part])
        same = (found * spaced).view(np.uint32) == numbers.view(np.uint32)
        if not (same.all() and (steps[part] == spaced).all() and np.abs(found).max() <= MOST):
            return None
        levels[part] = found
        least[part] = np.minimum.reduceat(found, starts, axis=0)
        most[part] = np.maximum.reduceat(found, starts, axis=0)
    by_column = bool((scales == scales[:1]).all())
    for form, (low, high) in reversed(LEVELS.items()):
        if low <= least.min() and most.max() <= high and (form == "int4" or by_column):
            return Quantised(form, levels.astype(np.int8), scales if form == "int4" else scales[:1])
        if (most - least).max() <= high - low:
            offsets = np.where((least < low) | (most > high), least - low, 0)
            levels -= spread(offsets, K)
            return Quantised(form, levels.astype(np.int8), scales, offsets.astype(np.float32))
    return None


def _nearest(matrix: Array, scales: Array) -> Array:
    """The whole numbers, float32, that are nearest to matrix / scales; of scales that are 0, to the matrix."""
    return np.rint(matrix / spread(np.where(scales == 0, np.float32(1), scales), len(matrix))) + np.float32(0)


@dataclass(frozen=True)
class Rounded:
    """A matrix of another source, rounded to one of FORMS; as it is if a file holds it in that form already.

    Satisfies `weights.WeightSource`.
    """

    name: str
    source: WeightSource
    form: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def load(self) -> Array:
        """The rounded numbers, in the shape of the source.

        Raises
        ------
        WeightError
            If a number is infinite or NaN, or becomes so.
        """
        if (whole := self.quantised()) is not None:
            floats = whole.floats()
            return np.ascontiguousarray(floats.T if self.name in TABLES else floats)
        matrix = self.source.load()
        with np.errstate(over="ignore"):
            matrix = np.asarray(matrix, np.float32)
        if self.form != "float32":
            matrix = widened(narrowed(_to_bfloat16(matrix) if self.form == "bfloat16" else matrix, self.form))
            self._check(matrix)
        return matrix

    def quantised(self) -> Quantised | None:
        """The matrix as it is multiplied by, (K, N), tables transposed; None if the form is one of floats.

        Raises
        ------
        WeightError
            If a number is infinite or NaN.
        """
        if self.form not in LEVELS:
            return None
        stored = as_stored(self.name, self.source)
        if stored is not None and stored.form == self.form:
            return stored
        if self.name not in TABLES:
            return self._quantised(self.source.load())
        parts = [self._quantised(rows.T) for rows in _blocks(self.source)]
        return Quantised(
            self.form,
            *(np.concatenate([getattr(part, what) for part in parts], axis=1) for what in ("levels", "scales")),
        )

    def _quantised(self, matrix: Array) -> Quantised:
        self._check(matrix)
        return quantise(matrix, self.form)

    def _check(self, matrix: Array) -> None:
        if not np.isfinite(matrix).all():
            raise WeightError(f"weight {self.name} {self.shape} cannot be rounded to {self.form}: not finite there")


def _blocks(source: WeightSource) -> Iterable[Array]:
    return source.blocks(ROWS_AT_ONCE) if hasattr(source, "blocks") else [source.load()]


def _to_bfloat16(matrix: Array) -> Array:
    """Rounded to nearest, ties to even, as float32."""
    bits = np.ascontiguousarray(matrix).view(np.uint32)
    return (bits + (0x7FFF + (bits >> 16 & 1))).view(np.float32)


def rounded(sources: WeightSources, form: str) -> Mapping[str, WeightSource]:
    """The sources with their matrices rounded to one of FORMS.

    Raises
    ------
    InputError
        If there is no such form.
    """
    one_of("weights", form, FORMS)
    return {name: Rounded(name, source, form) if is_matrix(name) else source for name, source in sources.items()}
