"""Weights, inputs or results of an operation in a narrower type than float32, or dropped out at random."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import OPERATIONS, Run, split_tap, tap_inputs, tap_weights
from ..program import Program
from .gradients import F64
from .problem import Guess, Problem, remade, together
from .rounding import EIGHT_BITS, SIXTEEN_BITS, in_8_bits, quantised, rounded

# Parts of a layer whose results programs round in every layer, in words.
EVERYWHERE = {"attn.scores": "all scores", "attn.probs": "all probabilities", "mlp.gelu": "the activation's results"}
SCALES = (False, "one scale"), (True, "a scale for each column")  # of 8-bit weights: by column?, in words
ROUNDINGS = (*SIXTEEN_BITS, "tf32", "float8_e4m3fn", "float8_e5m2")


def narrow_types(problem: Problem, tap: str) -> Iterator[Guess]:
    """Weights, result or inputs of an operation in a narrower float, or all of them; weights in 8-bit integers."""
    p = problem.program
    group = together(problem, tap)
    if tap != group[0]:
        return
    names = list(dict.fromkeys(name for of in group for name in tap_weights(of, p)))
    inputs = tap_inputs(tap, p.config)
    subject = " and ".join(group)
    matrices = [n for n in names if p.weights(n, F64).ndim == 2 and not n.startswith(("wte", "lm_head"))]
    local = group[0] in problem.observed
    for name in matrices:
        value = p.weights(name, F64).astype(np.float64)
        for by_column, words in SCALES:
            text = f"{name} held int8 values with {words}"
            yield Guess("quantised", group[0], text, weights={name: quantised(value, by_column)})
    yield from _activations_in_8_bits(problem, group, inputs) if local or not problem.is_wide else ()
    for kind in ROUNDINGS if local else SIXTEEN_BITS:
        both = {name: rounded(p.weights(name, F64).astype(np.float64), kind) for name in names}
        for name, value in both.items():
            yield Guess("rounding", group[0], f"{name} were rounded to {kind}", weights={name: value})
        if len(both) > 1:
            yield Guess("rounding", group[0], f"{' and '.join(both)} were rounded to {kind}", weights=both)
        every = set(range(len(inputs)))
        if kind != "tf32":  # what tensor cores read, not what they write
            runs = {t: rounded_run(p, kind, set(), True) for t in group}
            text = f"{subject} were rounded to {kind}"
            yield Guess("rounding", group[0], text, runs=runs)
        for i, name in enumerate(inputs):
            text = f"{name} were rounded to {kind} before {subject} read{'s' if len(group) == 1 else ''} it"
            guess = Guess("rounding", group[0], text, runs={t: rounded_run(p, kind, {i}, False) for t in group})
            guess.named = name
            yield guess
        if (local or not problem.is_wide) and (both or len(inputs) > 1):
            for result in (False, True):
                text = f"everything that {subject} read{'s' if len(group) == 1 else ''} were rounded to {kind}"
                text += ", and the result" if result else ""
                runs = {t: rounded_run(p, kind, every, result) for t in group}
                some = {name: value for name, value in both.items() if result or name in matrices}
                yield Guess("rounding", group[0], text, weights=some, runs=runs)


def _activations_in_8_bits(problem: Problem, group: list[str], inputs: Sequence[str]) -> Iterator[Guess]:
    """What the operation reads, or what it makes, in 8-bit integers."""
    p = problem.program
    for how in EIGHT_BITS:
        for i, name in enumerate(inputs):
            text = f"{name} were rounded to int8 ({how}) before {' and '.join(group)} read it"
            yield Guess("quantised", group[0], text, runs=dict.fromkeys(group, in_8_bits_run(p, how, i)))
        for some in [group, group[1:]] if len(group) > 1 else [group]:  # a cache holds keys and values alone
            text = f"{' and '.join(some)} were rounded to int8 ({how})"
            yield Guess("quantised", some[0], text, runs=dict.fromkeys(some, in_8_bits_run(p, how, None)))


def in_8_bits_run(p: Program, how: str, which: int | None) -> Run:
    """An operation one of whose inputs, or with None whose result, is held in 8-bit integers."""

    def run(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        read = [in_8_bits(v, how) if i == which else v for i, v in enumerate(x)]
        value = p.run(tap, call, read, dtype)
        return in_8_bits(value, how) if which is None else value

    return run


def rounded_run(p: Program, kind: str, which: set[int], result: bool) -> Run:
    def run(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        base = q.with_(runs={tap: OPERATIONS[split_tap(tap)[1]].run})
        value = base.run(tap, call, [rounded(v, kind) if i in which else v for i, v in enumerate(x)], dtype)
        return rounded(value, kind) if result else value

    return run


def narrow_everywhere(problem: Problem) -> Iterator[Guess]:
    """All weights, or all results, or both, in a 16-bit type."""
    p = problem.program
    first = problem.taps[0]
    for kind in SIXTEEN_BITS:
        names = dict.fromkeys(name for tap in problem.taps for name in tap_weights(tap, p))
        total = sum(p.weights(name, F64).size for name in names)
        weights = {n: rounded(p.weights(n, F64), kind) for n in names} if total < 1 << 24 else {}
        runs = {tap: rounded_run(p, kind, set(), True) for tap in problem.taps}
        if weights:
            yield Guess("rounding", first, f"all weights were rounded to {kind}", weights=weights)
            text = f"all weights and all results were rounded to {kind}"
            yield Guess("rounding", first, text, weights=weights, runs=runs)
        yield Guess("rounding", first, f"all results were rounded to {kind}", runs=runs)
        for part, words in {"attn.k": "all keys and values", **EVERYWHERE}.items():
            taps = [
                t for t in problem.taps if split_tap(t)[1] == part or (part, split_tap(t)[1]) == ("attn.k", "attn.v")
            ]
            if len(taps) > 1:
                yield Guess("rounding", taps[0], f"{words} were rounded to {kind}", runs={t: runs[t] for t in taps})
    parts = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    held = {name: tap for tap in reversed(problem.taps) for name in tap_weights(tap, p) if name.endswith(parts)}
    for by_column, words in SCALES if held else ():
        text = f"the weights of all linear maps held int8 values with {words}"
        change = partial(quantised, by_column=by_column)
        yield Guess("quantised", list(held.values())[-1], text, weights=remade(problem, change, *held))
    for how in EIGHT_BITS:
        cached = [t for t in problem.taps if split_tap(t)[1] in ("attn.k", "attn.v")]
        maps = [t for t in problem.taps if tap_weights(t, p) and tap_inputs(t, p.config) and "ln_" not in t]
        for words, taps, which in (("all keys and values", cached, None), ("what all linear maps read", maps, 0)):
            if taps:
                text = f"{words} were rounded to int8 ({how})"
                yield Guess("quantised", taps[0], text, runs=dict.fromkeys(taps, in_8_bits_run(p, how, which)))
