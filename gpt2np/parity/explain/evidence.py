"""What the arrays themselves show, and what the file shows, where no mistake of the catalogue fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from ...weights import Array
from ..operations import OPERATIONS, split_tap, tap_inputs, tap_names
from .gradients import F64
from .problem import CERTAIN, Guess, Problem, afterwards, weight_names
from .rounding import BITS, SIXTEEN_BITS, quantised, rounded
from .rounding_mistakes import narrow_everywhere
from .where import describe, inside


def facts(problem: Problem) -> Iterator[Guess]:
    """What can be read off the observed arrays without trying anything: never written, copied, not finite."""
    for tap, value in problem.observed.items():
        expected = problem.values[tap]
        hidden = split_tap(tap)[1] == "attn.probs"  # a mask that hides every key gives zeros, too
        if not value.any() and expected.any() and not hidden:
            yield Guess("never_written", tap, f"{tap} were never written", removed=1.0, explains=True,
                        evidence="it is all zeros")  # fmt: skip
            continue
        own = tap_inputs(tap, problem.program.config)
        inputs = [problem.given[i] for i in own if i in problem.given]
        if any(value.shape == x.shape and np.array_equal(value, x) for x in inputs):
            continue  # an operation left out: there are words for that
        others = {t: v for t, v in {**problem.values, **problem.given}.items() if t not in own}
        for other, twin in others.items():
            if (
                other != tap
                and twin.shape == value.shape
                and np.array_equal(twin.astype(np.float32), value.astype(np.float32))
            ):
                text = f"{tap} were {other} over again"
                cause = "copied"
                if split_tap(tap)[1] in ("embed", "resid_mid", "resid_post") and _later(problem, other, tap):
                    cause, text = "in_place", f"{tap} had been changed in place to {other} after it was recorded"
                yield Guess(cause, tap, text, removed=1.0, explains=True, evidence="equal number for number",
                            fitted=int(cause == "copied"))  # fmt: skip
        bad = ~np.isfinite(value)
        if tap == "logits" and np.isneginf(value).any() and (filtered := _left_out_of(value, expected)):
            yield Guess("logits_form", tap, filtered, removed=1.0, explains=True, evidence="the others are -inf")
        elif bad.any() and np.isfinite(expected).all():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            text = f"{tap}{list(at)} became {value[at]:g}, where {expected[at]:.6g} belongs"
            if np.abs(expected).max() > 65504:
                text += "; float16 ends at 65504"
            yield Guess(
                "not_finite", tap, text, removed=1.0, explains=True, evidence=f"{int(bad.sum())} of {bad.size} numbers"
            )


def _left_out_of(value: Array, expected: Array) -> str:
    """Which logits were set to -inf on purpose, as sampling does: all but the largest, some tokens'; "" if none."""
    out = np.isneginf(value)
    rows, kept = out.reshape(-1, out.shape[-1]), (~out).sum(axis=-1)
    if not np.allclose(value[~out], expected[~out], rtol=1e-3, atol=1e-4 * float(np.abs(expected).max())):
        return ""  # the others are wrong, too
    if (rows == rows[0]).all():
        tokens = np.flatnonzero(rows[0])
        few = ", ".join(map(str, tokens[:4])) + (" ..." if len(tokens) > 4 else "")
        return f"the logits of token{'s' if len(tokens) > 1 else ''} {few} were set to -inf in every row"
    lowest = np.where(out, np.inf, expected).min(axis=-1)
    if (np.where(out, expected, -np.inf).max(axis=-1) <= lowest).all():
        same = int(kept.min()) == int(kept.max())
        return f"all logits but the {f'{kept.min()} ' if same else ''}largest of each row were set to -inf"
    return ""


def _later(problem: Problem, one: str, other: str) -> bool:
    names = tap_names(problem.program.config)
    return names.index(one) > names.index(other)


def shape_of_the_error(problem: Problem) -> Iterator[Guess]:
    """A constant factor, a clipped range, dropout, one part of an array alone, or plain imprecision."""
    noise: list[tuple[float, bool]] = []  # error by value of each tap, and whether it is without direction
    for tap, value in problem.observed.items():
        expected = problem.values[tap]
        if value.shape != expected.shape or not (np.isfinite(value).all() and np.isfinite(expected).all()):
            continue
        error = value - expected
        size, rms = float(np.sqrt(np.mean(error**2))), float(np.sqrt(np.mean(expected**2)))
        if size == 0 or rms == 0 or not value.any():
            continue
        yield from _stretched(problem, tap)
        yield from _dropped(problem, tap)
        floor = 1e-5 * rms
        words = describe(error, floor, OPERATIONS[split_tap(tap)[1]].shape, problem.call.start)
        if words and problem.local:
            number = words.startswith("one number")
            yield Guess("one_number" if number else "one_part", tap, f"the rest of {tap} agrees", removed=0.49,
                        fitted=2, stated=True)  # fmt: skip
        sizes = np.linalg.svd(error.reshape(-1, error.shape[-1]), compute_uv=False) ** 2
        along = abs(float((error * expected).mean())) / (size * rms)
        noise.append((size / rms, along < 0.1 and sizes[0] < 0.5 * sizes.sum() and inside(error, floor) is None))
    largest = max((share for share, _ in noise), default=0.0)
    if 2**-20 < largest < 1 / 32 and all(free for share, free in noise if share > largest / 16):
        bits = math.floor(-math.log2(largest))
        text = (
            f"it had arithmetic of about {bits} bits: sums, an approximation or intermediate results in a narrow type"
        )
        evidence = f"the error has no direction; it is {largest:.1e} of the value"
        yield Guess("imprecise", next(iter(problem.observed)), text, removed=0.3, evidence=evidence, fitted=1)


def _stretched(problem: Problem, tap: str) -> Iterator[Guess]:
    value, expected = problem.observed[tap], problem.values[tap]
    factor = float((value * expected).sum() / (expected * expected).sum())
    low, high = float(value.min()), float(value.max())
    sides = [f"below at {low:.6g}"] if low > expected.min() else []
    sides += [f"above at {high:.6g}"] if high < expected.max() else []
    for cause, text, change in (
        ("factor", f"multiplied by {factor:.6g}", partial(np.multiply, factor)),
        ("clipped", f"clipped {' and '.join(sides)}", partial(np.clip, a_min=low, a_max=high)),
    ):
        guess = Guess(cause, tap, f"{tap} were {text}", runs=afterwards(problem, tap, change), fitted=1)
        yield problem.judge(guess)


def _dropped(problem: Problem, tap: str) -> Iterator[Guess]:
    """Some numbers are 0, the others larger by one factor: dropout was on."""
    value, expected = problem.observed[tap], problem.values[tap]
    alive = np.abs(expected) > 1e-3 * np.abs(expected).max()
    zero = (value == 0) & alive
    share = zero.sum() / max(alive.sum(), 1)
    whole = inside(np.where(zero, expected, 0), 0.0)  # a part that is all zeros, such as a head, was not drawn
    if not 0.005 < share < 0.9 or (whole is not None and zero[whole & alive].mean() > 0.95):
        return
    factor = float(np.median(value[alive & ~zero] / expected[alive & ~zero]))
    if factor < 1 + 0.5 * share:  # dropout makes up for what it leaves out
        return
    keep = np.where(value == 0, 0, factor)
    text = f"dropout were on: {share:.0%} of {tap} are 0, the others are multiplied by {factor:.4g}"
    guess = Guess("dropout", tap, text, runs=afterwards(problem, tap, lambda x: x * keep), fitted=1)
    yield problem.judge(guess)


def stored_narrow(problem: Problem) -> Iterator[Guess]:
    """Observed arrays whose numbers all fit into a 16-bit type: rounded to it, or computed in it throughout."""
    others = [tap for tap in problem.observed if not problem.stored[tap]]
    if problem.error(problem.values, others) > 1e-5:  # of their size, more than float32 makes
        return  # what was rounded was read on, and has to be tried
    for tap, value in problem.observed.items():
        kind = problem.stored[tap]
        if not kind:
            continue
        evidence = f"every number of it is a {kind}"
        plain = float(np.sqrt(np.mean(np.square(problem.values[tap] - value))))
        after = float(np.sqrt(np.mean(np.square(rounded(problem.values[tap], kind) - value))))
        scale = float(np.sqrt(np.mean(np.square(value))))
        if plain > 1e-6 * scale and after < 0.1 * plain:
            yield Guess("rounding", tap, f"{tap} were rounded to {kind}", removed=1 - after / plain, explains=True,
                        evidence=evidence)  # fmt: skip
            continue
        for guess in narrow_everywhere(problem):
            if kind in guess.text and guess.text.startswith("all weights and all results"):
                made = problem.run(guess.applied(problem.program), guess.tap)
                size = float(np.sqrt(np.mean(np.square(made[tap] - problem.values[tap]))))
                if 0.3 < plain / max(size, 1e-300) < 3:
                    text = f"{tap} were rounded to {kind}, and computed in it"
                    evidence += f"; the error is {plain / size:.2g} x what {kind} arithmetic makes"
                    yield Guess("rounding", tap, text, removed=0.5, evidence=evidence, fitted=1)


def shown_by_the_file(problem: Problem) -> list[Guess]:
    """Oddities among the suspected operations' weights that cannot be undone, only pointed at."""
    return [*same_as_another_layer(problem), *representable_in_16_bits(problem), *odd_values(problem)]


def odd_values(problem: Problem) -> Iterator[Guess]:
    """Weights that hold what no training leaves: columns of zeros, 8-bit values, equal rows of wpe."""
    p = problem.program
    for name, tap in weight_names(problem):
        value = p.weights(name, F64).astype(np.float64)
        if value.ndim != 2 or not value.any():
            continue
        dead = np.flatnonzero(~value.any(axis=0))
        if 0 < len(dead) <= value.shape[1] // 4 and not name.startswith(("wte", "wpe", "lm_head")):
            text = f"column {', '.join(map(str, dead[:4]))} of {name} were not zeros"
            yield Guess("dead_column", tap, text, "zeros there", removed=CERTAIN, evidence="in the file")
        used = np.unique(problem.call.position_ids) if name.startswith("wpe") else np.arange(0)
        wrong = [int(r) for r in used if not value[r].any() or (r and np.array_equal(value[r], value[r - 1]))]
        if wrong:
            what = "zeros" if not value[wrong[0]].any() else f"row {wrong[0] - 1} over again"
            text = f"row {wrong[0]} of wpe were a row of its own"
            yield Guess("position_rows", tap, text, what, removed=CERTAIN, evidence="in the file")
        for by_column in (False, True):
            if value.size > 256 and np.allclose(
                quantised(value, by_column), value, rtol=0, atol=1e-6 * np.abs(value).max()
            ):
                share = expected_rounding_error(problem, name, tap, "int8")
                if 0.2 < share < 5:
                    text = f"{name} were not rounded to int8"
                    yield Guess("quantised", tap, text, "int8 values", removed=CERTAIN,
                                evidence=f"error is {share:.2g} x what such rounding makes")  # fmt: skip
                break


def same_as_another_layer(problem: Problem) -> list[Guess]:
    """Weights that are another layer's, element for element."""
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
                words = f"{name} were a weight of its own"
                now = f"h.{i}.{stem} there, element for element"
                found.append(Guess("other_layer", tap, words, now, removed=CERTAIN, evidence="equal in the file"))
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
                words, now = f"{name} were not rounded to {kind}", f"{kind} values only"
                guess = Guess("rounding", tap, words, now, evidence=f"error is {share:.2g} x what such rounding makes")
                guess.removed = CERTAIN if alone else 0.5
                found.append(guess)
    return found


def expected_rounding_error(problem: Problem, name: str, tap: str, kind: str) -> float:
    """Error of the problem over the error that rounding errors of this size, drawn at random, would make."""
    value = problem.program.weights(name, F64).astype(np.float64)
    if kind == "int8":
        step = np.full_like(value, np.abs(value).max() / 127)
    else:
        step = np.ldexp(1.0, np.frexp(value)[1] - BITS[kind])
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, value.shape) * step
    moved = problem.run(problem.program.with_({name: value + noise}), tap)
    made = problem.weighted({t: moved[t] - problem.values[t] for t in problem.observed})
    size = math.sqrt(sum(float(np.square(v).sum()) for v in made.values()))
    return problem.before / size if size > 0 else math.inf
