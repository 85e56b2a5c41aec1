"""Loops over one vector, and the elementary functions, written so that LLVM makes vector instructions of them."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import float32
from numba.extending import overload

from .jit import jit
from .layout import LANES
from .machine import DISABLE_JIT
from .tile import SQUARE, fma, raise_lanes, transpose

# ----------------------------------------------------------------------------------------------- vector loops
# They work on slices, from index 0: where numba cannot see that an index is not negative, LLVM makes no vectors.


@jit()
def copy(source, target):
    for i in range(target.size):
        target[i] = source[i]


@jit()
def add(source, target):
    for i in range(target.size):
        target[i] += source[i]


@jit()
def total(v, lanes):
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


@jit()
def highest(v, lanes):
    """The greatest number of a vector; a NaN may be passed over."""
    lanes[:] = -np.inf
    whole = v.size - v.size % LANES
    for start in range(0, whole, LANES):
        raise_lanes(lanes, v, start)
    for i in range(v.size - whole):
        lanes[i] = v[whole + i] if v[whole + i] > lanes[i] else lanes[i]
    width = LANES
    while width > 1:
        width //= 2
        for i in range(width):
            lanes[i] = lanes[i + width] if lanes[i + width] > lanes[i] else lanes[i]
    return lanes[0]


@jit()
def span(numbers):
    """The least and the greatest of some integers."""
    least = greatest = numbers[0]
    for n in numbers:
        least, greatest = min(least, n), max(greatest, n)
    return least, greatest


@jit()
def transpose_block(source, s_start, s_stride, rows, columns, target, t_start, t_stride):
    """target[c, r] = source[r, c], addressed as in `transpose`; what comes after these rows is asked for."""
    for r in range(0, rows, SQUARE):
        for c in range(0, columns, SQUARE):
            s, t = s_start + r * s_stride + c, t_start + c * t_stride + r
            if r + SQUARE <= rows and c + SQUARE <= columns:
                following = s_start + (r + SQUARE) * s_stride + c * SQUARE
                transpose(source, s, s_stride, target, t, t_stride, following)
            else:
                for i in range(min(SQUARE, rows - r)):
                    for j in range(min(SQUARE, columns - c)):
                        target[t + j * t_stride + i] = source[s + i * s_stride + j]


# ------------------------------------------------------------------------------------- elementary functions


def by_dtype(single: Callable[[Any], Any], double: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of one number: `single` for a float32, `double` for a float64."""

    def choose(x: Any) -> Any:
        return single(x) if isinstance(x, np.float32) else type(x)(double(x))

    @overload(choose, inline="always")
    def compiled(x):
        return (lambda x: single(x)) if x == float32 else (lambda x: double(x))

    return choose


@jit()
def _exp32(x):
    """e ** x of a float32; at most 1 ulp from the true value (1.25 without FMA), down to the smallest subnormal.

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


@jit()
def _erfc32(x):
    """1 - erf(x) of a float32; at most 6 ulp from the true value, made for vectors like _exp32.

    For a = |x|, erfc(a) = exp(-a ** 2) t p(t) with t = 1 / (1 + a / 2), as in Press et al., Numerical Recipes,
    section 6.2; p is a polynomial fitted to it, within 4e-9. What a * a loses in rounding is made up for after exp.
    """
    a = abs(x)
    a = np.float32(11.0) if a > np.float32(11.0) else a  # erfc is 0 there; a NaN is kept
    square = a * a
    # a * a - square, exactly, on machines without fused multiply-add too (Dekker 1971): a in two halves of 12 bits
    shifted = np.float32(4097.0) * a
    high = shifted - (shifted - a)
    low = a - high
    lost = low * low - ((square - high * high) - np.float32(2.0) * high * low)
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


@jit()
def _tanh32(x):
    """The hyperbolic tangent of a float32, from the formulas and the polynomial of Cephes' tanhf; within 2 ulp."""
    a = abs(x)
    square = x * x
    p = np.float32(-5.70498872745e-3)
    p = fma(p, square, np.float32(2.06390887954e-2))
    p = fma(p, square, np.float32(-5.37397155531e-2))
    p = fma(p, square, np.float32(1.33314422036e-1))
    p = fma(p, square, np.float32(-3.33332819422e-1))
    near = fma(p * square, x, x)
    far = np.float32(1.0) - np.float32(2.0) / (_exp32(a + a) + np.float32(1.0))
    far = -far if x < np.float32(0.0) else far
    return near if a < np.float32(0.625) else far


@jit()
def log(x):
    """The natural logarithm of a float64 that is positive and not subnormal; within 1 ulp, on every machine.

    x = 2 ** k * (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and log(1 + f) by the polynomial of fdlibm's e_log.c.
    The logarithms of systems' libraries differ in last bits.
    """
    bits = np.int64(np.float64(x).view(np.int64) + np.int64(0x3FF0000000000000 - 0x3FE6A09E667F3BCD))
    k = np.float64((bits >> np.int64(52)) - np.int64(1023))
    bits = (bits & np.int64(0x000FFFFFFFFFFFFF)) + np.int64(0x3FE6A09E667F3BCD)
    f = np.int64(bits).view(np.float64) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
    odd = z * (
        6.666666666666735130e-01
        + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01))
    )
    half = 0.5 * f * f
    return k * 6.93147180369123816490e-01 - ((half - (s * (half + (even + odd)) + k * 1.90821492927058770002e-10)) - f)


exp = by_dtype(_exp32, math.exp if not DISABLE_JIT else np.exp)
erfc = by_dtype(_erfc32, math.erfc)
tanh = by_dtype(_tanh32, math.tanh)


@jit()
def log_probabilities(scores, targets, lanes, sums, logs, best):
    """For each row of scores (R, V): the log-softmax at its targets (R, n), and whether no score is higher.

    Sums are float64.
    """
    for r in range(len(scores)):
        row = scores[r]
        top = highest(row, lanes)
        sums[:] = 0
        whole = row.size - row.size % LANES
        for start in range(0, whole, LANES):
            part = row[start : start + LANES]
            for i in range(LANES):
                sums[i] += np.float64(exp(part[i] - top))
        for i in range(row.size - whole):
            sums[i] += np.float64(exp(row[whole + i] - top))
        width = LANES
        while width > 1:
            width //= 2
            for i in range(width):
                sums[i] += sums[i + width]
        # a NaN among the scores, or an infinity, leaves no sum to take a logarithm of
        whole_log = log(sums[0]) if sums[0] >= 1 else np.nan
        for i in range(targets.shape[1]):
            target = row[targets[r, i]]
            logs[r, i] = np.float64(target) - np.float64(top) - whole_log
            best[r, i] = target == top


@jit()
def activate_in_place(v, activation):
    """Apply an activation to a vector in place; the formulas are those of `activations.py`.

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
            v[i] = tanh(v[i])
