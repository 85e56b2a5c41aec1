"""The usual mistakes outside the attention: embedding, norms, linear maps, activation, head, other inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import numpy as np

from ...activations import ACTIVATIONS
from ...call import Call
from ...weights import Array
from ..operations import Run, embed_at, split_tap, tap_inputs
from ..program import Program
from .gradients import F64
from .problem import Guess, Problem, norm_names, other_weights, swap_text, together

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
        now = problem.values.get(inputs[which], problem.given.get(inputs[which]))
        if value is None or now is None or name == inputs[which] or value.shape != now.shape:
            continue

        def run(p: Program, c: Call, t: str, x: list[Array], dtype: Any, i: int = which, v: Array = value) -> Array:
            return problem.program.run(t, c, [v if j == i else old for j, old in enumerate(x)], dtype)

        group = together(problem, tap)
        text = f"{' and '.join(group)} read{'s' if len(group) == 1 else ''} {name} instead of {inputs[which]}"
        yield Guess("other_input", group[0], text, runs=dict.fromkeys(group, run))


def activation(form: str) -> Run:
    return lambda p, call, tap, x, dtype: ACTIVATIONS[form](x[0])


def other_activation(problem: Problem, tap: str, now: str) -> Iterator[Guess]:
    """None of GPT2Config's: none at all, or GELU by tanh with other constants, which the values tell."""

    def form(f: Callable[[Array], Array]) -> dict[str, Run]:
        return {tap: lambda p, call, name, x, dtype: f(x[0])}

    def tanh(k: float, c: float) -> Callable[[Array], Array]:
        return lambda x: 0.5 * x * (1 + np.tanh(k * x + c * x * x * x))

    yield Guess("gelu_form", tap, "no activation at all", runs=form(lambda x: x))
    square = form(lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x))))
    yield Guess("gelu_form", tap, "GELU form: x * x in place of x * x * x in the tanh", runs=square)
    x = problem.values.get(source := tap_inputs(tap, problem.program.config)[0], problem.given.get(source))
    if now == "gelu_tanh" and tap in problem.observed and x is not None:
        with np.errstate(all="ignore"):
            u = 2 * problem.observed[tap] / x - 1
            clear = (np.abs(u) < 0.99) & (np.abs(x) > 0.3)
        if clear.sum() > 8:
            x = x[clear]
            (k, c), *_ = np.linalg.lstsq(np.stack([x, x**3], axis=1), np.arctanh(u[clear]), rcond=None)
            if abs(c) < 1e-3 * abs(k):
                return  # a sigmoid, which is tried by name
            text = (
                f"GELU's constants: tanh({k:.6g} * (x + {c / k:.6g} * x^3)), not tanh(0.797885 * (x + 0.044715 * x^3))"
            )
            yield Guess("gelu_constant", tap, text, runs=form(tanh(float(k), float(c))))


def without_residual(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
    return x[1]


def embedding(problem: Problem) -> Iterator[Guess]:
    N = problem.program.config.n_ctx

    def moved(by: int) -> Run:
        def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            return embed_at(p, call, (call.position_ids + by) % N, dtype)

        return run

    def without(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        return p.weights("wte.weight", dtype)[call.input_ids].astype(dtype)

    def at(rows: Array) -> Run:
        return lambda p, call, tap, x, dtype: embed_at(p, call, np.broadcast_to(rows, call.input_ids.shape), dtype)

    def scaled(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        wte = p.weights("wte.weight", dtype)[call.input_ids].astype(dtype)
        return np.asarray(wte * math.sqrt(wte.shape[-1]) + p.weights("wpe.weight", dtype)[call.position_ids])

    T = problem.call.input_ids.shape[1]
    if T > 1:
        yield Guess("positions", "embed", "every position is 0", runs={"embed": at(np.zeros(T, int))})
        yield Guess("positions", "embed", "positions run backwards", runs={"embed": at(np.arange(T)[::-1])})
    yield Guess("scaled_embedding", "embed", "the token vectors are multiplied by sqrt(C)", runs={"embed": scaled})
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


def layer_norm(problem: Problem, tap: str, forward: bool) -> Iterator[Guess]:
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
            text = f"epsilon {swap_text(f'{eps:g}', f'{now:g}', forward)}"
            yield Guess("epsilon_value", tap, text, runs={tap: form(eps)})
    for eps in sorted({now, 1e-5, *candidates[1:]}):
        yield Guess("epsilon_outside", tap, f"epsilon {eps:g} outside the root", runs={tap: form(eps, outside=True)})
    yield Guess("ddof", tap, "variance divided by C - 1 instead of C (ddof 1)", runs={tap: form(now, ddof=1)})

    def other(combine: Callable[[Array, Array, Array], Array], axis: Any = -1, root: bool = True) -> Run:
        def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            weight, bias, eps = p.norm(tap, dtype)
            centred = x[0] - x[0].mean(axis=axis, keepdims=True)
            variance = (centred * centred).mean(axis=axis, keepdims=True) + eps
            return np.asarray(combine(centred / (np.sqrt(variance) if root else variance), weight, bias))

        return run

    for text, run in {
        "weight and bias change places": other(lambda y, w, b: y * b + w),
        "the bias is added before the weight is multiplied": other(lambda y, w, b: (y + b) * w),
        "1 + weight in place of weight": other(lambda y, w, b: y * (1 + w) + b),
        "divided by the variance, not by its root": other(lambda y, w, b: y * w + b, root=False),
        "mean and variance over the positions": other(lambda y, w, b: y * w + b, axis=-2),
        "mean and variance over positions and width together": other(lambda y, w, b: y * w + b, axis=(-1, -2)),
        "neither weight nor bias is applied": other(lambda y, w, b: y),
    }.items():
        yield Guess("norm_form", tap, f"{tap}: {text}", runs={tap: run})
    yield Guess("missing_norm", tap, f"{tap} is not applied", runs={tap: lambda p, call, name, x, dtype: x[0]})
    yield Guess("no_centring", tap, "the mean is not taken off (RMS norm)", runs={tap: form(now, centre=False)})
    yield Guess(
        "missing_weight", tap, f"{tap}.weight is not applied",
        weights={f"{tap}.weight": np.ones(p.config.n_embd)},
    )  # fmt: skip
    yield from other_weights(problem, tap, tap, [n for n in norm_names(p) if n != tap], forward)


def linear(problem: Problem, tap: str, name: str, forward: bool) -> Iterator[Guess]:
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
    yield from other_weights(problem, tap, name, others, forward)


def head(problem: Problem) -> Iterator[Guess]:
    p = problem.program
    if not p.config.tied:
        wte = p.weights("wte.weight", F64)
        yield Guess("untied_head", "logits", "the head is not wte (untied)", weights={p.head: wte})
