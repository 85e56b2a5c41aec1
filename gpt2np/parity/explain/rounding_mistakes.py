"""Weights, inputs or results held in a narrower type than float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import OPERATIONS, Run, split_tap, tap_inputs
from ..program import Program
from .gradients import F64
from .problem import Guess, Problem, together, weight_names

SIXTEEN_BITS = ("bf16", "fp16")


ROUNDINGS = (*SIXTEEN_BITS, "tf32", "fp8_e4m3", "fp8_e5m2")


def rounded(x: Array, kind: str) -> Array:
    """x as a narrower float can hold it, in float64."""
    import ml_dtypes

    x = x.astype(np.float32)
    if kind == "tf32":  # float32 with 10 of its 23 bits of significand
        return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    narrow = {
        "bf16": ml_dtypes.bfloat16, "fp16": np.float16,
        "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2,
    }[kind]  # fmt: skip
    with np.errstate(all="ignore"):
        return x.astype(narrow).astype(np.float64)


def quantised(x: Array, by_column: bool) -> Array:
    """A matrix as 8-bit integers with one scale, or one for each column, hold it."""
    scale = np.abs(x).max(axis=0 if by_column else None, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale


def narrow_types(problem: Problem, tap: str) -> Iterator[Guess]:
    """Weights, result or inputs of an operation in a narrower float, or all of them; weights in 8-bit integers."""
    p = problem.program
    group = together(problem, tap)
    if tap != group[0]:
        return
    names = list(dict.fromkeys(name for name, of in weight_names(problem) if of in group))
    inputs = tap_inputs(tap, p.config)
    subject = " and ".join(group)
    matrices = [n for n in names if p.weights(n, F64).ndim == 2 and not n.startswith(("wte", "lm_head"))]
    local = group[0] in problem.observed
    for name in matrices if local else ():
        value = p.weights(name, F64).astype(np.float64)
        for by_column, words in ((False, "one scale"), (True, "a scale for each column")):
            text = f"{name} is quantised to int8 with {words}"
            yield Guess("quantised", group[0], text, weights={name: quantised(value, by_column)})
    for kind in ROUNDINGS if local else SIXTEEN_BITS:
        both = {name: rounded(p.weights(name, F64).astype(np.float64), kind) for name in names}
        for name, value in both.items():
            yield Guess("rounding", group[0], f"{name} is rounded to {kind}", weights={name: value})
        if len(both) > 1:
            yield Guess("rounding", group[0], f"{' and '.join(both)} are rounded to {kind}", weights=both)
        every = set(range(len(inputs)))
        if kind != "tf32":  # what tensor cores read, not what they write
            runs = {t: rounded_run(p, kind, set(), True) for t in group}
            text = f"{subject} {'is' if len(group) == 1 else 'are'} rounded to {kind}"
            yield Guess("rounding", group[0], text, runs=runs)
        for i, name in enumerate(inputs):
            text = f"{name} is rounded to {kind} before {subject} read{'s' if len(group) == 1 else ''} it"
            guess = Guess("rounding", group[0], text, runs={t: rounded_run(p, kind, {i}, False) for t in group})
            guess.named = name
            yield guess
        if local and (both or len(inputs) > 1):
            for result in (False, True):
                text = f"everything that {subject} read{'s' if len(group) == 1 else ''} is rounded to {kind}"
                text += ", and the result" if result else ""
                runs = {t: rounded_run(p, kind, every, result) for t in group}
                some = {name: value for name, value in both.items() if result or name in matrices}
                yield Guess("rounding", group[0], text, weights=some, runs=runs)


def rounded_run(p: Program, kind: str, which: set[int], result: bool) -> Run:
    def run(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        base = q.with_(runs={tap: OPERATIONS[split_tap(tap)[1]].run})
        value = base.run(tap, call, [rounded(v, kind) if i in which else v for i, v in enumerate(x)], dtype)
        return rounded(value, kind) if result else value

    return run
