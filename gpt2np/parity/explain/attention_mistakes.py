"""The usual mistakes inside the attention: c_attn and its heads, the scale, the mask, the softmax, the merge."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import Run, masked_softmax, split_tap, tap_inputs
from ..program import Program
from .gradients import F64
from .problem import Guess, Problem, other_weights


def c_attn(problem: Problem, layer: int, forward: bool) -> Iterator[Guess]:
    p = problem.program
    name = f"h.{layer}.attn.c_attn"
    taps = [f"h.{layer}.attn.{x}" for x in "qkv"]
    H, D = p.config.n_head, p.config.head_size
    weight, bias = p.weights(f"{name}.weight", F64), p.weights(f"{name}.bias", F64)
    C = len(weight)

    def columns(order: Array) -> dict[str, Array]:
        return {f"{name}.weight": weight[:, order], f"{name}.bias": bias[order]}

    grid = np.arange(3 * H * D).reshape(3, H, D)
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            first = next(i for i in range(3) if order[i] != i)
            names = ", ".join("qkv"[i] for i in order)
            yield Guess(
                "qkv_order",
                taps[first],
                f"c_attn's thirds in the order {names}",
                weights=columns(grid[list(order)].ravel()),
            )
    index = grid.ravel()
    for text, order_in in (
        ("(H, 3, D)", index.reshape(H, 3, D).transpose(1, 0, 2)),
        ("(H, D, 3)", index.reshape(H, D, 3).transpose(2, 0, 1)),
        ("(3, D, H)", index.reshape(3, D, H).transpose(0, 2, 1)),
        ("(D, 3, H)", index.reshape(D, 3, H).transpose(1, 2, 0)),
        ("(D, H, 3)", index.reshape(D, H, 3).transpose(2, 1, 0)),
    ):
        there = order_in.ravel()
        back = np.argsort(there)
        for order_of, words in ((there, f"{text} read as (3, H, D)"), (back, f"(3, H, D) read as {text}")):
            yield Guess("head_split", taps[0], f"head split interleaved: {words}", weights=columns(order_of))
    for which in [(0,), (1,), (2,), (0, 1, 2)]:
        if C == H * D:
            new = weight.copy()
            for w in which:
                new[:, w * C : (w + 1) * C] = weight[:, w * C : (w + 1) * C].T
            letters = "".join("qkv"[w] for w in which)
            yield Guess(
                "transposed",
                taps[which[0]],
                f"{name}.weight: the {letters} part is transposed",
                weights={f"{name}.weight": new},
            )
    for flipped in (weight.reshape(3 * H * D, C).T, weight.T.reshape(C, 3 * H * D)):
        yield Guess(
            "transposed",
            taps[0],
            f"{name}.weight is read as ({3 * H * D}, {C}) transposed",
            weights={f"{name}.weight": flipped},
        )

    def unmoved(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        value = p.run(tap, call, x, dtype)  # (B, H, T, D)
        return value.transpose(0, 2, 1, 3).reshape(value.shape)

    if forward and problem.call.input_ids.shape[1] > 1:
        text = "(B, T, HD) reshaped to (B, H, T, D) without transposing"
        yield Guess("head_split", taps[0], text, runs=dict.fromkeys(taps, unmoved))
    for heads, which, first in _head_orders(problem, layer):
        swapped = grid.copy()
        for w in which:
            swapped[w] = grid[w][heads]
        moved = [i for i in range(H) if heads[i] != i]
        letters = ", ".join("qkv"[w] for w in which)
        yield Guess(
            "swapped_heads", taps[first], f"heads {' and '.join(map(str, moved))} of {letters} are swapped",
            weights=columns(swapped.ravel()),
        )  # fmt: skip
    others = [f"h.{i}.attn.c_attn" for i in range(p.config.n_layer) if i != layer]
    first_tap = next((t for t in taps if t in problem.suspects), taps[0])
    yield from other_weights(problem, first_tap, name, others, forward)
    for w, tap in enumerate(taps):
        part = slice(w * H * D, (w + 1) * H * D)
        if bias[part].any():
            changed = bias.copy()
            changed[part] = 0
            yield Guess(
                "missing_bias", tap, f"the {'qkv'[w]} part of {name}.bias is missing", weights={f"{name}.bias": changed}
            )


def _head_orders(problem: Problem, layer: int) -> Iterator[tuple[list[int], tuple[int, ...], int]]:
    """Orders of heads that q, k, v may have been swapped into: (order, which of q, k, v, first of them).

    Where k, v (or q) are observed, their heads are matched directly; q alone is tried pair by pair.
    """
    H = problem.program.config.n_head
    same = list(range(H))
    found: dict[int, list[int]] = {}
    for w, letter in enumerate("qkv"):
        tap = f"h.{layer}.attn.{letter}"
        if tap in problem.observed:
            target, value = problem.observed[tap], problem.values[tap]  # (B, H, T, D)
            if not (np.isfinite(target).all() and np.isfinite(value).all()):
                return
            cost = np.array([[float(np.square(target[:, a] - value[:, b]).mean()) for b in same] for a in same])
            order = [int(i) for i in cost.argmin(axis=1)]
            if sorted(order) == same and order != same:
                found[w] = order
    for w, order in found.items():
        yield order, (w,), w
    for orders in {tuple(o) for o in found.values()}:
        fitting = tuple(w for w in found if found[w] == list(orders))
        yield list(orders), fitting, fitting[0]
        if 0 not in found:
            yield list(orders), (0, *fitting), 0
    if not found:
        for a, b in combinations(same, 2):
            order = same.copy()
            order[a], order[b] = b, a
            for which in ((0,), (0, 1, 2), (1, 2), (1,), (2,), (0, 1)):
                if not any(f"h.{layer}.attn.{'qkv'[w]}" in problem.observed for w in which):
                    yield order, which, which[0]


def scale(problem: Problem, tap: str) -> Iterator[Guess]:
    p = problem.program
    layer = split_tap(tap)[0]
    assert layer is not None
    now, D = p.config.layer_scale(layer), p.config.head_size
    right = 1 / math.sqrt(D)

    def factor(value: float) -> Run:
        return lambda q, call, name, x, dtype: np.asarray(p.run(name, call, x, dtype) * (value / now))

    candidates = {
        "1/sqrt(D)": right, "missing": 1.0, "applied twice (1/D)": right * right, "doubled (2/sqrt(D))": 2 * right,
        "halved (0.5/sqrt(D))": right / 2, "1/sqrt(C)": 1 / math.sqrt(p.config.n_embd), "sqrt(D)": math.sqrt(D),
        "1/D^0.25": D**-0.25, f"1/sqrt(D)/{layer + 1} (by layer)": right / (layer + 1),
        "4/sqrt(D)": 4 * right, "0.25/sqrt(D)": right / 4,
        "another layer's": p.config.attn_scale or right,
    }  # fmt: skip
    for text, value in candidates.items():
        if not math.isclose(value, now, rel_tol=1e-4):
            words = f"the scale of the scores is {now:.5g}, not {value:.5g}: {text}"
            yield Guess("scale", tap, words, runs={tap: factor(value)})


def mask(problem: Problem, tap: str) -> Iterator[Guess]:
    """Masks by what MaskRule can say of them: which keys are forbidden, and what their scores become."""
    config = problem.program.config
    now, call = config.mask, problem.call

    def masked(**change: Any) -> Run:
        other = replace(config, mask=replace(now, **change))

        return lambda p, call, name, x, dtype: masked_softmax(x[0], other, call.attention_mask)

    def keys(shift: int) -> str:
        return "query i sees keys up to i" + (f" {'+-'[shift < 0]} {abs(shift)}" if shift else "")

    S = call.start + call.input_ids.shape[1]
    for shift in (0, 1, -1, 2):
        if shift != now.shift or now.kind == "none":
            cause = "mask_missing" if now.kind == "none" else "mask_shift"
            text = f"mask off by {abs(shift - now.shift)}: {keys(shift)}, not {keys(now.shift)}"
            change = {"kind": "replaced", "value": -1e4} if now.kind == "none" else {}
            yield Guess(cause, tap, text, runs={tap: masked(shift=shift, **change)})
    yield Guess("mask_missing", tap, "no causal mask at all", runs={tap: masked(kind="none", shift=S)})
    values: list[tuple[float, str]] = [
        (v, k) for v in (-1e4, -1.0, -2.0, -5.0, -10.0, -20.0, -50.0, -100.0, -1e3) for k in ("replaced", "added")
    ]
    for value, kind in [*values, (0.0, "replaced"), *_fitted_mask(problem, tap)]:
        if (value, kind) != (now.value, now.kind):
            text = f"mask value: {now.value:.5g} {now.kind}, not {value:.5g} {kind}"
            yield Guess("mask_value", tap, text, runs={tap: masked(value=value, kind=kind)})


def other_softmax(problem: Problem, tap: str) -> Iterator[Guess]:
    """Softmaxes that are none, and masks that MaskRule has no words for: the probabilities show both."""
    scores = problem.values.get(source := tap_inputs(tap, problem.program.config)[0], problem.given.get(source))
    probs = problem.observed[tap]
    if scores is None or not np.isfinite(scores).all():
        return
    T, S = scores.shape[-2:]
    causal = np.arange(S) <= np.arange(S - T, S)[:, None]
    allowed = np.where(causal, scores, -np.inf)
    exps = np.exp(allowed - allowed.max(axis=-1, keepdims=True))
    columns = np.exp(allowed - np.maximum(allowed.max(axis=-2, keepdims=True), np.finfo(np.float64).min))
    unmasked = np.exp(scores - scores.max(axis=-1, keepdims=True))

    def instead(value: Array) -> dict[str, Run]:
        return {tap: lambda p, call, name, x, dtype: value}

    yield Guess("softmax_form", tap, "exp without the division by the sum", runs=instead(exps))
    yield Guess("softmax_form", tap, "softmax over the queries, not over the keys",
                runs=instead(columns / np.maximum(columns.sum(axis=-2, keepdims=True), 1e-300)))  # fmt: skip
    yield Guess("softmax_form", tap, "masked after the softmax: the rows do not sum to 1",
                runs=instead(np.where(causal, unmasked / unmasked.sum(axis=-1, keepdims=True), 0)))  # fmt: skip
    seen = np.asarray(np.greater(probs, 0).any(axis=(0, 1)))  # (T, S): keys that some head looks at
    different = np.flatnonzero(np.not_equal(seen, causal).any(axis=-1))
    if len(different) and seen.any(axis=-1).all():
        rows = []
        for row in sorted({int(different[0]), int(different[-1])}):
            keys = np.flatnonzero(seen[row])
            some = "some of " if len(keys) <= keys[-1] - keys[0] else ""
            rows.append(f"query {row} sees {some}keys {keys[0]} to {keys[-1]}, not 0 to {row + S - T}")
        exps = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(axis=-1, keepdims=True)), 0)
        text = f"another mask: {'; '.join(rows)}"
        yield Guess("mask_shape", tap, text, runs=instead(exps / exps.sum(axis=-1, keepdims=True)))


def _fitted_mask(problem: Problem, tap: str) -> list[tuple[float, str]]:
    """The mask value that observed probabilities imply: log p - score is one constant per row, up to it."""
    if tap not in problem.observed:
        return []
    probs, scores = problem.observed[tap], problem.values[tap_inputs(tap, problem.program.config)[0]]
    T, S = scores.shape[-2:]
    forbidden = np.arange(S) > np.arange(S - T, S)[:, None]
    forbidden = np.broadcast_to(forbidden, probs.shape) & (probs > 1e-30)
    if not forbidden.any():
        return []
    with np.errstate(divide="ignore"):
        log = np.log(probs)
    diagonal = np.arange(S - T, S)[None, None, :, None]
    own = np.take_along_axis(log - scores, np.broadcast_to(diagonal, (*probs.shape[:3], 1)), axis=-1)
    effective = (log - own)[forbidden]
    added = effective - scores[forbidden]
    fitted = [(float(np.median(effective)), "replaced"), (float(np.median(added)), "added")]
    return [(value, kind) for value, kind in fitted if abs(value) > 1e-3]


def merge(problem: Problem, tap: str) -> Iterator[Guess]:
    H, D = problem.program.config.n_head, problem.program.config.head_size

    def unmoved(p: Program, call: Call, name: str, x: list[Array], dtype: Any) -> Array:
        merged = problem.program.run(name, call, x, dtype)  # (B, T, HD)
        B, T, _ = merged.shape
        return merged.reshape(B, T, H, D).transpose(0, 2, 1, 3).reshape(B, T, H * D)

    yield Guess("head_split", tap, "(B, H, T, D) reshaped to (B, T, HD) without transposing", runs={tap: unmoved})

    def ordered(order: Array) -> Run:
        return lambda p, call, name, x, dtype: problem.program.run(name, call, x, dtype)[..., order]

    grid = np.arange(H * D).reshape(H, D)
    yield Guess("head_split", tap, "heads merged as (D, H)", runs={tap: ordered(grid.T.ravel())})
    yield Guess("head_split", tap, "heads merged from (D, H)", runs={tap: ordered(np.argsort(grid.T.ravel()))})
    for a, b in combinations(range(H), 2):
        order = grid.copy()
        order[[a, b]] = order[[b, a]]
        yield Guess("swapped_heads", tap, f"heads {a} and {b} are swapped", runs={tap: ordered(order.ravel())})
