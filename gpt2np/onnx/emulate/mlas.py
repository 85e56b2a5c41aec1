"""Float operators as ONNX Runtime computes them on x86 CPUs, to the last bit.

A file that rounds results to float16 or 8 bits turns a last bit of float32 into a whole step of the coarse type now
and then, and a step into a thousandth of the output. So a literal run takes ONNX Runtime's own formulas and orders of
summation: those of MLAS (https://github.com/microsoft/onnxruntime/tree/main/onnxruntime/core/mlas/lib: tanh.cpp,
compute.cpp, sgemm.cpp) and of Eigen's vectorised sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
F32 = np.float32

TANH_ODD = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
TANH_EVEN = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
EXP = (0.0013780594, 0.0083731245, 0.041669536, 0.16666472, 0.49999985, 1.0, 1.0)


def _fma(a: Any, b: Any, c: Any) -> Array:
    """a * b + c, rounded once: float64 holds the product exactly."""
    return np.asarray(np.asarray(a, np.float64) * b + c, F32)


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    """Horner's rule, the highest power first."""
    total: Any = F32(coefficients[0])
    for c in coefficients[1:]:
        total = _fma(total, x, F32(c))
    return np.asarray(total)


def tanh(x: Array) -> Array:
    """A quotient of polynomials."""
    x = np.clip(x, F32(-9), F32(9))
    square = x * x
    return np.asarray(_polynomial(square, TANH_ODD) * x / _polynomial(square, TANH_EVEN))


def exp(x: Array) -> Array:
    """exp of what is at most 0: 2**n * exp(r), with |r| at most ln(2) / 2."""
    x = np.maximum(x, F32(-104))  # exp of that is 0
    n = _fma(x, F32(1.44269504088896341), F32(12582912)) - F32(12582912)  # the nearest whole number
    r = _fma(n, F32(-1.42860677e-6), _fma(n, F32(-6.93145752e-1), x))
    return np.asarray(np.ldexp(_polynomial(r, EXP), n.astype(np.int32)), F32)


def _lanes(x: Array, count: int) -> Array:
    """Sums of every `count`-th element of the last axis, each in order: what the lanes of a register add up."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % count)])
    return np.asarray(np.add.reduce(padded.reshape(*x.shape[:-1], -1, count), axis=-2))


def softmax(x: Array, lanes: int) -> Array:
    """Over the last axis; `lanes` float32 are added at once."""
    exps = exp(x - x.max(-1, keepdims=True))
    sums = _lanes(exps, lanes)
    if lanes == 16:
        sums = sums[..., :8] + sums[..., 8:]
    for _ in range(3):  # neighbours
        sums = sums[..., 0::2] + sums[..., 1::2]
    return np.asarray(exps * (F32(1) / sums))


def mean(x: Array) -> Array:
    """Over the last axis, which stays: Eigen's sum with two registers of four lanes."""
    size = x.shape[-1]
    whole = size - size % 8
    sums = _lanes(x[..., :whole], 8)
    sums = sums[..., :4] + sums[..., 4:]
    if size - whole >= 4:
        sums = sums + x[..., whole : whole + 4]
        whole += 4
    total = (sums[..., 0] + sums[..., 2]) + (sums[..., 1] + sums[..., 3])
    for i in range(whole, size):
        total = total + x[..., i]
    return np.asarray(total / F32(size))[..., None]


def power(x: Array, exponent: Array) -> Array:
    """Squares and cubes are products."""
    if exponent.size == 1 and exponent.reshape(-1)[0] in (2, 3):
        return np.asarray(x * x if exponent.reshape(-1)[0] == 2 else x * x * x)
    return np.asarray(np.power(x, exponent).astype(x.dtype))


def matmul(a: Array, b: Array, packed: bool) -> Array:
    """(..., M, K) @ (..., K, N), or by one (K, N) for all; packed: b is an initializer of float32."""
    if a.dtype != F32 or b.dtype != F32 or a.ndim < 2 or b.ndim < 2 or 0 in (*a.shape, *b.shape):
        return np.asarray(np.matmul(a, b))
    if b.ndim == 2:
        return gemm(a.reshape(-1, a.shape[-1]), b, None, packed).reshape(*a.shape[:-1], b.shape[-1])
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (np.broadcast_to(v, (*batch, *v.shape[-2:])) for v in (a, b))
    out = np.empty((*batch, a.shape[-2], b.shape[-1]), F32)
    for index in np.ndindex(batch):
        out[index] = gemm(a[index], b[index], None, False)
    return out


def gemm(a: Array, b: Array, c: Array | None, packed: bool) -> Array:
    """(M, K) @ (K, N) + (M, N), or what broadcasts to it.

    Each sum is cut into blocks, a block is one chain of fused multiply-adds, and the blocks are added up in order
    (MlasSgemmOperation). One row by a matrix that is not packed beforehand takes products four at a time
    (SgemmKernelM1Avx.S).
    """
    from ... import kernels

    (M, K), N = a.shape, b.shape[1]
    added = c is not None and c.size == N and c.shape[-1] == N
    if M == 1 and not packed:
        out = c.reshape(1, N).copy() if c is not None and added else np.zeros((1, N), F32)
        for k, width in _by_fours(K):
            products = a[0, k : k + width, None] * b[k : k + width]
            total = products[0]
            for product in products[1:]:
                total = total + product
            out += total
    else:
        bias = c.reshape(N) if c is not None and added else np.zeros(0, F32)
        out = kernels.chained_product(np.ascontiguousarray(a), np.ascontiguousarray(b), bias, _terms(K, N, packed))
    return np.asarray(out if c is None or added else out + c)


def _by_fours(K: int) -> list[tuple[int, int]]:
    """Where each group of 4 terms begins, and its size: the last ones of 2 and of 1."""
    groups, k = [], 0
    for width in (4, 2, 1):
        while K - k >= width:
            groups.append((k, width))
            k += width
    return groups


def _terms(K: int, N: int, packed: bool) -> int:
    """How many terms make a block: more where the matrix is narrow."""
    if packed:
        return 256
    terms, columns = 128, 128
    while N < K and columns > 16 and columns // 2 >= N:
        terms, columns = 2 * terms, columns // 2
    return terms
