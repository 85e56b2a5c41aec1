"""Numbers in narrower types: how they round, and which type an array's numbers fit into."""

from __future__ import annotations

import numpy as np

from ...weights import Array

# Bits of the significand, the hidden one included. tf32 is float32 with 10 of its 23 stored bits.
BITS = {"float16": 11, "bfloat16": 8, "tf32": 11, "float8_e4m3fn": 4, "float8_e5m2": 3}
SIXTEEN_BITS = ("bfloat16", "float16")


def rounded(x: Array, kind: str) -> Array:
    """x as a narrower float can hold it, in float64."""
    import ml_dtypes

    x = x.astype(np.float32)
    if kind == "tf32":
        return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    narrow = {
        "bfloat16": ml_dtypes.bfloat16, "float16": np.float16,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
    }[kind]  # fmt: skip
    with np.errstate(all="ignore"):
        return x.astype(narrow).astype(np.float64)


def kind_of(x: Array) -> str:
    """The narrowest 16-bit type that holds every number of an array exactly, or "" where none does."""
    x = np.asarray(x, np.float64)
    x = x[np.isfinite(x)]
    if x.size < 32 or len(np.unique(x[:4096])) < 16:  # too few to tell: zeros and ones fit into any type
        return ""
    return next((kind for kind in SIXTEEN_BITS if (rounded(x, kind) == x).all()), "")


def bits_of(x: Array) -> int:
    """Bits of the significand that an array's numbers need: 24, or those of a 16-bit type that holds them all."""
    return BITS[kind_of(x)] if kind_of(x) else 24


# How activations are held in 8 bits: one scale, one for each row, or 256 levels from the lowest to the highest number.
EIGHT_BITS = ("one scale", "a scale for each row", "256 levels from lowest to highest")


def in_8_bits(x: Array, how: str) -> Array:
    """Activations as 8-bit integers hold them, in one of the ways of `EIGHT_BITS`."""
    if how == EIGHT_BITS[2]:
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = (high - low) / 255 or 1.0
        zero = np.rint(-low / scale)
        return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    return quantised(np.moveaxis(x, -1, 0), how == EIGHT_BITS[1]).transpose(*range(1, x.ndim), 0)


def quantised(x: Array, by_column: bool) -> Array:
    """A matrix as 8-bit integers with one scale, or one for each column, hold it; in float32, as programs have it."""
    x = x.astype(np.float32)
    scale = np.abs(x).max(axis=0 if by_column else None, keepdims=True) / 127
    return (np.rint(x / np.where(scale > 0, scale, 1)) * scale).astype(np.float64)
