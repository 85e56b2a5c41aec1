"""The usual mistakes outside the attention: norms, linear maps, activation, residual stream, other inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np

from ...activations import ACTIVATIONS
from ...call import Call
from ...weights import Array
from ..operations import LAYER_PARTS, OPERATIONS, Run, split_tap, tap_inputs
from ..program import Program
from .gradients import F64
from .problem import Guess, Problem, afterwards, fit, norm_names, remade, together

# What an operation is fed with by mistake: (which of its inputs, the tap that it reads). "{x}" is the layer's stream.
OTHER_INPUTS: dict[str, tuple[tuple[int, str], ...]] = {
    "ln_1": ((0, "{h}.resid_mid-1"), (0, "embed")),
    "attn.q": ((0, "{x}"),), "attn.k": ((0, "{x}"),), "attn.v": ((0, "{x}"),),
    "attn.scores": ((1, "{h}.attn.v"), (0, "{h}.attn.k"), (1, "{h}.attn.q"), (0, "{h}.attn.v")),
    "attn.heads": ((1, "{h}.attn.k"), (1, "{h}.attn.q")),
    "attn.out": ((0, "{h}.ln_1"),),
    "resid_mid": ((0, "{h}.ln_1"), (0, "embed")),
    "ln_2": ((0, "{x}"), (0, "{h}.attn.out"), (0, "{h}.ln_1")),
    "mlp.c_fc": ((0, "{h}.resid_mid"), (0, "{h}.ln_1"), (0, "{x}"), (0, "{h}.attn.out")),
    "resid_post": ((0, "{h}.ln_2"), (0, "{x}"), (0, "{h}.ln_1"), (0, "embed")),
    "ln_f": ((0, "{h}.resid_mid"), (0, "{h}.mlp.out"), (0, "embed")),
    "logits": ((0, "{x}"),),
}  # fmt: skip


def other_input(problem: Problem, tap: str) -> Iterator[Guess]:
    """The operation is right and reads another tap: a norm left out, the residual taken from after the norm ..."""
    config = problem.program.config
    layer, part = split_tap(tap)
    stream = f"h.{(config.n_layer if layer is None else layer) - 1}.resid_post" if layer != 0 else "embed"
    block = f"h.{config.n_layer - 1 if layer is None else layer}"
    inputs = tap_inputs(tap, config)
    for which, name in OTHER_INPUTS.get(part, ()):
        if name.endswith("-1"):
            name = f"h.{(layer or 0) - 1}.resid_mid"
        name = name.format(h=block, x=stream)
        value = problem.given.get(name, problem.values.get(name))
        now = problem.input(tap, which)
        if value is None or now is None or name == inputs[which] or value.shape != now.shape:
            continue

        def run(p: Program, c: Call, t: str, x: list[Array], dtype: Any, i: int = which, v: Array = value) -> Array:
            return problem.program.run(t, c, [v if j == i else old for j, old in enumerate(x)], dtype)

        group = together(problem, tap)
        text = f"{' and '.join(group)} read {name}"
        yield Guess("other_input", group[0], text, inputs[which], runs=dict.fromkeys(group, run))


def activation(problem: Problem, tap: str) -> Iterator[Guess]:
    """Another activation: one of the table, none at all, or GELU by tanh with other constants."""
    layer, _ = split_tap(tap)
    now = problem.program.config.layer_activation(layer)  # type: ignore[arg-type]
    title = ACTIVATIONS[now].title

    def form(f: Callable[[Array], Array]) -> dict[str, Run]:
        return {tap: lambda p, call, name, x, dtype: f(x[0])}

    def tanh(k: float, c: float) -> Callable[[Array], Array]:
        return lambda x: 0.5 * x * (1 + np.tanh(k * (x + c * x * x * x)))

    for name, other in ACTIVATIONS.items():
        if name != now:
            yield Guess("gelu_form", tap, f"the activation were {other.title}", title, runs=form(other.function))
    yield Guess("gelu_form", tap, "there were no activation at all", title, runs=form(lambda x: x))
    once = ACTIVATIONS[now].function
    yield Guess("gelu_form", tap, "the activation were applied twice", title, runs=form(lambda x: once(once(x))))
    if now != "gelu_tanh":
        return
    right = math.sqrt(2 / math.pi)
    square = form(lambda x: 0.5 * x * (1 + np.tanh(right * (x + 0.044715 * x * x))))
    yield Guess("gelu_form", tap, "GELU had x * x in place of x * x * x in its tanh", title, runs=square)
    yield Guess(
        "gelu_form", tap, "GELU lacked its factor 0.5", title, runs=form(lambda x: 2 * tanh(right, 0.044715)(x))
    )

    def constants(k: float, c: float, fitted: int = 0) -> Guess:
        text = f"GELU were 0.5 x (1 + tanh({k:.6g} (x + {c:.6g} x^3)))"
        return Guess(
            "gelu_constant", tap, text, f"0.797885 and 0.044715 ({title})", runs=form(tanh(k, c)), fitted=fitted
        )

    for k, c in ((right, 0.44715), (right, 0.0044715), (right, 0.0447), (right, 0.04715), (right, 0.0), (0.8, 0.044715),
                 (math.sqrt(math.pi / 2), 0.044715), (2 / math.pi, 0.044715), (math.sqrt(2), 0.044715)):  # fmt: skip
        yield constants(k, c)
    x = problem.input(tap)
    if tap in problem.observed and x is not None:
        with np.errstate(all="ignore"):
            u = 2 * problem.observed[tap] / x - 1
            clear = (np.abs(u) < 0.99) & (np.abs(x) > 0.3)
        if clear.sum() > 8:
            x = x[clear]
            (k, c), *_ = np.linalg.lstsq(np.stack([x, x**3], axis=1), np.arctanh(u[clear]), rcond=None)
            if abs(c) > 1e-3 * abs(k):  # else a sigmoid, which is tried by name
                yield constants(float(k), float(c / k), 2)


def residual(problem: Problem, tap: str) -> Iterator[Guess]:
    """The addition to the stream: lost, doubled, negated, scaled."""
    what = "the attention" if tap.endswith("mid") else "the MLP"

    def sums(a: float, b: float) -> dict[str, Run]:
        return {tap: lambda p, call, name, x, dtype: a * x[0] + b * x[1]}

    layer, part = split_tap(tap)
    if part == "resid_mid":
        left_out = {t: lambda p, call, name, x, dtype: x[0] for t in (tap, f"h.{layer}.resid_post")}
        yield Guess("layer_dropped", tap, f"layer {layer} were left out", runs=left_out)
    else:
        yield Guess("layer_repeated", tap, f"layer {layer} were run twice", runs={tap: _again})
    yield Guess("missing_residual", tap, f"the residual were not added to {what}'s result", runs=sums(0, 1))
    yield Guess("missing_branch", tap, f"{what}'s result were not added", runs=sums(1, 0))
    yield Guess("residual_twice", tap, "the residual were added twice", runs=sums(2, 1))
    yield Guess("branch_twice", tap, f"{what}'s result were added twice", runs=sums(1, 2))
    L = problem.program.config.n_layer
    for words, factor in (("1/sqrt(2 L)", 1 / math.sqrt(2 * L)), ("1/sqrt(L)", 1 / math.sqrt(L)), ("1/2", 0.5),
                          ("sqrt(1/2)", math.sqrt(0.5))):  # fmt: skip
        text = f"{what}'s result were multiplied by {words}"
        yield Guess("branch_scale", tap, text, runs=sums(1, factor))
    yield Guess("residual_sign", tap, f"{what}'s result were taken off, not added", runs=sums(1, -1))
    yield Guess(
        "residual_scale", tap, "the sum were multiplied by sqrt(1/2)", runs=sums(math.sqrt(0.5), math.sqrt(0.5))
    )


def _again(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
    """A layer's result, put through the layer once more."""
    layer, _ = split_tap(tap)
    names = [f"h.{layer}.{part}" for part in LAYER_PARTS]
    known = {tap_inputs(names[0], p.config)[0]: np.asarray(x[0] + x[1])}
    for name in names:
        inputs = [known[i] for i in tap_inputs(name, p.config)]
        known[name] = OPERATIONS[split_tap(name)[1]].run(p, call, name, inputs, dtype)
    return known[tap]


def norm_run(epsilon: float | None = None, outside: bool = False, ddof: int = 0, centre: bool = True) -> Run:
    def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        weight, bias, own = p.norm(tap, dtype)
        eps = own if epsilon is None else epsilon
        centred = x[0] - x[0].mean(axis=-1, keepdims=True) if centre else x[0]
        variance = (centred * centred).sum(axis=-1, keepdims=True) / (x[0].shape[-1] - ddof)
        root = np.sqrt(variance) + eps if outside else np.sqrt(variance + eps)
        return np.asarray(centred / root * weight + bias)

    return run


def layer_norm(problem: Problem, tap: str) -> Iterator[Guess]:
    """Guesses at a layer norm: its epsilon, its variance, its form, its weights."""
    p = problem.program
    now = p.config.epsilon(tap)
    have = f"{now:g}"
    others = {p.config.epsilon(n) for n in norm_names(p)} | {p.config.layer_norm_epsilon}
    candidates = sorted({1e-5, 1e-6, 1e-8, 1e-12, 1e-4, 1e-3, 1e-2, 0.1, 0.0} | others)
    for eps in candidates:
        if not math.isclose(eps, now, rel_tol=1e-3):
            yield Guess("epsilon_value", tap, f"epsilon were {eps:g}", have, runs={tap: norm_run(eps)})
    for eps in sorted({now, 1e-5, *candidates[1:]}):
        text = f"epsilon ({eps:g}) stood outside the root"
        yield Guess("epsilon_outside", tap, text, "it inside", runs={tap: norm_run(eps, outside=True)})
    text = "the variance were divided by C - 1 (ddof 1)"
    yield Guess("ddof", tap, text, "it divided by C", runs={tap: norm_run(ddof=1)})

    def other(combine: Callable[[Array, Array, Array], Array], axis: Any = -1, root: bool = True) -> Run:
        def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            weight, bias, eps = p.norm(tap, dtype)
            centred = x[0] - x[0].mean(axis=axis, keepdims=True)
            variance = (centred * centred).mean(axis=axis, keepdims=True) + eps
            return np.asarray(combine(centred / (np.sqrt(variance) if root else variance), weight, bias))

        return run

    for text, run in {
        "weight and bias changed places": other(lambda y, w, b: y * b + w),
        "the bias were added before the weight is multiplied": other(lambda y, w, b: (y + b) * w),
        "1 + weight stood in place of weight": other(lambda y, w, b: y * (1 + w) + b),
        "it divided by the variance, not by its root": other(lambda y, w, b: y * w + b, root=False),
        "mean and variance were taken over the positions": other(lambda y, w, b: y * w + b, axis=-2),
        "mean and variance were taken over positions and width together": other(
            lambda y, w, b: y * w + b, axis=(-1, -2)
        ),
        "neither weight nor bias were applied": other(lambda y, w, b: y),
        "it divided by the root of the squares' sum, not of their mean": other(
            lambda y, w, b: y * w / math.sqrt(p.config.n_embd) + b
        ),
    }.items():
        yield Guess("norm_form", tap, f"in {tap} {text}", runs={tap: run})
    yield Guess("missing_norm", tap, f"{tap} were not applied", runs={tap: lambda p, call, name, x, dtype: x[0]})
    text = "the mean were not taken off (RMS norm)"
    yield Guess("no_centring", tap, text, runs={tap: norm_run(centre=False)})

    def twice(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        return norm_run()(p, call, tap, [norm_run()(p, call, tap, x, dtype)], dtype)

    yield Guess("norm_form", tap, f"{tap} were applied twice", runs={tap: twice})
    ones = {f"{tap}.weight": np.ones(p.config.n_embd)}
    yield Guess("missing_weight", tap, f"{tap}.weight were not applied", weights=ones)
    yield from own_weights(problem, tap, tap)


def fitted_epsilon(problem: Problem, tap: str, start: float) -> Guess:
    """The epsilon of one norm that removes most of the error."""
    have = f"{problem.program.config.epsilon(tap):g}"

    def make(eps: float) -> Guess:
        return Guess("epsilon_value", tap, f"epsilon were {eps:.4g}", have, runs={tap: norm_run(eps)})

    return fit(problem, make, start)


def own_weights(problem: Problem, tap: str, name: str) -> Iterator[Guess]:
    """What can happen to the weight and bias of any map by themselves: missing, twice, negated."""
    bias = problem.program.weights(f"{name}.bias", F64)
    if bias.any():
        for cause, words, factor in (
            ("missing_bias", "missing", 0.0), ("bias_twice", "added twice", 2.0), ("bias_negated", "negated", -1.0),
            ("bias_twice", "halved", 0.5),
        ):  # fmt: skip
            yield Guess(cause, tap, f"{name}.bias were {words}", weights={f"{name}.bias": factor * bias})
    if "ln_" not in name:
        key = f"{name}.weight"
        yield Guess("weight_negated", tap, f"{key} were negated", weights=remade(problem, np.negative, key))
        text = f"{key} were zeros: its bias alone came out"
        yield Guess("missing_weight", tap, text, weights=remade(problem, np.zeros_like, key))


def other_weights(problem: Problem, tap: str, name: str, others: list[str]) -> Iterator[Guess]:
    """Another map's weight and bias in place of this one's, or the two exchanged."""
    w = problem.program.weights
    kinds = ("weight", "bias")
    mine = {kind: w(f"{name}.{kind}", F64) for kind in kinds}
    for other in others:
        theirs = {kind: w(f"{other}.{kind}", F64) for kind in kinds}
        both = {f"{name}.{kind}": theirs[kind] for kind in kinds}
        yield Guess("other_layer", tap, f"weight and bias of {other} stood in place of {name}'s", weights=both)
        back = {f"{other}.{kind}": mine[kind] for kind in kinds}
        text = f"weight and bias of {name} and {other} were exchanged"
        yield Guess("weights_exchanged", tap, text, weights={**both, **back})
        for kind in kinds:
            one = {f"{name}.{kind}": theirs[kind]}
            yield Guess("other_layer", tap, f"{other}.{kind} stood in place of {name}.{kind}", weights=one)
            text = f"{name}.{kind} and {other}.{kind} were exchanged"
            yield Guess("weights_exchanged", tap, text, weights={**one, f"{other}.{kind}": mine[kind]})


def misread(problem: Problem, tap: str, key: str) -> Iterator[Guess]:
    """A matrix whose memory is taken for that of its transpose, either way."""
    rows, columns = problem.program.weights.shape(key)
    for text, flip in (
        (f"{key} were read as ({columns}, {rows}) and transposed", lambda w: w.reshape(w.shape[::-1]).T),
        (f"{key} were transposed and read as ({rows}, {columns})", lambda w: w.T.reshape(w.shape)),
    ):
        yield Guess("transposed", tap, text, weights=remade(problem, flip, key))


def linear(problem: Problem, tap: str, name: str) -> Iterator[Guess]:
    """Guesses at a linear map that makes one tap: transposed, heads in another order, some of it, another's weights."""
    p = problem.program
    key = f"{name}.weight"
    rows, columns = p.weights.shape(key)
    if rows == columns:
        yield Guess("transposed", tap, f"{key} were transposed", weights=remade(problem, np.transpose, key))
    else:
        yield from misread(problem, tap, key)
    if split_tap(tap)[1] == "attn.out":
        yield from _rows_by_head(problem, tap, key)
        yield from _permuted_rows(problem, tap, name)
    if split_tap(tap)[1] != "mlp.c_fc":  # these are cut by rows where several devices share a layer
        for half, words in enumerate(("first", "second")):

            def cut(w: Array, half: int = half) -> Array:
                return np.where(np.arange(len(w)) // ((len(w) + 1) // 2) == half, w.T, 0).T

            text = f"the {words} half of {key}'s rows alone were used"
            yield Guess("missing_weight", tap, text, weights=remade(problem, cut, key))
    yield from own_weights(problem, tap, name)
    yield from dead_columns(problem, tap, name)


def _rows_by_head(problem: Problem, tap: str, key: str) -> Iterator[Guess]:
    """The rows of the attention's c_proj with its heads in another order."""
    H = problem.program.config.n_head
    for a, b in combinations(range(H), 2):
        yield _reordered(problem, tap, key, [b if i == a else a if i == b else i for i in range(H)])

    def mixed(axes: tuple[int, int]) -> Callable[[Array], Array]:
        sizes = {0: H, 1: -1}
        return lambda w: w.reshape(sizes[axes[0]], sizes[axes[1]], w.shape[1]).transpose(1, 0, 2).reshape(w.shape)

    for text, axes in (("(D, H)", (0, 1)), ("(H, D) taken for (D, H)", (1, 0))):
        words = f"the rows of {key} were ordered {text}"
        yield Guess("head_split", tap, words, "(H, D)", weights=remade(problem, mixed(axes), key))


def _reordered(problem: Problem, tap: str, key: str, order: list[int]) -> Guess:
    """A matrix with the rows of its heads in another order; its next steps have two more of them swapped."""
    moved = [i for i, head in enumerate(order) if i != head]
    text = f"heads {moved[0]} and {moved[-1]} of {key} were swapped"
    if len(moved) > 2:
        text = f"the heads of {key} came in the order {', '.join(map(str, order))}"

    def change(w: Array) -> Array:
        return w.reshape(len(order), -1, w.shape[1])[order].reshape(w.shape)

    def more() -> Iterator[Guess]:
        for a, b in combinations(range(len(order)), 2):
            other = order.copy()
            other[a], other[b] = order[b], order[a]
            if other != sorted(other):
                yield _reordered(problem, tap, key, other)

    return Guess("swapped_heads", tap, text, weights=remade(problem, change, key), more=more)


def _permuted_rows(problem: Problem, tap: str, name: str) -> Iterator[Guess]:
    """The rows of an observed square map in any other order: the map undone shows which number each one met."""
    observed, x = problem.observed.get(tap), problem.input(tap)
    if observed is None or x is None or not np.isfinite(observed).all() or not np.isfinite(x).all():
        return
    weight, bias = problem.program.weights(f"{name}.weight", F64), problem.program.weights(f"{name}.bias", F64)
    x, met = x.reshape(-1, len(weight)), np.linalg.lstsq(weight.T, (observed - bias).reshape(-1, len(bias)).T)[0]
    order = ((met * met).sum(axis=1)[:, None] - 2 * met @ x + (x * x).sum(axis=0)).argmin(axis=1)
    if len(x) > 1 and (np.sort(order) == np.arange(len(order))).all() and (np.diff(order) != 1).any():
        text = f"the rows of {name}.weight, or the numbers that it reads, came in another order"
        back = np.argsort(order)
        yield Guess("permuted", tap, text, weights={f"{name}.weight": weight[back]})


def dead_columns(problem: Problem, tap: str, name: str) -> Iterator[Guess]:
    """Columns of an observed linear map that are constant: zero, or the bias alone."""
    observed = problem.observed.get(tap)
    if observed is None or split_tap(tap)[1] in ("attn.q", "attn.k", "attn.v"):
        return
    flat = observed.reshape(-1, observed.shape[-1])
    bias = problem.program.weights(f"{name}.bias", F64)
    weight = problem.program.weights(f"{name}.weight", F64)
    for words, still in (("0", 0 * bias), ("its bias alone", bias)):
        dead = np.flatnonzero((np.abs(flat - still) < 1e-6).all(axis=0))
        if 0 < len(dead) < len(bias) and len(flat) > 1:
            new_weight, new_bias = weight.copy(), bias.copy()
            new_weight[:, dead], new_bias[dead] = 0, still[dead]
            shown = ", ".join(map(str, dead[:4])) + (" ..." if len(dead) > 4 else "")
            text = f"column {shown} of {name} were dead: it gives {words}"
            yield Guess("dead_column", tap, text, weights={f"{name}.weight": new_weight, f"{name}.bias": new_bias})


def decimals(n: int) -> Callable[[Array], Array]:
    return lambda x: np.asarray(np.round(x, n))


def whole_results(problem: Problem, tap: str) -> Iterator[Guess]:
    """What can be done to a result as a whole; in large models, where that result was seen."""
    if tap not in problem.observed:
        for text, cut in (("rounded", np.rint), ("cut off", np.trunc)) if not problem.is_large else ():
            runs = afterwards(problem, tap, cut)
            yield Guess("integers", tap, f"{tap} were {text} to integers", runs=runs)
        return

    def last(x: Array) -> Array:
        return np.broadcast_to(x[..., -1:, :], x.shape)

    changes: list[tuple[str, str, Callable[[Array], Array]]] = [
        ("integers", f"{tap} were rounded to integers", np.rint),
        ("integers", f"{tap} were cut off to integers", np.trunc),
        ("last_everywhere", f"every position of {tap} were the last one", last),
        ("negated", f"{tap} were negated", np.negative),
    ]
    for cause, text, change in changes:
        yield Guess(cause, tap, text, runs=afterwards(problem, tap, change))
    for n in (1, 2, 3, 4):
        text = f"{tap} were rounded to {n} decimals"
        yield Guess("rounding", tap, text, runs=afterwards(problem, tap, decimals(n)))
