"""Choosing a token: every filter against its definition written out, and the draw against its distribution."""

import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpt2np import sampling
from gpt2np.errors import InputError
from gpt2np.sampling import Sampling

NOTHING = np.array([], np.int64)


def vectors(dtype=np.float64):
    """Logits as they come, ties and forbidden (-inf) tokens included, at least one of them possible."""
    values = st.one_of(st.integers(-3, 3).map(float), st.floats(-30, 30, width=32), st.just(-math.inf))
    return hnp.arrays(dtype, st.integers(1, 700), elements=values, fill=values).filter(lambda x: x.max() > -math.inf)


def softmax(logits):
    exps = np.exp(logits.astype(np.float64) - logits.max())
    return exps / exps.sum()


def long_vector(seed=0, size=5000):
    return np.random.default_rng(seed).standard_normal(size) * 3


@given(vectors(), st.integers(1, 800))
def test_top_k_keeps_all_as_large_as_the_kth(logits, k):
    smallest = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    assert sampling.top_k(logits, k).tolist() == np.flatnonzero(logits >= smallest).tolist()


@pytest.mark.parametrize("k", [1, 5, 39, 40, 41, 1000, 4999, 5000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_top_k_of_a_large_vocabulary(k, dtype):
    logits = long_vector().astype(dtype)
    assert sampling.top_k(logits, k).tolist() == sorted(np.argsort(-logits)[:k].tolist())


def weights(dtype=np.float64):
    """Unnormalised probabilities, some of them 0."""
    return vectors(dtype).map(lambda logits: np.exp(logits - logits.max()))


@given(weights(), st.floats(0.001, 1))
def test_top_p_keeps_the_fewest_that_hold_p(weights, p):
    kept = sampling.top_p(weights, p)
    assert len(set(kept.tolist())) == len(kept) >= 1
    held = weights[kept].sum()
    wanted = p * weights.sum()
    assert held >= wanted * (1 - 1e-12)
    assert held - weights[kept[-1]] < wanted * (1 + 1e-12)  # one fewer would not do
    others = np.delete(weights, kept)
    assert others.size == 0 or others.max() <= weights[kept].min()
    assert (np.diff(weights[kept]) <= 0).all()


@given(st.integers(1, 3000), st.floats(2**-20, 1, width=32), st.floats(1e-9, 1))
def test_top_p_of_equal_weights_keeps_the_first_ones(n, weight, p):
    """Where rounding decides whether any is as large as the average."""
    kept = sampling.top_p(np.full(n, weight, np.float32), p).tolist()
    assert kept == list(range(len(kept)))
    assert max(p * n * (1 - 1e-6), 1) <= len(kept) < p * n * (1 + 1e-6) + 1


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_top_p_of_a_large_flat_vocabulary(p, dtype):
    """More tokens than the first look takes in."""
    probabilities = softmax(long_vector() / 10).astype(dtype)
    order = np.argsort(-probabilities, kind="stable")
    held = probabilities[order].cumsum(dtype=np.float64)
    kept = sampling.top_p(probabilities, p).tolist()
    assert kept == order[: 1 + np.searchsorted(held[:-1], p * probabilities.sum())].tolist()


@given(st.integers(1, 5000), st.integers(0, 2**32), st.sampled_from([1, 5, 1000, 10**9]))
def test_weights_in_descending_order(size, seed, different):
    """Many equal ones and none, zeros and subnormal numbers among them."""
    rng = np.random.default_rng(seed)
    weights = np.exp(-rng.integers(0, different, size) / different * rng.choice([1, 110])).astype(np.float32)
    weights[rng.random(size) < 0.1] = 0
    assert sampling._descending(weights).tolist() == np.argsort(-weights, kind="stable").tolist()


@given(weights(), st.floats(0, 1))
def test_min_p_compares_with_the_most_probable(weights, p):
    assert sampling.min_p(weights, p).tolist() == [i for i, w in enumerate(weights) if w >= p * weights.max()]


@given(vectors(), st.data(), st.floats(0.5, 2))
def test_repetition_penalty(logits, data, penalty):
    seen = np.array(data.draw(st.lists(st.integers(0, len(logits) - 1), unique=True, max_size=5)), np.int64)
    before = logits.copy()
    after = sampling.penalise_repetition(logits, seen, penalty)
    assert (logits == before).all()
    for i, (old, new) in enumerate(zip(logits, after, strict=True)):
        expected = old if i not in seen else old * penalty if old < 0 else old / penalty
        assert new == expected


@given(
    hnp.arrays(np.float64, st.integers(1, 400), elements=st.floats(0, 1, allow_subnormal=False)).filter(
        lambda w: w.sum() > 0
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_draw_inverts_the_running_sum(weights, uniform):
    drawn = sampling.draw(weights, uniform)
    assert weights[drawn] > 0
    running = weights.cumsum()
    target = uniform * running[-1]
    slack = 1e-12 * running[-1]
    assert running[drawn] > target - slack
    assert running[drawn] - weights[drawn] <= target + slack


def test_draw_never_takes_what_is_impossible_at_the_very_end():
    weights = np.array([0.0, 0.1, 0.7, 0.0] + [0.0] * 300)
    assert sampling.draw(weights, 0.0) == 1
    assert sampling.draw(weights, 1 - 2**-53) == 2
    assert sampling.draw(weights[:1] + 1, 1 - 2**-53) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 7},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_frequencies_are_those_of_the_filtered_distribution(options, dtype):
    """20000 draws against the definition on the whole vocabulary, filter after filter, by Pearson's chi-squared."""
    logits = (np.random.default_rng(3).standard_normal(20) * 2).astype(dtype)
    seen = np.array([2, 5])
    expected = softmax(_filtered(logits.astype(np.float64), seen, **options))
    rng = np.random.default_rng(0)
    sampler = Sampling(**options)
    n = 20_000
    counts = np.bincount([sampler.choose(logits, seen, rng) for _ in range(n)], minlength=20)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = ((counts - n * expected)[possible] ** 2 / (n * expected[possible])).sum()
    freedom = possible.sum() - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def _filtered(logits, seen, temperature, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0):
    """The definition, with -inf for what is not kept."""
    scores = logits.copy()
    for i in seen:
        scores[i] = scores[i] * repetition_penalty if scores[i] < 0 else scores[i] / repetition_penalty
    scores /= temperature
    if top_k is not None:
        scores[scores < np.sort(scores)[-top_k]] = -np.inf
    if top_p is not None:
        order = np.argsort(scores)  # from the least probable: what adds up to at most 1 - p goes
        scores[order[softmax(scores)[order].cumsum() <= 1 - top_p]] = -np.inf
    if min_p is not None:
        probabilities = softmax(scores)
        scores[probabilities < min_p * probabilities.max()] = -np.inf
    return scores


@given(vectors(np.float32), st.floats(0.1, 3), st.integers(1, 50), st.floats(0.05, 1), st.floats(0, 0.5))
def test_what_is_drawn_was_kept(logits, temperature, k, p, m):
    sampler = Sampling(temperature, k, p, m)
    drawn = sampler.choose(logits, NOTHING, np.random.default_rng(0))
    assert logits[drawn] >= np.sort(logits)[-min(k, len(logits))]
    assert np.isfinite(logits[drawn])


def test_greedy_takes_the_first_of_the_largest_and_needs_no_chance():
    sampler = Sampling()
    assert sampler.greedy
    assert sampler.choose(np.array([1.0, 3.0, 3.0, -np.inf]), NOTHING, None) == 1
    assert Sampling(repetition_penalty=4.0).choose(np.array([1.0, 3.0, 2.0]), np.array([1]), None) == 2


def test_a_filter_alone_means_sampling_at_temperature_1():
    for options in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}):
        assert Sampling(**options).temperature == 1
    assert Sampling(repetition_penalty=1.2).greedy
    assert Sampling(top_k=0, top_p=1.0, min_p=0.0).greedy  # these keep everything
    assert Sampling(temperature=0, top_k=5, top_p=0.5).greedy


@given(vectors(), st.integers(0, 2**32))
def test_filters_that_keep_everything_change_nothing(logits, seed):
    plain, kept = (
        Sampling(1.0, *filters).choose(logits, NOTHING, np.random.default_rng(seed)) for filters in ((), (0, 1.0, 0.0))
    )
    assert plain == kept


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    for sampler in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(InputError, match=f"token 1, is {bad}"):
            sampler.choose(np.array([0.0, bad, 1.0]), NOTHING, np.random.default_rng(0))
    with pytest.raises(InputError, match="-inf"):
        Sampling().choose(np.full(3, -np.inf), NOTHING, None)


def in_order(values):
    """The sum of a vector in the order in which NumPy adds: halves, of which up to 128 numbers are eight chains."""
    n = len(values)
    if n > 128:
        half = n // 2 - n // 2 % 8
        return in_order(values[:half]) + in_order(values[half:])
    eights, total = n - n % 8, values.dtype.type(0)
    if n >= 8:
        chains = values[:8].copy()
        for i in range(8, eights, 8):
            chains += values[i : i + 8]
        pairs = chains[0::2] + chains[1::2]
        total = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
    for value in values[eights:]:
        total += value
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 7, 8, 100, 128, 129, 1000, 2048, 50257])
def test_sums_have_one_order_on_every_machine(n, dtype):
    values = np.random.default_rng(n).random(n).astype(dtype)
    assert sampling.total(values) == in_order(values)
    assert np.add.reduce(values[: sampling.ADDED_AT_ONCE]) == in_order(values[: sampling.ADDED_AT_ONCE])
    starts = [0, n // 3] if n > 2 else [0]
    parts = np.split(values, starts[1:])
    assert np.add.reduceat(values, starts).tolist() == [part[0] + in_order(part[1:]) for part in parts]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp_and_log_are_the_nearest_numbers_or_almost(dtype):
    limits = np.finfo(dtype)
    x = np.linspace(np.log(limits.tiny) + 1, 0, 20_001).astype(dtype)
    exact = np.array([float(Decimal(float(number)).exp()) for number in x[::20]])
    ulp = np.spacing(exact.astype(dtype))
    found = sampling.exp(x.copy())
    assert (abs(found[::20] - exact) / ulp).max() < 2
    assert (np.diff(found) >= 0).all()
    assert sampling.exp(np.array([-np.inf, limits.min, 0, np.log(limits.tiny) - 1], dtype)).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": 1e300},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"repetition_penalty": math.inf},
    ],
)
def test_values_out_of_range_are_errors(options):
    with pytest.raises(InputError, match=next(reversed(options))):
        Sampling(**options)


def test_streams_depend_on_seed_prompt_and_copy_alone():
    def first(*arguments):
        return sampling.random_stream(*arguments).random()

    assert first(1, [5, 6]) == first(1, [5, 6])
    different = [first(1, [5, 6]), first(2, [5, 6]), first(1, [5, 7]), first(1, [5]), first(1, [5, 6], 1)]
    assert len(set(different)) == 5
    # recorded: the same seed gives the same text on any machine and with any later version
    assert first(42, [15496, 995]) == 0.10876971367585997


@given(vectors(), st.integers(1, 20))
def test_the_most_probable(logits, n):
    best = sampling.most_probable(logits, n)
    assert best.tolist() == np.argsort(-logits, kind="stable")[:n].tolist()


def test_float32_stays_float32():
    logits = long_vector().astype(np.float32)
    assert sampling.penalise_repetition(logits, np.array([1]), 1.5).dtype == np.float32
