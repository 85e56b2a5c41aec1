"""Metrics: what they are on ordinary arrays, and that NaN and infinities never make one undefined."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from gpt2np.errors import ComparisonError, InputError
from gpt2np.parity.metrics import PRESETS, Budget, difference, measure, rms, top_k
from gpt2np.testing import assert_parity

ZOO = PRESETS["zoo"]
floats = arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=5), elements=st.floats(width=32))


def test_the_largest_difference_and_its_place() -> None:
    b = np.arange(1, 13, dtype=np.float32).reshape(1, 3, 4)
    a = b.copy()
    a[0, 2, 1] += 0.5
    m = measure(a, b, ZOO)
    assert (m.max_abs, m.at, m.failing, m.elements) == (0.5, (0, 2, 1), 1, 12)
    assert (m.actual_at, m.expected_at) == (10.5, 10.0)
    assert m.max_rel == pytest.approx(0.05)
    assert m.rms == pytest.approx(math.sqrt(0.25 / 12))
    assert m.snr_db == pytest.approx(10 * math.log10((b.astype(float) ** 2).sum() / 0.25))
    assert m.scaled_ulp == pytest.approx(0.5 / np.spacing(np.float32(12)))
    assert not m.ok


def test_the_tolerance_is_elementwise_and_inclusive_as_in_numpy() -> None:
    rng = np.random.default_rng(0)
    b = rng.standard_normal(1000)
    a = b + rng.standard_normal(1000) * 1e-3
    m = measure(a, b, Budget(1e-3, 1e-4))
    assert m.failing == int((~np.isclose(a, b, rtol=1e-3, atol=1e-4)).sum()) > 0


def test_float32_neighbours_are_one_ulp_apart() -> None:
    b = np.array([1.0, -1.0, 0.0], np.float32)
    a = np.nextafter(b, np.float32(np.inf))
    assert measure(a, b, ZOO).max_ulp == 1


def test_digits_that_float64_does_not_hold_count() -> None:
    none = Budget(0, 0)
    for kind in (np.int64, np.uint64):
        assert measure(np.array([2**53 + 1], kind), np.array([2**53], kind), none).failing == 1
    assert measure(np.array([2**53 + 1]), np.array([2.0**53]), none).failing == 1
    if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:
        one = np.ones(1, np.longdouble)
        assert measure(one + np.finfo(np.longdouble).eps, one, none).failing == 1
        huge = one * np.longdouble("1e4000")
        assert measure(huge, 2 * huge, ZOO).failing == 1


def test_integers_are_compared_exactly_where_a_long_double_is_a_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "longdouble", np.float64)  # as on Windows, and on a Mac with arm64
    none = Budget(0, 0)
    assert measure(np.array([2**53 + 1]), np.array([2**53]), none).max_abs == 1
    assert measure(np.array([2**53 + 1]), np.array([2.0**53]), none).max_abs == 1
    assert measure(np.array([-(2**63), -1]), np.array([2**63 - 1, -1]), none).max_abs == 2.0**64


def test_numbers_whose_squares_are_infinite_have_metrics_without_a_warning() -> None:
    a, b = np.full(3, 1.1e200), np.full(3, 1e200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m = measure(a, b, ZOO)
    assert m.failing == 3
    assert not any(math.isnan(v) for v in vars(m).values() if isinstance(v, float))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        (math.nan, math.nan, 0.0), (math.inf, math.inf, 0.0), (-math.inf, -math.inf, 0.0), (math.nan, 1.0, math.inf),
        (1.0, math.nan, math.inf), (math.inf, -math.inf, math.inf), (math.inf, 1.0, math.inf),
        (math.nan, math.inf, math.inf),
    ],
)  # fmt: skip
def test_what_is_not_finite_agrees_with_itself_only(a: float, b: float, distance: float) -> None:
    x, y = np.array([a, 1.0]), np.array([b, 1.0])
    assert difference(x, y).tolist() == [distance, 0.0]
    m = measure(x, y, ZOO)
    assert m.max_abs == distance
    assert m.ok == (distance == 0)
    assert m.nonfinite == (int(not math.isfinite(a)), int(not math.isfinite(b)))


@given(floats)
def test_no_metric_is_ever_nan(b: np.ndarray) -> None:
    a = np.roll(b.ravel(), 1).reshape(b.shape)
    for m in (measure(a, b, ZOO), measure(b, b, ZOO)):
        fields = dataclasses.asdict(m)
        del fields["actual_at"], fields["expected_at"]  # elements, not metrics
        assert not any(isinstance(v, float) and math.isnan(v) for v in fields.values()), fields
    assert measure(b, b, ZOO).ok
    assert measure(b, b, ZOO).max_abs == 0
    assert not math.isnan(rms(a, b))


def test_many_rows_are_measured_block_by_block_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    b = rng.standard_normal((7, 5, 3)).astype(np.float32)
    a = b + rng.standard_normal(b.shape).astype(np.float32) * 1e-3
    whole = measure(a, b, ZOO)
    monkeypatch.setattr("gpt2np.parity.metrics.COMPARED_TOGETHER", 6)
    blocks = measure(a, b, ZOO)
    for name, value in dataclasses.asdict(whole).items():
        assert getattr(blocks, name) == pytest.approx(value), name


def test_shapes_and_types_that_cannot_be_compared() -> None:
    with pytest.raises(ComparisonError, match=r"\(2,\), expected \(3,\)"):
        measure(np.zeros(2), np.zeros(3), ZOO)
    with pytest.raises(ComparisonError, match="complex"):
        measure(np.zeros(2, complex), np.zeros(2, complex), ZOO)
    assert measure(np.zeros((0, 4)), np.zeros((0, 4)), ZOO).ok


def test_top_1_counts_only_beyond_what_the_budget_allows() -> None:
    b = np.array([[1.0, 1.0 + 1e-6, 0.0], [1.0, 3.0, 0.0]])
    a = np.array([[1.0 + 2e-6, 1.0, 0.0], [3.0, 1.0, 0.0]])
    t = top_k(a, b, ZOO, k=2)
    assert (t.positions, t.top1_changed, t.top1_real) == (2, 2, 1)
    assert t.topk_overlap == 1
    assert t.smallest_margin == pytest.approx(1e-6)
    assert t.kl_max > 0.1
    same = top_k(b, b, ZOO)
    assert (same.top1_changed, same.kl_max) == (0, 0)
    assert top_k(np.full((1, 3), np.nan), b[:1], ZOO).top1_real == 1


@pytest.mark.parametrize("numbers", [(math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0), (-1.0, 0.0)])
def test_a_budget_that_would_let_everything_pass_is_refused(numbers: tuple[float, float]) -> None:
    with pytest.raises(InputError):
        Budget(*numbers)
    with pytest.raises(InputError):
        assert_parity(np.ones(2), np.zeros(2), budget=numbers)


def test_empty_or_ragged_arrays_are_no_comparison() -> None:
    with pytest.raises(ComparisonError):
        assert_parity(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(InputError):
        assert_parity([[1.0], [1.0, 2.0]], np.zeros(2))
