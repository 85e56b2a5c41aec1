"""From the scores of one position to the next token: penalties, filters, and a reproducible draw.

All functions take logits or probabilities (V,) of one position in float32 or float64 and work in that dtype; running
sums are float64. The order in which the filters are applied, and what each keeps, is that of
Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p.

What comes out has the same bits on every machine. NumPy's exp has not: it goes by what the processor can do. So exp
is a chain of additions and multiplications here. Sums are added in one order, which tests/generate/test_sampling.py
writes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .arguments import real_number, whole_number
from .errors import InputError
from .weights import Array

# 50257 entries need neither a sort nor a running sum over all of them:
SEARCHED_TOGETHER = 128  # entries whose maximum is looked at first, in the search for the largest
RUN = 512  # entries whose sum is looked at first, in the search for a place in the running sum
ADDED_AT_ONCE = 4096  # numbers that every NumPy adds in one order: its buffer has 8192
LOG_2 = 0.6931471805599453
COLDEST = 1e-6  # temperatures below cannot be told from greedy in float32
LARGEST = 1e30  # that scores are divided or multiplied by: float32 ends at 3e38


class _Format(NamedTuple):
    """What `exp` has to know of a format of numbers."""

    integer: type  # of as many bits
    mantissa: int  # bits of it that are stored
    bias: int  # of the exponent
    log2: tuple[float, float]  # in two parts: whole numbers up to the bias times the first have no error
    series: tuple[float, ...]  # of e ** x, the last term first; what is left out is no bit for |x| <= ln(2) / 2


def _series(terms: int) -> tuple[float, ...]:
    return tuple(1 / math.factorial(n) for n in range(terms, 0, -1))


_FORMATS = {
    np.float32: _Format(np.int32, 23, 127, (0.693359375, -2.12194440054690583e-4), _series(7)),
    np.float64: _Format(np.int64, 52, 1023, (6.93147180369123816490e-1, 1.90821492927058770002e-10), _series(13)),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Parameters
    ----------
    temperature : float, optional
        What the logits are divided by; 0 means greedy, whatever the filters. Default: 1 where top_k, top_p or
        min_p leaves something out, else 0.
    top_k : int, optional
        Keep the k most probable tokens, and those as probable as the last of them; 0: all. Fan et al. 2018.
    top_p : float, optional
        Keep the fewest most probable tokens whose probabilities add up to at least p. Holtzman et al. 2020.
    min_p : float, optional
        Keep tokens at least p times as probable as the most probable one. Nguyen et al. 2024.
    repetition_penalty : float
        Divide positive and multiply negative logits of tokens seen so far, prompt included. Keskar et al. 2019.

    Raises
    ------
    InputError
        If a value is out of its range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k is not None:
            whole_number("top_k", self.top_k, 0)  # 0: all
        if self.top_p is not None and not 0 < real_number("top_p", self.top_p) <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= real_number("min_p", self.min_p) <= 1:
            raise InputError(f"min_p must be in 0..1, got {self.min_p}")
        if not 1 / LARGEST <= real_number("repetition_penalty", self.repetition_penalty) <= LARGEST:
            raise InputError(
                f"repetition_penalty must be in {1 / LARGEST:g}..{LARGEST:g} (1: none), got {self.repetition_penalty}"
            )
        if self.temperature is None:
            filtered = bool(self.top_k) or self.top_p not in (None, 1) or bool(self.min_p)
            object.__setattr__(self, "temperature", 1.0 if filtered else 0.0)
        elif real_number("temperature", self.temperature) != 0 and not COLDEST <= self.temperature <= LARGEST:
            raise InputError(f"temperature must be 0 (greedy) or in {COLDEST:g}..{LARGEST:g}, got {self.temperature}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, without chance."""
        return self.temperature == 0

    def choose(self, logits: Array, seen: Array, rng: np.random.Generator) -> int:
        """The next token's id.

        Parameters
        ----------
        logits : (V,)
        seen : integers (n,)
            The distinct ids of prompt and continuation so far, for the repetition penalty.
        rng : numpy Generator
            Gives one uniform number for each token that is not chosen greedily.

        Raises
        ------
        InputError
            If no logit is above -inf, or one is NaN or inf.
        """
        if self.repetition_penalty != 1:
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        best = most_probable_token(logits)
        if not self.temperature:
            return best
        kept = None  # ids of the tokens that `weights` are about; None: all
        if self.top_k:  # before the temperature, which changes no order
            kept = top_k(logits, self.top_k)
        weights = (logits if kept is None else logits[kept]) - logits[best]  # <= 0: exp cannot overflow
        weights /= self.temperature
        weights = exp(weights)
        if self.top_p not in (None, 1):
            inside, running = _nucleus(weights, self.top_p)
            if self.min_p:  # of weights in descending order the first ones, too; the largest of them is 1
                running = running[: np.count_nonzero(weights[inside] >= self.min_p)]
            drawn = inside[_first_above(running, rng.random() * running[-1])]
        elif self.min_p:
            inside = min_p(weights, self.min_p)
            drawn = inside[draw(weights[inside], rng.random())]
        else:
            drawn = draw(weights, rng.random())
        return int(drawn if kept is None else kept[drawn])


def random_stream(seed: int, prompt: Sequence[int], copy: int = 0) -> np.random.Generator:
    """The random numbers of one sequence: they depend on the seed and the prompt, not on the rest of a batch.

    `copy` counts equal prompts in one batch, which thus get different continuations.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, copy, *prompt])))


def penalise_repetition(logits: Array, seen: Array, penalty: float) -> Array:
    """A copy of the logits (V,) where those of `seen` tokens are divided (if negative: multiplied) by the penalty."""
    penalised = logits.copy()
    scores = logits[seen]
    penalised[seen] = np.where(scores < 0, scores * penalty, scores / penalty)
    return penalised


def top_k(values: Array, k: int) -> Array:
    """Indices of the k largest values, and of any equal to the smallest of these, in ascending order."""
    if k >= len(values):
        return np.arange(len(values))
    if k * SEARCHED_TOGETHER >= len(values):
        return _where(values >= _largest(values, k))
    # k blocks hold something as large as the k-th largest maximum: nothing smaller can be among the k largest.
    maxima = np.maximum.reduceat(values, np.arange(0, len(values), SEARCHED_TOGETHER))
    candidates = _where(values >= _largest(maxima, k))
    large = values[candidates]
    found: Array = candidates[large >= _largest(large, k)]
    return found


def top_p(weights: Array, p: float) -> Array:
    """Indices of the fewest largest weights that add up to at least p of the sum of all, in descending order.

    The weights (V,) are probabilities, or proportional to them. Of equal weights at the edge the first are kept.
    """
    return _nucleus(weights, p)[0]


def _nucleus(weights: Array, p: float) -> tuple[Array, Array]:
    """What `top_p` keeps, and the running sum of their weights in float64."""
    whole = float(total(weights))
    wanted = p * whole
    # n weights below (1 - p) / n of the whole are less than 1 - p of it together: the rest holds p. Most often
    # that is so with far fewer than all weights in the place of n; twice as many leave room for rounding.
    order, held = np.zeros(0, np.intp), np.zeros(0)
    for n in (SEARCHED_TOGETHER, 16 * SEARCHED_TOGETHER, 256 * SEARCHED_TOGETHER, 2 * len(weights)):
        candidates = _where(weights >= (whole - wanted) / n)
        order = candidates[_descending(weights[candidates])]
        held = weights[order].cumsum(dtype=np.float64)
        if held.size and held[-1] >= wanted:
            break
    n = 1 + int(held[:-1].searchsorted(wanted))
    return order[:n], held[:n]


def min_p(weights: Array, p: float) -> Array:
    """Indices of the weights (V,) that are at least p times the largest one, in ascending order."""
    return _where(weights >= p * weights[weights.argmax()])


def draw(weights: Array, uniform: float) -> int:
    """Index i with probability weights[i] / sum(weights), where `uniform` is in [0, 1): the inverse of the CDF.

    An entry of weight 0 is never drawn.
    """
    if len(weights) <= RUN:
        running = weights.cumsum(dtype=np.float64)
        return _first_above(running, uniform * running[-1])
    runs = np.add.reduceat(weights, np.arange(0, len(weights), RUN)).cumsum(dtype=np.float64)
    target = uniform * runs[-1]
    run = _first_above(runs, target)
    inside = weights[run * RUN : (run + 1) * RUN].cumsum(dtype=np.float64)
    return run * RUN + _first_above(inside, target - (runs[run - 1] if run else 0.0))


def total(values: Array) -> np.floating:
    """The sum of a vector, in halves of halves, as NumPy adds too; its older versions (2.0) cut long ones elsewhere."""
    n = len(values)
    if n <= ADDED_AT_ONCE:
        short: np.floating = np.add.reduce(values)
        return short
    half = n // 2 - n // 2 % 8
    return total(values[:half]) + total(values[half:])


def exp(x: Array) -> Array:
    """e ** x of numbers that are at most 0, within 2 ulp; 0 where that is about subnormal. x is written to.

    x = n ln 2 + r with |r| <= ln(2) / 2; the series of e ** r; 2 ** n made from bits.
    """
    form = _FORMATS[x.dtype.type]
    r = np.maximum(x, -form.bias * LOG_2, out=x)  # n = -bias, whose bits are those of 0
    n = r * (1 / LOG_2)
    np.rint(n, out=n)
    y = n * form.log2[0]
    r -= y
    r -= np.multiply(n, form.log2[1], out=y)
    last, *others = form.series
    np.multiply(r, last, out=y)
    for factor in others:
        y += factor
        y *= r
    y += 1
    bits = n.view(form.integer)
    bits[:] = n
    bits += form.bias
    bits <<= form.mantissa
    y *= n
    return y


def most_probable_token(logits: Array) -> int:
    """The id of the largest of the logits (V,), of equal ones the first.

    Raises
    ------
    InputError
        If no logit is above -inf, or one is NaN or inf.
    """
    best = int(logits.argmax())  # several times as fast as max(); a NaN comes out on top
    if not math.isfinite(logits[best]):
        raise InputError(f"no token can be chosen: the largest logit, that of token {best}, is {logits[best]}")
    return best


def most_probable(logits: Array, n: int) -> Array:
    """Indices of the n largest logits, the largest first; of equal ones the first in the vocabulary."""
    candidates = top_k(logits, n)
    best: Array = candidates[(-logits[candidates]).argsort(kind="stable")][:n]
    return best


def _where(mask: Array) -> Array:
    """Indices of what is True, in ascending order."""
    found: Array = mask.nonzero()[0]
    return found


def _descending(weights: Array) -> Array:
    """The order of some weights from the largest to the smallest; equal ones stay in their order."""
    if weights.dtype != np.float32 or len(weights) < 2 * RUN:
        order: Array = (-weights).argsort(kind="stable")
        return order
    # The bits of floats that are not negative are in their order, and NumPy sorts 16 bits in linear time.
    bits = ~weights.view(np.uint32)
    order = bits.astype(np.uint16).argsort(kind="stable")  # by the lower half first
    return order[(bits >> 16).astype(np.uint16)[order].argsort(kind="stable")]


def _largest(values: Array, k: int) -> Array:
    """The k-th largest value."""
    place = len(values) - k
    value: Array = np.partition(values, place)[place]
    return value


def _first_above(running_sum: Array, target: float) -> int:
    """First index whose running sum exceeds target; where rounding leaves none, the last that adds anything."""
    found = int(running_sum.searchsorted(target, side="right"))
    return found if found < len(running_sum) else int(running_sum.searchsorted(running_sum[-1]))
