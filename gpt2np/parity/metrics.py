"""How far two arrays are apart, and whether that is within a budget. Defined for NaN and infinities too.

Two elements that are both NaN, or the same infinity, agree (difference 0). Where only one of them is finite,
or the infinities differ, the difference is infinite. No metric is ever NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..arguments import real_number
from ..errors import ComparisonError, InputError
from ..weights import Array

COMPARED_TOGETHER = 1 << 22  # elements compared at a time: bounds the float64 temporaries


@dataclass(frozen=True)
class Budget:
    """An element passes if |actual - expected| <= atol + rtol * |expected|.

    Raises
    ------
    InputError
        If rtol or atol is not a finite number from 0 up: NaN would let everything pass.
    """

    rtol: float
    atol: float
    source: str = "given"

    def __post_init__(self) -> None:
        for value in (self.rtol, self.atol):
            if real_number("a budget's rtol and atol", value, "finite numbers from 0 up") < 0:
                raise InputError(f"a budget's rtol and atol must be finite numbers from 0 up, got {value}")

    def __str__(self) -> str:
        return f"rtol {self.rtol:g}, atol {self.atol:g} ({self.source})"


# Customary tolerances, each with the tool it is taken from.
PRESETS = {
    "zoo": Budget(1e-3, 1e-5, "zoo: the export script of the zoo's GPT-2"),
    "onnx": Budget(1e-3, 1e-7, "onnx: the backend test runner's default"),
    "ort-gpt2": Budget(5e-4, 5e-4, "ort-gpt2: ONNX Runtime's GPT-2 conversion tools"),
    "strict": Budget(1.3e-6, 1e-5, "strict: torch.testing.assert_close for float32"),
}


@dataclass(frozen=True)
class Metrics:
    """Differences of `actual` from `expected` over all elements; `at` is the index of the largest."""

    shape: tuple[int, ...]
    elements: int
    failing: int  # elements outside the budget
    max_abs: float
    at: tuple[int, ...]
    actual_at: float
    expected_at: float
    max_rel: float  # |a - b| / |b|; shown only: it explodes where b is near 0
    rms: float
    rms_expected: float
    p99: float  # 99th percentile of |a - b|
    cosine: float
    snr_db: float  # 10 log10(sum b^2 / sum (a - b)^2)
    scaled_ulp: float  # largest |a - b| in float32 ulp of the largest |b| of its row
    max_ulp: float  # float32 numbers between a and b; shown only, as max_rel
    nonfinite: tuple[int, int]  # NaN and infinities in actual, in expected
    spread: float = 0.0  # standard deviation of the expected elements
    left_out: int = 0  # elements that were not compared: rows of padding

    @property
    def ok(self) -> bool:
        return self.failing == 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(actual: Array, expected: Array, budget: Budget, keep: Array | None = None) -> Metrics:
    """All metrics of `actual` against `expected`, over the elements where `keep` is true if it is given.

    Parameters
    ----------
    keep : array of bools that broadcasts to their shape, optional

    Raises
    ------
    ComparisonError
        If the shapes differ or an array does not hold real numbers.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise ComparisonError(f"shapes differ: {actual.shape}, expected {expected.shape}")
    _check_real(actual, expected)
    chosen = None if keep is None else np.ascontiguousarray(np.broadcast_to(keep, actual.shape))
    n = actual.size if chosen is None else int(chosen.sum())
    distances = np.empty(actual.size, np.float32)
    sums = _Sums()
    for start, a, b in _blocks(actual, expected):  # (rows, width) each
        if chosen is not None:
            part = chosen.reshape(-1)[start : start + a.size].reshape(a.shape)
            a, b = np.where(part, a, 0), np.where(part, b, 0)
        distance = difference(a, b)
        sums.add(start, _floats(a), _floats(b), distance, budget)
        with np.errstate(over="ignore"):
            distances[start : start + distance.size] = distance.ravel()
    left_out = actual.size - n
    if chosen is not None:
        distances = distances[chosen.reshape(-1)]
    if n == 0:
        return Metrics(actual.shape, 0, 0, 0.0, (), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, math.inf, 0.0, 0.0, (0, 0),
                       left_out=left_out)  # fmt: skip
    index = tuple(int(i) for i in np.unravel_index(sums.at, actual.shape))
    return Metrics(
        shape=tuple(actual.shape),
        elements=n,
        failing=sums.failing,
        max_abs=sums.max_abs,
        at=index,
        actual_at=float(actual[index]),
        expected_at=float(expected[index]),
        max_rel=sums.max_rel,
        rms=math.sqrt(sums.squares / n),
        rms_expected=math.sqrt(sums.bb / n),
        p99=float(np.partition(distances, (99 * (n - 1)) // 100)[(99 * (n - 1)) // 100]),
        cosine=sums.cosine,
        snr_db=sums.snr_db,
        scaled_ulp=sums.scaled,
        max_ulp=sums.ulps,
        nonfinite=(sums.nonfinite_a, sums.nonfinite_b),
        spread=_spread(sums.bb / n, sums.total / n),
        left_out=left_out,
    )


def _spread(square: float, mean: float) -> float:
    """Standard deviation by the mean square and the mean; 0 where the difference is what float64 rounds away."""
    variance = square - mean**2 if math.isfinite(square) else math.inf
    return math.sqrt(variance) if variance > 1e-13 * square else 0.0


def _check_real(*arrays: Array) -> None:
    for array in arrays:
        if array.dtype.kind in "cOSUMmT" or array.dtype.names is not None or array.dtype.name.startswith("void"):
            raise ComparisonError(f"cannot compare arrays of dtype {array.dtype}")


@dataclass
class _Sums:
    """What is known of two arrays a and b after some of their blocks."""

    failing: int = 0
    nonfinite_a: int = 0
    nonfinite_b: int = 0
    max_abs: float = -1.0
    at: int = 0  # the flat index of the largest difference
    max_rel: float = 0.0
    scaled: float = 0.0
    ulps: float = 0.0
    squares: float = 0.0  # of a - b; the next ones over what is finite in both
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    total: float = 0.0  # of b

    def add(self, start: int, a: Array, b: Array, distance: Array, budget: Budget) -> None:
        """One more block of rows, whose first element has the flat index `start`."""
        finite_a, finite_b = np.isfinite(a), np.isfinite(b)
        self.nonfinite_a += int((~finite_a).sum())
        self.nonfinite_b += int((~finite_b).sum())
        allowed = budget.atol + budget.rtol * np.where(finite_b, np.abs(b), 0)
        self.failing += int((distance > allowed).sum())
        where = int(distance.argmax())
        if distance.flat[where] > self.max_abs:
            self.max_abs, self.at = float(distance.flat[where]), start + where
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            relative = np.where(distance == 0, 0.0, distance / np.where(finite_b, np.abs(b), 1.0))
            row_max = np.where(finite_b, np.abs(b), 0).max(axis=-1, keepdims=True)
            single = np.finfo(np.float32)
            ulp = np.spacing(np.clip(row_max, single.tiny, single.max).astype(np.float32)).astype(np.float64)
            self.scaled = max(self.scaled, float((distance / ulp).max()))
            self.ulps = max(self.ulps, float(_ulp_distance(a, b, distance).max()))
            self.squares += float((distance * distance).sum())
        self.max_rel = max(self.max_rel, float(relative.max()))
        both = finite_a & finite_b
        fa, fb = np.where(both, a, 0), np.where(both, b, 0)
        with np.errstate(over="ignore"):
            self.aa += float((fa * fa).sum())
            self.bb += float((fb * fb).sum())
            self.ab += float((fa * fb).sum())
            self.total += float(fb.sum())

    @property
    def cosine(self) -> float:
        if self.squares == 0:
            return 1.0
        known = self.aa > 0 and self.bb > 0 and math.isfinite(self.ab)  # not of squares beyond all float64
        return self.ab / (math.sqrt(self.aa) * math.sqrt(self.bb)) if known else 0.0

    @property
    def snr_db(self) -> float:
        if self.squares == 0:
            return math.inf
        never = self.bb == 0 or math.isinf(self.squares)
        return -math.inf if never else 10 * math.log10(self.bb / self.squares)


def _floats(x: Array) -> Array:
    """In float64; long doubles as they are."""
    return x if x.dtype == np.longdouble else x.astype(np.float64, copy=False)


def _parts(x: Array) -> tuple[Array, Array | float]:
    """Each number as a sum of two: float64 does not hold all digits of integers beyond 2**53."""
    if x.dtype.kind in "iu" and x.dtype.itemsize > 4:
        return (x >> 32) * 2.0**32, (x & 0xFFFFFFFF).astype(np.float64)
    return _floats(x), 0.0


def difference(a: Array, b: Array) -> Array:
    """|a - b| in float64, with the rules for NaN and infinities above."""
    (a, a_rest), (b, b_rest) = _parts(a), _parts(b)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a - b + (a_rest - b_rest)).astype(np.float64, copy=False)
    same = (a == b) & (a_rest == b_rest) | (np.isnan(a) & np.isnan(b))
    distance[np.isnan(distance)] = np.inf
    distance[same] = 0.0
    return np.asarray(distance)


def rms(a: Array, b: Array) -> float:
    """Root mean square of a - b; infinite where one of them is not finite and the other differs.

    Raises
    ------
    ComparisonError
        If one does not hold real numbers.
    """
    _check_real(a, b)
    if a.size == 0:
        return 0.0
    total = sum(float(np.square(difference(x, y)).sum()) for _, x, y in _blocks(a, b))
    return math.sqrt(total / a.size)


def _blocks(a: Array, b: Array) -> Iterator[tuple[int, Array, Array]]:
    """Both arrays as (rows, width), some rows at a time, with the flat index of the first element."""
    if a.size == 0:
        return
    width = a.shape[-1] if a.ndim else 1
    rows_a, rows_b = a.reshape(-1, width), b.reshape(-1, width)
    step = max(1, COMPARED_TOGETHER // width)
    for row in range(0, len(rows_a), step):
        yield row * width, rows_a[row : row + step], rows_b[row : row + step]


def _ulp_distance(a: Array, b: Array, distance: Array) -> Array:
    """How many float32 numbers lie between a and b: their bits as integers that ascend with the value."""

    def ordered(x: Array) -> Array:
        with np.errstate(over="ignore"):
            bits = x.astype(np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return np.where(distance == 0, 0.0, np.where(np.isinf(distance), np.inf, np.abs(ordered(a) - ordered(b))))


@dataclass(frozen=True)
class TopK:
    """Do two sets of logits (..., V) choose the same tokens?"""

    positions: int
    top1_changed: int  # positions whose most likely token differs
    top1_real: int  # of these, the ones whose margin exceeds twice what the budget allows a logit to differ by
    topk_overlap: float  # mean share of the k most likely tokens that both name
    k: int
    smallest_margin: float  # best minus second-best expected logit, smallest over the positions
    kl_mean: float  # KL(expected || actual) in nats
    kl_max: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def top_k(actual: Array, expected: Array, budget: Budget, k: int = 5) -> TopK:
    """Agreement of the chosen tokens, and the divergence of the distributions, position by position.

    Two near-equal logits may change places within the budget: a changed top-1 is real only if the margin
    between the two tokens exceeds twice the largest difference that the budget allows to either.
    """
    V = actual.shape[-1]
    k = min(k, V)
    rows_a, rows_b = actual.reshape(-1, V), expected.reshape(-1, V)
    changed = real = 0
    overlap, kls, smallest = 0.0, [], math.inf
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        a, b = (np.nan_to_num(row.astype(np.float64), nan=-np.inf, neginf=-np.inf) for row in (row_a, row_b))
        if not (np.isfinite(a).any() and np.isfinite(b).any()):
            changed, real = changed + 1, real + 1
            kls.append(math.inf)
            continue
        best_a, best_b = int(a.argmax()), int(b.argmax())
        if best_a != best_b:
            changed += 1
            allowed = budget.atol + budget.rtol * max(abs(b[best_a]), abs(b[best_b]))
            real += bool(b[best_b] - b[best_a] > 2 * allowed)
        top_a, top_b = np.argpartition(-a, k - 1)[:k], np.argpartition(-b, k - 1)[:k]
        overlap += len(np.intersect1d(top_a, top_b)) / k
        if V > 1:
            second, first = np.partition(b, -2)[-2:]
            smallest = min(smallest, float(first - second))
        with np.errstate(invalid="ignore"):
            log_a, log_b = a - a.max(), b - b.max()
            log_a, log_b = log_a - np.log(np.exp(log_a).sum()), log_b - np.log(np.exp(log_b).sum())
            p = np.exp(log_b)
            kls.append(max(0.0, float(np.where(p > 0, p * (log_b - log_a), 0).sum())))
    n = len(rows_a)
    return TopK(n, changed, real, overlap / max(n, 1), k, smallest, float(np.mean(kls or [0.0])), max(kls, default=0.0))
