""" "Did you mean": the usual mistakes of porting a transformer, tried one by one.

A `Problem` holds values that are trusted (`given`), values that should come out (`observed`), and the
operations between them. A `Guess` changes the program at one of these operations; how much of the error it
removes says how well it explains it. The same machinery serves both questions:

- the program under test is wrong and good outputs were recorded: which change makes it right?
- the program is right and another party's operation differs: which mistake reproduces what that party did?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

import numpy as np

from .. import reference
from ..weights import Array
from .gradients import F64, Gradients
from .metrics import difference
from .operations import Call, Program, Run, embed_at, mask_of, split_tap, tap_inputs, tap_names

EXACT = 0.97  # share of the error removed from which on a guess counts as the explanation
CERTAIN = 0.96  # rank of what the file itself shows (two layers with one weight) though it cannot be undone


@dataclass
class Guess:
    """One possible mistake, as a change to a program."""

    cause: str  # a stable identifier, for tools
    tap: str  # the first tap that it changes
    text: str  # for people
    weights: dict[str, Array] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    removed: float = -math.inf  # share of the error that it removes: 1 explains all of it
    evidence: str = ""  # what the file itself shows for it

    def applied(self, program: Program) -> Program:
        return program.with_(self.weights, self.runs, **self.config)

    def as_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("cause", "tap", "text", "removed", "evidence")}


class Problem:
    """Operations whose inputs are known and some of whose results are."""

    def __init__(
        self,
        program: Program,
        call: Call,
        given: Mapping[str, Array],
        observed: Mapping[str, Array],
        suspects: Sequence[str],
    ) -> None:
        self.program, self.call = program, call
        self.given = {tap: value.astype(np.float64) for tap, value in given.items()}
        self.observed = {tap: value.astype(np.float64) for tap, value in observed.items()}
        self.suspects = list(suspects)
        names = tap_names(program.config)
        last = max(names.index(tap) for tap in observed)
        needed: set[str] = set()
        pending = list(observed)
        while pending:
            tap = pending.pop()
            if tap not in needed:
                needed.add(tap)
                pending += [i for i in tap_inputs(tap, program.config) if i not in self.given]
        self.taps = [tap for tap in names[: last + 1] if tap in needed]
        self.values = dict(self.given)
        self.before = self.error(program, record=True)

    def error(self, program: Program, first: str | None = None, record: bool = False) -> float:
        """Relative rms over all observed taps; operations before `first` are those of the base program."""
        start = self.taps.index(first) if first in self.taps else 0
        known = self.values if record else {**self.given, **{t: self.values[t] for t in self.taps[:start]}}
        total = 0.0
        for tap in self.taps[0 if record else start :]:
            inputs = [self.given.get(i, known.get(i)) for i in tap_inputs(tap, program.config)]
            known[tap] = program.run(tap, self.call, inputs, F64)  # type: ignore[arg-type]
        for tap, target in self.observed.items():
            with np.errstate(over="ignore"):
                distance = float(np.mean(np.square(difference(known[tap], target))))
                total += distance / max(float(np.mean(np.square(np.nan_to_num(target)))), 1e-300)
        return math.sqrt(total / max(len(self.observed), 1))

    def judge(self, guess: Guess) -> Guess:
        """Fill in how much of the error the guess removes."""
        after = self.error(guess.applied(self.program), guess.tap)
        guess.removed = 1 - after / self.before if self.before > 0 and math.isfinite(after) else -math.inf
        return guess

    def residuals(self) -> dict[str, Array]:
        """observed - computed, each scaled as `error` weighs it."""
        out = {}
        for tap, target in self.observed.items():
            weight = 1 / max(float(np.sqrt(np.mean(np.square(target)) * target.size)), 1e-300)
            out[tap] = (target - self.values[tap]) * weight
        return out


def rank(problem: Problem, forward: bool, keep: int = 5) -> list[Guess]:
    """The best explanations, best first.

    forward: the program is right and a mistake is to be reproduced; otherwise it is wrong and to be undone.
    """
    guesses: list[Guess] = []
    if problem.before > 0 and math.isfinite(problem.before):
        for tap in problem.suspects:
            for guess in catalogue(problem, tap, forward):
                guesses.append(problem.judge(guess))
        guesses += fits(problem, forward)
    evidence = [] if forward else shown_by_the_file(problem)
    if evidence:
        exact = max((g.removed for g in guesses), default=-math.inf) >= EXACT
        for found in evidence:
            found.removed = max(found.removed, 0.0 if exact else CERTAIN)
        guesses += evidence
    best: dict[tuple[str, str], Guess] = {}
    for guess in sorted(guesses, key=lambda g: -g.removed):
        best.setdefault((guess.cause, guess.tap), guess)
    return [g for g in best.values() if g.removed > 0.05][:keep]


# ---------------------------------------------------------------- the catalogue of usual mistakes


def catalogue(problem: Problem, tap: str, forward: bool) -> Iterator[Guess]:
    """Mistakes whose right (or wrong) form is known, at one operation."""
    layer, part = split_tap(tap)
    if part == "embed":
        yield from _embedding(problem)
    elif part in ("ln_1", "ln_2", "ln_f"):
        yield from _layer_norm(problem, tap, forward)
    elif part in ("attn.q", "attn.k", "attn.v"):
        # the three share one matrix: they are tried together, at the first of them that is suspected
        group = [f"h.{layer}.attn.{x}" for x in "qkv"]
        if tap == next(t for t in group if t in problem.suspects):
            yield from _c_attn(problem, layer, forward)  # type: ignore[arg-type]
    elif part == "attn.scores":
        yield from _scale(problem, tap)
    elif part == "attn.probs":
        yield from _mask(problem, tap)
    elif part == "attn.heads":
        yield from _merge(problem, tap)
    elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
        yield from _linear(problem, tap, tap.replace(".out", ".c_proj"), forward)
    elif part == "mlp.gelu":
        now = problem.program.config.layer_activation(layer)  # type: ignore[arg-type]
        for form in reference.ACTIVATIONS:
            if form != now:
                yield Guess(
                    "gelu_form", tap, f"GELU form: {_swap_text(form, now, forward)}", runs={tap: _activation(form)}
                )
    elif part in ("resid_mid", "resid_post"):
        yield Guess("missing_residual", tap, "the residual is not added", runs={tap: _without_residual})
    elif part == "logits":
        yield from _head(problem, forward)


def _swap_text(other: object, now: object, forward: bool) -> str:
    wrong, right = (other, now) if forward else (now, other)
    return f"{wrong} instead of {right}"


def _activation(form: str) -> Run:
    return lambda p, call, tap, x, dtype: reference.ACTIVATIONS[form](x[0])


def _without_residual(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
    return x[1]


def _embedding(problem: Problem) -> Iterator[Guess]:
    N = problem.program.config.n_ctx

    def moved(by: int) -> Run:
        def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            return embed_at(p, call, (call.position_ids + by) % N, dtype)

        return run

    def without(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        return p.weights("wte.weight", dtype)[call.input_ids].astype(dtype)

    for by in (1, -1, 2, -2):
        yield Guess("position_offset", "embed", f"positions are off by {abs(by)}", runs={"embed": moved(by)})
    start = problem.call.start
    if start:
        yield Guess(
            "position_offset",
            "embed",
            "positions start again at 0 after the cached ones",
            runs={"embed": moved(-start)},
        )
    yield Guess("missing_positions", "embed", "the position embedding is not added", runs={"embed": without})


def _layer_norm(problem: Problem, tap: str, forward: bool) -> Iterator[Guess]:
    p = problem.program
    now = p.config.epsilon(tap)

    def form(eps: float, outside: bool = False, ddof: int = 0, centre: bool = True) -> Run:
        def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            weight, bias, _ = p.norm(tap, dtype)
            centred = x[0] - x[0].mean(axis=-1, keepdims=True) if centre else x[0]
            variance = (centred * centred).sum(axis=-1, keepdims=True) / (x[0].shape[-1] - ddof)
            root = np.sqrt(variance) + eps if outside else np.sqrt(variance + eps)
            return np.asarray(centred / root * weight + bias)

        return run

    others = {p.config.epsilon(n) for n in norm_names(p)} | {p.config.layer_norm_epsilon}
    candidates = sorted({1e-5, 1e-6, 1e-8, 1e-12, 1e-4, 1e-3, 1e-2, 0.1, 0.0} | others)
    for eps in candidates:
        if not math.isclose(eps, now, rel_tol=1e-3):
            text = f"epsilon {_swap_text(f'{eps:g}', f'{now:g}', forward)}"
            yield Guess("epsilon_value", tap, text, runs={tap: form(eps)})
    for eps in sorted({now, 1e-5, *candidates[1:]}):
        yield Guess("epsilon_outside", tap, f"epsilon {eps:g} outside the root", runs={tap: form(eps, outside=True)})
    yield Guess("ddof", tap, "variance divided by C - 1 instead of C (ddof 1)", runs={tap: form(now, ddof=1)})
    yield Guess("no_centring", tap, "the mean is not taken off (RMS norm)", runs={tap: form(now, centre=False)})
    yield Guess(
        "missing_weight", tap, f"{tap}.weight is not applied",
        weights={f"{tap}.weight": np.ones(p.config.n_embd)},
    )  # fmt: skip
    yield from _other_weights(problem, tap, tap, [n for n in norm_names(p) if n != tap], forward)


def norm_names(p: Program) -> list[str]:
    """Every layer norm of the model."""
    return [f"h.{i}.{n}" for i in range(p.config.n_layer) for n in ("ln_1", "ln_2")] + ["ln_f"]


def _other_weights(problem: Problem, tap: str, name: str, others: list[str], forward: bool) -> Iterator[Guess]:
    """Missing bias, another layer's weights, rounding: what can happen to the weight and bias of any map."""
    w = problem.program.weights
    for other in others:
        both = {f"{name}.{kind}": w(f"{other}.{kind}", F64) for kind in ("weight", "bias")}
        yield Guess("other_layer", tap, f"weight and bias of {other} in place of {name}'s", weights=both)
        for kind in ("weight", "bias"):
            one = {f"{name}.{kind}": both[f"{name}.{kind}"]}
            yield Guess("other_layer", tap, f"{other}.{kind} in place of {name}.{kind}", weights=one)
    bias = w(f"{name}.bias", F64)
    if bias.any():
        yield Guess("missing_bias", tap, f"{name}.bias is missing", weights={f"{name}.bias": np.zeros_like(bias)})
    if forward:
        yield from _rounded(problem, tap, name)


def rounded(x: Array, kind: str) -> Array:
    """x as a 16-bit float can hold it, in float64."""
    import ml_dtypes

    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(ml_dtypes.bfloat16 if kind == "bf16" else np.float16).astype(np.float64)


def _rounded(problem: Problem, tap: str, name: str) -> Iterator[Guess]:
    p = problem.program
    for kind in ("bf16", "fp16"):
        weight, bias = p.weights(f"{name}.weight", F64), p.weights(f"{name}.bias", F64)
        yield Guess(
            "rounding", tap, f"{name}'s weights are rounded to {kind}",
            weights={f"{name}.weight": rounded(weight, kind), f"{name}.bias": rounded(bias, kind)},
        )  # fmt: skip
        yield Guess(
            "rounding", tap, f"{name}.weight is rounded to {kind}", weights={f"{name}.weight": rounded(weight, kind)}
        )
        yield Guess("rounding", tap, f"the result is rounded to {kind}", runs={tap: _rounded_result(p, tap, kind)})
        yield Guess("rounding", tap, f"the inputs are rounded to {kind}", runs={tap: _rounded_inputs(p, tap, kind)})


def _rounded_result(p: Program, tap: str, kind: str) -> Run:
    return lambda q, call, name, x, dtype: rounded(p.run(name, call, x, dtype), kind)


def _rounded_inputs(p: Program, tap: str, kind: str) -> Run:
    return lambda q, call, name, x, dtype: p.run(name, call, [rounded(v, kind) for v in x], dtype)


def _linear(problem: Problem, tap: str, name: str, forward: bool) -> Iterator[Guess]:
    p = problem.program
    layer, part = split_tap(tap)
    key = f"{name}.weight"
    weight = p.weights(key, F64)
    rows, columns = weight.shape
    if rows == columns:
        yield Guess("transposed", tap, f"{key} is transposed", weights={key: weight.T})
    else:
        for flipped in (weight.reshape(columns, rows).T, weight.T.reshape(rows, columns)):
            yield Guess("transposed", tap, f"{key} is read as ({columns}, {rows}) transposed", weights={key: flipped})
    if part == "attn.out":
        H = p.config.n_head
        heads = weight.reshape(H, rows // H, columns)
        for a, b in combinations(range(H), 2):
            order = list(range(H))
            order[a], order[b] = b, a
            yield Guess(
                "swapped_heads", tap, f"{key}: heads {a} and {b} are swapped",
                weights={key: heads[order].reshape(rows, columns)},
            )  # fmt: skip
        for text, mixed in (
            ("(D, H) instead of (H, D)", heads.transpose(1, 0, 2)),
            ("(H, D) instead of (D, H)", weight.reshape(rows // H, H, columns).transpose(1, 0, 2)),
        ):
            yield Guess("head_split", tap, f"{key}: rows ordered {text}", weights={key: mixed.reshape(rows, columns)})
    stem = name.split(".", 2)[2]
    others = [f"h.{i}.{stem}" for i in range(p.config.n_layer) if i != layer]
    yield from _other_weights(problem, tap, name, others, forward)


def _c_attn(problem: Problem, layer: int, forward: bool) -> Iterator[Guess]:
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
    for heads, which, first in _head_orders(problem, layer):
        order = grid.copy()
        for w in which:
            order[w] = grid[w][heads]
        moved = [i for i in range(H) if heads[i] != i]
        letters = ", ".join("qkv"[w] for w in which)
        yield Guess(
            "swapped_heads", taps[first], f"heads {' and '.join(map(str, moved))} of {letters} are swapped",
            weights=columns(order.ravel()),
        )  # fmt: skip
    others = [f"h.{i}.attn.c_attn" for i in range(p.config.n_layer) if i != layer]
    first_tap = next((t for t in taps if t in problem.suspects), taps[0])
    yield from _other_weights(problem, first_tap, name, others, forward)
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


def _scale(problem: Problem, tap: str) -> Iterator[Guess]:
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


def _mask(problem: Problem, tap: str) -> Iterator[Guess]:
    p, call = problem.program, problem.call

    def allowed_of(scores: Array, shift: int) -> Array:
        T, S = scores.shape[-2:]
        return np.arange(S) <= np.arange(S - T, S)[:, None] + shift

    def run_with(shift: int, value: float, replaces: bool) -> Run:
        def run(q: Program, call: Call, name: str, x: list[Array], dtype: Any) -> Array:
            allowed = allowed_of(x[0], shift)
            if call.mask is not None and shift == 0:
                allowed = np.isfinite(mask_of(call, x[0])) & (mask_of(call, x[0]) > -1e30)
            elif call.mask is not None:  # padding stays hidden: keys that no row of the call may see
                seen = (mask_of(call, x[0]) > -1e30).any(axis=-2, keepdims=True)
                allowed = allowed & seen
            low = np.asarray(value, dtype)
            masked = np.where(allowed, x[0], low if replaces else x[0] + low)
            blind = ~np.isfinite(masked).any(axis=-1, keepdims=True)
            return reference.softmax(np.where(blind, np.asarray(-1e4, dtype), masked))

        return run

    for shift in (0, 1, -1, 2):
        words = (
            "the causal mask" if shift == 0 else f"query i sees keys up to i {'+' if shift > 0 else '-'} {abs(shift)}"
        )
        yield Guess(
            "mask_shift" if shift else "mask_value", tap, f"mask: {words}", runs={tap: run_with(shift, -math.inf, True)}
        )
        if shift < 0:
            yield Guess("mask_shift", tap, f"mask: {words}", runs={tap: run_with(shift, -1e4, True)})
    yield Guess("mask_missing", tap, "no causal mask at all", runs={tap: run_with(0, 0.0, False)})
    values = {-1.0, -2.0, -5.0, -10.0, -20.0, -50.0, -100.0, -1000.0, 0.0, float(p.config.mask_value)}
    for value, replaces in [(v, r) for v in sorted(values) for r in (True, False)] + _fitted_mask(problem, tap):
        how = "replaced by" if replaces else "added"
        yield Guess(
            "mask_value",
            tap,
            f"forbidden scores: {value:.5g} {how}, not -inf",
            runs={tap: run_with(0, value, replaces)},
        )


def _fitted_mask(problem: Problem, tap: str) -> list[tuple[float, bool]]:
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
    return [(float(np.median(effective)), True), (float(np.median(added)), False)]


def _merge(problem: Problem, tap: str) -> Iterator[Guess]:
    H, D = problem.program.config.n_head, problem.program.config.head_size

    def ordered(order: Array) -> Run:
        return lambda p, call, name, x, dtype: problem.program.run(name, call, x, dtype)[..., order]

    grid = np.arange(H * D).reshape(H, D)
    yield Guess("head_split", tap, "heads merged as (D, H)", runs={tap: ordered(grid.T.ravel())})
    yield Guess("head_split", tap, "heads merged from (D, H)", runs={tap: ordered(np.argsort(grid.T.ravel()))})
    for a, b in combinations(range(H), 2):
        order = grid.copy()
        order[[a, b]] = order[[b, a]]
        yield Guess("swapped_heads", tap, f"heads {a} and {b} are swapped", runs={tap: ordered(order.ravel())})


def _head(problem: Problem, forward: bool) -> Iterator[Guess]:
    p = problem.program
    key = p.head
    if not p.config.tied:
        wte = p.weights("wte.weight", F64)
        yield Guess("untied_head", "logits", "the head is not wte (untied)", weights={key: wte})
    if forward:
        head = p.weights(key, F64)
        for kind in ("bf16", "fp16"):
            yield Guess(
                "rounding", "logits", f"the head's weights are rounded to {kind}", weights={key: rounded(head, kind)}
            )


# ---------------------------------------------------------------- what has to be solved for


def fits(problem: Problem, forward: bool) -> list[Guess]:
    """Mistakes with an unknown number in them: one wrong element, a bias that is not there."""
    found: list[Guess] = []
    if all(np.isfinite(v).all() for v in problem.values.values()):
        found += single_elements(problem)
        if not forward:
            found += absent_biases(problem)
    return found


def tap_of_weight(problem: Problem, name: str, index: tuple[int, ...]) -> str | None:
    """The first suspected tap that one element of a weight changes."""
    layer, stem = (name.split(".", 2)[1], name.split(".", 2)[2]) if name.startswith("h.") else (None, name)
    stem = stem.rsplit(".", 1)[0]
    if layer is None:
        if stem == "wpe":
            taps = ["embed"]
        elif stem == "wte":
            used = bool((problem.call.input_ids == index[0]).any())
            taps = ["embed"] if used else ["logits"]
        else:
            taps = ["ln_f" if stem == "ln_f" else "logits"]
    elif stem == "attn.c_attn":
        width = problem.program.config.n_head * problem.program.config.head_size
        taps = [f"h.{layer}.attn.{'qkv'[index[-1] // width]}"]
    else:
        taps = [f"h.{layer}.{stem.replace('c_proj', 'out')}"]
    return taps[0] if taps[0] in problem.suspects else None


def single_elements(problem: Problem, probes: int = 16, verify: int = 24) -> list[Guess]:
    """The single weight element whose change would explain the error best.

    To first order, changing element j by d changes the outputs by J_j d. The error that the best d removes is
    (J_j . e)^2 / |J_j|^2: the numerator for all elements comes from one backward pass over the error e, the
    denominator from backward passes over random vectors r, as the mean of (J_j . r)^2. The most promising ones
    are then solved exactly.
    """
    program = problem.program
    back = Gradients(program, problem.call, problem.values, problem.taps)
    error = problem.residuals()
    numerator = back(error)
    weights = {
        tap: 1 / max(float(np.sqrt(np.mean(np.square(t)) * t.size)), 1e-300) for tap, t in problem.observed.items()
    }
    rng = np.random.default_rng(0)
    norms: dict[str, Array] = {name: np.zeros_like(g) for name, g in numerator.items()}
    for _ in range(probes):
        noise = {tap: rng.standard_normal(t.shape) * weights[tap] for tap, t in problem.observed.items()}
        for name, g in back(noise).items():
            norms[name] += g * g / probes
    candidates: list[tuple[float, str, tuple[int, ...], float]] = []
    for name, g in numerator.items():
        floor = float(np.median(norms[name][norms[name] > 0])) * 0.05 if (norms[name] > 0).any() else 1.0
        score = g * g / (norms[name] + floor)
        for flat in np.argpartition(-score.ravel(), min(7, score.size - 1))[:8]:
            index = tuple(int(i) for i in np.unravel_index(int(flat), score.shape))
            step = float(g[index] / (norms[name][index] + floor))
            candidates.append((float(score[index]), name, index, step))
        # an element far out of its matrix's range is a suspect in itself: large errors are not linear
        value = program.weights(name, F64).astype(np.float64)
        spread = float(np.median(np.abs(value - np.median(value)))) / 0.6745 or 1.0
        extreme = tuple(int(i) for i in np.unravel_index(int(np.abs(value - np.median(value)).argmax()), value.shape))
        if abs(value[extreme] - np.median(value)) > 8 * spread:
            candidates.append((math.inf, name, extreme, float(np.median(value)) - float(value[extreme])))
    candidates.sort(key=lambda c: -c[0])
    found: list[Guess] = []
    for _, name, index, step in candidates[:verify]:
        tap = tap_of_weight(problem, name, index)
        if tap is not None:
            found.append(solve_element(problem, name, index, step, tap))
    found.sort(key=lambda g: -g.removed)
    return found[:3]


def solve_element(problem: Problem, name: str, index: tuple[int, ...], step: float, tap: str) -> Guess:
    """The value of one element that removes most of the error, by Gauss-Newton steps on that number alone."""
    base = problem.program.weights(name, F64).astype(np.float64)
    program = problem.program
    weights = {t: 1 / max(float(np.sqrt(np.mean(np.square(v)) * v.size)), 1e-300) for t, v in problem.observed.items()}

    def outputs(value: float) -> Array:
        changed = base.copy()
        changed[index] = value
        known = dict(problem.given)
        start = problem.taps.index(tap)
        known.update({t: problem.values[t] for t in problem.taps[:start]})
        p = program.with_({name: changed})
        for t in problem.taps[start:]:
            known[t] = p.run(
                t, problem.call, [problem.given.get(i, known.get(i)) for i in tap_inputs(t, p.config)], F64
            )  # type: ignore[misc]
        return np.concatenate([(problem.observed[t] - known[t]).ravel() * weights[t] for t in problem.observed])

    old = float(base[index])
    value = old + step
    best, best_value = float(np.square(outputs(old)).sum()), old
    for _ in range(8):
        e = outputs(value)
        size = float(np.square(e).sum())
        if not math.isfinite(size):
            break
        if size < best:
            best, best_value = size, value
        h = 1e-4 * max(abs(value), 1e-2)
        slope = (outputs(value + h) - e) / h
        bottom = float(np.square(slope).sum())
        if bottom == 0 or not math.isfinite(bottom):
            break
        move = -float((slope * e).sum()) / bottom
        if abs(move) < 1e-9 * max(abs(value), 1e-3):
            break
        value += move
    changed = base.copy()
    changed[index] = best_value
    place = "[" + ", ".join(map(str, index)) + "]"
    text = f"one element of {name}: {place} is {old:.6g}, where {best_value:.6g} fits"
    return problem.judge(Guess("corrupted_element", tap, text, weights={name: changed}))


def absent_biases(problem: Problem) -> list[Guess]:
    """For each bias that is all zeros among others that are not: would a bias remove the error?"""
    found = []
    for name, tap in suspect_biases(problem):
        bias = problem.program.weights(name, F64)
        if not bias.any():
            found.append(solve_bias(problem, name, tap))
    H, D = problem.program.config.n_head, problem.program.config.head_size
    for tap in problem.suspects:
        layer, part = split_tap(tap)
        if part in ("attn.q", "attn.k", "attn.v"):
            w = "qkv".index(part[-1])
            name = f"h.{layer}.attn.c_attn.bias"
            bias = problem.program.weights(name, F64)
            if bias.any() and not bias[w * H * D : (w + 1) * H * D].any():
                found.append(solve_bias(problem, name, tap))
    return found


def suspect_biases(problem: Problem) -> Iterator[tuple[str, str]]:
    """Name of each bias that a suspected tap adds, with that tap; c_attn's once, at its first tap."""
    seen = set()
    for tap in problem.suspects:
        _, part = split_tap(tap)
        if part in ("ln_1", "ln_2", "ln_f"):
            name = f"{tap}.bias"
        elif part in ("attn.q", "attn.k", "attn.v"):
            name = f"{tap[:-2]}.c_attn.bias"
        elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
            name = f"{tap.replace('.out', '.c_proj')}.bias"
        else:
            continue
        if name not in seen:
            seen.add(name)
            yield name, tap


def solve_bias(problem: Problem, name: str, tap: str, rounds: int = 4, steps: int = 40) -> Guess:
    """The bias that removes most of the error: Gauss-Newton, each step by conjugate gradients."""
    base = problem.program.weights(name, F64)
    current, delta = problem, np.zeros_like(base)
    for _ in range(rounds):
        program = problem.program.with_({name: base + delta})
        current = Problem(program, problem.call, problem.given, problem.observed, problem.suspects)
        if not math.isfinite(current.before) or current.before < 1e-9:
            break
        back = Gradients(program, problem.call, current.values, current.taps)
        weights = {
            t: 1 / max(float(np.sqrt(np.mean(np.square(v)) * v.size)), 1e-300) for t, v in problem.observed.items()
        }

        def forward(
            d: Array, program: Program = program, current: Problem = current, weights: dict[str, float] = weights,
            start: Array = delta,
        ) -> dict[str, Array]:  # fmt: skip
            size = float(np.abs(d).max()) or 1.0
            h = 1e-5 / size
            moved = Problem(
                program.with_({name: base + start + h * d}),
                problem.call,
                problem.given,
                problem.observed,
                problem.suspects,
            )
            return {t: (moved.values[t] - current.values[t]) / h * weights[t] for t in problem.observed}

        x = np.zeros_like(base)
        r = {t: v for t, v in current.residuals().items()}
        s = back({t: v * weights[t] for t, v in r.items()}).get(name, np.zeros_like(base))
        p, gamma = s.copy(), float((s * s).sum())
        first = gamma
        for _ in range(min(steps, base.size + 1)):
            if gamma <= 1e-16 * first or gamma == 0:
                break
            q = forward(p)
            bottom = sum(float(np.square(v).sum()) for v in q.values())
            if bottom == 0:
                break
            a = gamma / bottom
            x = x + a * p
            r = {t: r[t] - a * q[t] for t in r}
            s = back({t: v * weights[t] for t, v in r.items()})[name]
            gamma, old = float((s * s).sum()), gamma
            p = s + gamma / old * p
        delta = delta + x
    return problem.judge(
        Guess("missing_bias", tap, f"{name} is missing (all zeros); one of rms {float(np.sqrt((delta**2).mean())):.3g} fits",
              weights={name: base + delta})
    )  # fmt: skip


# ---------------------------------------------------------------- what the file itself shows


def shown_by_the_file(problem: Problem) -> list[Guess]:
    """Oddities among the suspected operations' weights that cannot be undone, only pointed at."""
    found: list[Guess] = []
    found += same_as_another_layer(problem)
    found += representable_in_16_bits(problem)
    return found


def weight_names(problem: Problem) -> Iterator[tuple[str, str]]:
    """Every weight of the suspected operations with its tap, once each."""
    seen = set()
    for tap in problem.suspects:
        _, part = split_tap(tap)
        names: list[str] = []
        if part in ("ln_1", "ln_2", "ln_f"):
            names = [f"{tap}.weight", f"{tap}.bias"]
        elif part in ("attn.q", "attn.k", "attn.v"):
            names = [f"{tap[:-2]}.c_attn.weight", f"{tap[:-2]}.c_attn.bias"]
        elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
            names = [f"{tap.replace('.out', '.c_proj')}.{kind}" for kind in ("weight", "bias")]
        elif part == "embed":
            names = ["wte.weight", "wpe.weight"]
        elif part == "logits":
            names = [problem.program.head]
        for name in names:
            if name not in seen:
                seen.add(name)
                yield name, tap


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
                found.append(Guess("other_layer", tap, words, evidence="equal in the file"))
                break
    return found


def representable_in_16_bits(problem: Problem) -> list[Guess]:
    """Weights that a 16-bit float holds exactly, in a file whose other weights it does not."""
    p = problem.program
    found = []
    for kind in ("bf16", "fp16"):
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
    ulp = np.ldexp(1.0, exponent - bits)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, value.shape) * ulp
    moved = problem.program.with_({name: value + noise})
    start = problem.taps.index(tap) if tap in problem.taps else 0
    known = {**problem.given, **{t: problem.values[t] for t in problem.taps[:start]}}
    for t in problem.taps[start:]:
        known[t] = moved.run(
            t, problem.call, [problem.given.get(i, known.get(i)) for i in tap_inputs(t, moved.config)], F64
        )  # type: ignore[misc]
    total = 0.0
    for t, target in problem.observed.items():
        total += float(np.mean(np.square(known[t] - problem.values[t]))) / max(
            float(np.mean(np.square(target))), 1e-300
        )
    made = math.sqrt(total / len(problem.observed))
    return problem.before / made if made > 0 else math.inf
