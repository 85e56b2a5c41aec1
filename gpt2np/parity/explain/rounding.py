"""Numbers in narrower types: how they round, and which type an array's numbers fit into."""

from __future__ import annotations

import numpy as np

from ...weights import Array

# Bits of the significand, the hidden one included. tf32 is float32 with 10 of its 23 stored bits.
BITS = {"fp16": 11, "bf16": 8, "tf32": 11, "fp8_e4m3": 4, "fp8_e5m2": 3}
SIXTEEN_BITS = ("bf16", "fp16")


def rounded(x: Array, kind: str) -> Array:
    """x as a narrower float can hold it, in float64."""
    import ml_dtypes

    x = x.astype(np.float32)
    if kind == "tf32":
        return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    narrow = {
        "bf16": ml_dtypes.bfloat16, "fp16": np.float16,
        "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2,
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


def quantised(x: Array, by_column: bool) -> Array:
    """A matrix as 8-bit integers with one scale, or one for each column, hold it."""
    scale = np.abs(x).max(axis=0 if by_column else None, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale
