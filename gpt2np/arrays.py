"""The one array type of the package, arrays that begin where the kernels read fastest, and float32 in 16 bits.

Weights that were trained or stored in 16 bits are float32 numbers whose lower bits say nothing. Where that is so of a
whole matrix, it can be kept in 16 bits and widened when it is used: the same numbers from half the memory. bfloat16 is
the upper half of a float32; float16 has a shorter exponent and three more bits of fraction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

# `Any` float dtype: float32 in the engines, float64 in the oracle.
Array = np.ndarray

# Bits of 16-bit floats, in arrays whose dtype tells which they are: neither NumPy nor numba knows both as floats.
NARROW = {"bfloat16": np.dtype(np.uint16), "float16": np.dtype(np.int16)}

ALIGNMENT = 64  # bytes in a cache line, and in the widest vector registers


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """np.empty whose first element lies on a 64-byte boundary, so that no vector straddles two cache lines."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw: Array = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    aligned: Array = raw[start : start + size].view(dtype).reshape(shape)
    return aligned


def keep_freed_memory() -> None:
    """Have the memory of freed arrays of up to 32 MB kept for the next ones, not cleared anew for each by the system.

    The C library of Linux takes the largest piece that was freed as the measure (M_MMAP_THRESHOLD in mallopt(3)).
    """
    np.empty((1 << 25) - (1 << 16), np.uint8)


def narrow_form(blocks: Iterable[Array], forms: Iterable[str] = NARROW) -> str | None:
    """The first of some 16-bit forms that holds every number of these float arrays to the bit, or None."""
    left = list(forms)
    for block in blocks:
        left = [form for form in left if _holds(block, form)]
        if not left or (left == ["float16"] and block.dtype == np.float16):  # all blocks have one dtype
            break
    return left[0] if left else None


def _holds(block: Array, form: str) -> bool:
    if block.dtype.itemsize > 4:
        return False
    if block.dtype == np.float16 and form == "float16":
        return True
    bits = np.ascontiguousarray(block, np.float32).reshape(-1).view(np.uint32)
    for some in (bits[:4096], bits):  # of ordinary float32 numbers the first ones tell
        if form == "bfloat16":
            same = not np.bitwise_or.reduce(some & 0xFFFF, initial=0)
        else:
            same = bool((widened(narrowed(some.view(np.float32), form)).view(np.uint32) == some).all())
        if not same:
            return False
    return True


def narrowed(numbers: Array, form: str) -> Array:
    """Numbers in a form that holds them, as the bits that NARROW says."""
    numbers = np.asarray(numbers)
    with np.errstate(over="ignore"):
        if form == "float16":
            return np.asarray(numbers.astype(np.float16)).view(np.int16)
    return (np.ascontiguousarray(numbers, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits: Array) -> Array:
    """The float32 numbers that `narrowed` was given; an array of floats is returned as it is."""
    if bits.dtype == NARROW["bfloat16"]:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if bits.dtype == NARROW["float16"] else bits
