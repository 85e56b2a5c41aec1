"""The one array type of the package, and arrays that begin where the kernels read fastest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# `Any` float dtype: float32 in the engines, float64 in the oracle.
Array = np.ndarray

ALIGNMENT = 64  # bytes in a cache line, and in the widest vector registers


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """np.empty whose first element lies on a 64-byte boundary, so that no vector straddles two cache lines."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw: Array = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    aligned: Array = raw[start : start + size].view(dtype).reshape(shape)
    return aligned
