"""What the error itself shows, and what the file shows, where no mistake of the catalogue fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from ...weights import Array
from ..operations import Run
from .gradients import F64
from .problem import CERTAIN, Guess, Problem, weight_names
from .rounding_mistakes import SIXTEEN_BITS, rounded


def shape_of_the_error(problem: Problem) -> Iterator[Guess]:
    """Where no mistake of the catalogue fits: a copy, a constant factor, a clipped range, or plain imprecision."""
    noise: list[tuple[float, bool]] = []  # error by value of each tap, and whether it is without direction
    for tap, value in problem.observed.items():
        expected = problem.values[tap]
        if not value.any():
            yield Guess("never_written", tap, f"{tap} is all zeros", removed=1.0, evidence="in what it gave")
            continue
        for other, twin in problem.given.items():
            if other != tap and twin.shape == value.shape and np.array_equal(twin, value):
                text = f"{tap} is {other} over again"
                yield Guess("copied", tap, text, removed=1.0, evidence="equal in what it gave")
        bad = ~np.isfinite(value)
        if bad.any() and np.isfinite(expected).all():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            text = f"{tap}{list(at)} is {value[at]:g}, where {expected[at]:.6g} belongs"
            if np.abs(expected).max() > 65504:
                text += "; float16 ends at 65504"
            yield Guess("not_finite", tap, text, removed=1.0, evidence=f"{int(bad.sum())} of {bad.size} numbers")
        if bad.any() or not np.isfinite(expected).all():
            continue
        error = value - expected
        size, rms = float(np.sqrt(np.mean(error**2))), float(np.sqrt(np.mean(expected**2)))
        if size == 0 or rms == 0:
            continue
        factor = float((value * expected).sum() / (expected * expected).sum())
        low, high = float(value.min()), float(value.max())
        for cause, text, change in (
            ("factor", f"multiplied by {factor:.6g}", partial(np.multiply, factor)),
            ("clipped", f"clipped to {low:.6g} ... {high:.6g}", partial(np.clip, min=low, max=high)),
        ):
            runs = {tap: _afterwards(problem, change)}
            guess = problem.judge(Guess(cause, tap, f"{tap} is {text}", runs=runs))
            if guess.removed > 0.5:
                yield guess
        sizes = np.linalg.svd(error.reshape(-1, error.shape[-1]), compute_uv=False) ** 2
        along = abs(float((error * expected).mean())) / (size * rms)
        noise.append((size / rms, along < 0.1 and sizes[0] < 0.5 * sizes.sum()))
    largest = max((share for share, _ in noise), default=0.0)
    if 2**-20 < largest < 1 / 32 and all(free for share, free in noise if share > largest / 16):
        text = f"arithmetic of about {math.floor(-math.log2(largest))} bits: sums, an approximation or intermediate "
        evidence = f"the error has no direction; it is {largest:.1e} of the value"
        tap = next(iter(problem.observed))
        yield Guess("imprecise", tap, text + "results in a narrow type", removed=0.3, evidence=evidence)


def _afterwards(problem: Problem, change: Callable[[Array], Array]) -> Run:
    return lambda p, call, tap, x, dtype: change(problem.program.run(tap, call, x, dtype))


def shown_by_the_file(problem: Problem) -> list[Guess]:
    """Oddities among the suspected operations' weights that cannot be undone, only pointed at."""
    found: list[Guess] = []
    found += same_as_another_layer(problem)
    found += representable_in_16_bits(problem)
    return found


def same_as_another_layer(problem: Problem) -> list[Guess]:
    found = []
    p = problem.program
    for name, tap in weight_names(problem):
        if not name.startswith("h."):
            continue
        _, layer, stem = name.split(".", 2)
        mine = p.weights(name, F64)
        if not mine.any() or (mine == mine.flat[0]).all():
            continue
        for i in range(p.config.n_layer):
            if i != int(layer) and np.array_equal(mine, p.weights(f"h.{i}.{stem}", F64)):
                words = f"{name} is element for element h.{i}.{stem}: another layer's weight"
                found.append(Guess("other_layer", tap, words, removed=CERTAIN, evidence="equal in the file"))
                break
    return found


def representable_in_16_bits(problem: Problem) -> list[Guess]:
    """Weights that a 16-bit float holds exactly, in a file whose other weights it does not."""
    p = problem.program
    found = []
    for kind in SIXTEEN_BITS:
        exact = {}
        for name, tap in weight_names(problem):
            value = p.weights(name, F64).astype(np.float64)
            if value.any() and value.size > 32:
                exact[name] = (tap, bool((rounded(value, kind) == value).all()))
        rounded_ones = [(name, tap) for name, (tap, is_exact) in exact.items() if is_exact]
        if not rounded_ones:
            continue
        for name, tap in rounded_ones:
            share = expected_rounding_error(problem, name, tap, kind)
            if 0.2 < share < 5:
                alone = len(rounded_ones) < len(exact)
                words = f"{name} holds {kind} values only: rounded to {kind}"
                guess = Guess("rounding", tap, words, evidence=f"error is {share:.2g} x what such rounding makes")
                guess.removed = CERTAIN if alone else 0.5
                found.append(guess)
    return found


def expected_rounding_error(problem: Problem, name: str, tap: str, kind: str) -> float:
    """Error of the problem over the error that rounding errors of this size, drawn at random, would make."""
    value = problem.program.weights(name, F64).astype(np.float64)
    bits = 8 if kind == "bf16" else 11  # of the significand
    _, exponent = np.frexp(value)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, value.shape) * np.ldexp(1.0, exponent - bits)
    moved = problem.run(problem.program.with_({name: value + noise}), tap)
    made = problem.weighted({t: moved[t] - problem.values[t] for t in problem.observed})
    size = math.sqrt(sum(float(np.square(v).sum()) for v in made.values()))
    return problem.before / size if size > 0 else math.inf
