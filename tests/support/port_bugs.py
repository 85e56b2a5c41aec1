"""The mistakes of ports: the steps of `ports.Port` that they replace, the first wrong tap, the name of the cause."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ports import Array, Port, Step


class Bug(NamedTuple):
    tap: str  # the first tap that goes wrong; {i} is the layer
    causes: tuple[str, ...]  # either of these names the mistake
    wrong: dict[str, Step]
    layers: tuple[int, ...] | None = (1,)  # where it is made; None: in every layer
    # whether outputs alone tell the cause: not of numbers drawn at random, of two mistakes that come to the same,
    # or of one that stays within the budget
    outputs_tell: bool = True
    weights: Callable[[Any], Any] = lambda w: w  # the weights that the port reads


def norm_of(self: Port, name: str, i: int | None) -> Any:
    return self.w.ln_f if i is None else getattr(self.w.h[i], name)


def normed(name: str, form: Callable[[Port, Array, Array, Array, float], Array]) -> dict[str, Step]:
    return {name: lambda self, i, x: form(self, x, *norm_of(self, name, i))}


def with_epsilon(epsilon: float) -> Callable[..., Array]:
    return lambda self, x, w, b, e: self.normalised(x, epsilon) * w + b


def rms_norm(self: Port, x: Array, w: Array, b: Array, e: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + e) * w + b


def sample_variance(self: Port, x: Array, w: Array, b: Array, e: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).sum(-1, keepdims=True) / (x.shape[-1] - 1) + e) * w + b


def erf(self: Port, i: int, x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def narrow(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def softmax(scores: Array, axis: int = -1) -> Array:
    exps = np.exp(scores - np.maximum(scores.max(axis, keepdims=True), -1e30))
    return exps / np.maximum(exps.sum(axis, keepdims=True), 1e-30)


def base_2(self: Port, i: int, s: Array, seen: Array) -> Array:
    p = 2.0 ** np.where(seen, s - s.max(-1, keepdims=True), -1e4)
    return p / p.sum(-1, keepdims=True)


def quiet(self: Port, i: int, s: Array, seen: Array) -> Array:
    """softmax with 1 added to the denominator."""
    e = np.where(seen, np.exp(s), 0)
    return e / (1 + e.sum(-1, keepdims=True))


def without(self: Port, weight: Array, which: int) -> Array:
    part = weight.shape[-1] // 3
    new = np.array(weight)
    new[..., which * part : (which + 1) * part] = 0
    return new


def c_attn_with(change: Callable[[Array, int], Array], also_bias: bool = True) -> Step:
    """c_attn's weight and bias as (rows, 3, H, D), changed alike."""

    def step(self: Port, i: int, x: Array) -> Array:
        weight, bias = self.w.h[i].attn.c_attn
        D = weight.shape[1] // (3 * self.H)
        new = change(weight.reshape(-1, 3, self.H, D), self.H).reshape(weight.shape)
        return x @ new + (change(bias.reshape(1, 3, self.H, D), self.H).reshape(-1) if also_bias else bias)

    return step


def swapped(which: tuple[int, ...], a: int, b: int) -> Callable[[Array, int], Array]:
    def change(w: Array, H: int) -> Array:
        w = w.copy()
        for one in which:
            w[:, one, [a, b]] = w[:, one, [b, a]]
        return w

    return change


def linear_of(self: Port, name: str, i: int) -> Any:
    block = self.w.h[i]
    return {"out": block.attn.c_proj, "c_fc": block.mlp.c_fc, "mlp": block.mlp.c_proj, "c_attn": block.attn.c_attn}[
        name
    ]


def linear(name: str, form: Callable[[Array, Array, Array], Array]) -> dict[str, Step]:
    return {name: lambda self, i, x, *rest: form(x, *linear_of(self, name, i))}


def from_layer(name: str, other: int, kind: str = "both") -> dict[str, Step]:
    def step(self: Port, i: int, x: Array, *rest: Array) -> Array:
        mine, theirs = linear_of(self, name, i), linear_of(self, name, other)
        return x @ theirs[0] + (theirs[1] if kind == "both" else mine[1])

    return {name: step}


def dead(w: Array, column: int) -> Array:
    w = w.copy()
    w[..., column] = 0
    return w


def int8(w: Array) -> Array:
    scale = np.abs(w).max() / 127
    return (np.rint(w / scale) * scale).astype(np.float32)


def last_everywhere(x: Array) -> Array:
    return np.broadcast_to(x[:, -1:], x.shape)


def dropped(x: Array) -> Array:
    keep = np.random.default_rng(5).random(x.shape) > 0.1
    return x * keep / 0.9


def only(where: Any, right: Step, wrong: Step) -> Step:
    """The mistake in one part of the array alone."""

    def step(self: Port, i: int, *x: Array) -> Array:
        value = np.array(right(self, i, *x))
        value[where] = np.asarray(wrong(self, i, *x))[where]
        return value

    return step


def shifted(by: int) -> Step:
    return lambda self, i, T, S, mask: np.tri(T, S, S - T + by, dtype=bool)


def blocks(size: int) -> Step:
    return lambda self, i, T, S, mask: np.arange(S)[None] // size <= np.arange(S - T, S)[:, None] // size


def mapped(name: str, change: Callable[[Array], Array]) -> dict[str, Step]:
    """What a step gives, changed afterwards."""
    return {name: lambda self, i, *x: change(getattr(Port, name)(self, i, *x))}


def rows(change: Callable[[Array], Array]) -> dict[str, Step]:
    return {"embed": lambda self, i, ids, p: self.w.wte[ids] + change(self.w.wpe)[p]}


def repeated(wpe: Array) -> Array:
    wpe = wpe.copy()
    wpe[4] = wpe[3]
    return wpe


def zeroed(wpe: Array) -> Array:
    wpe = wpe.copy()
    wpe[5:] = 0
    return wpe


def rotated(x: Array) -> Array:
    """(B, H, T, D) turned by the positions, as rotary embeddings do."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[2])[:, None] / 10000.0 ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1)


def sinusoids(self: Port, i: None, ids: Array, positions: Array) -> Array:
    half = self.w.wpe.shape[1] // 2
    angles = positions[..., None] / 10000.0 ** (np.arange(half) / half)
    return self.w.wte[ids] + np.concatenate([np.sin(angles), np.cos(angles)], -1)


def misread(x: Array, w: Array, b: Array) -> Array:
    """A linear map whose (in, out) weight is read as (out, in)."""
    return x @ w.reshape(w.shape[::-1]).T + b


F = np.float32
ROTARY = (rotated, rotated, np.asarray)  # what becomes of q, k, v
PORTS: dict[str, Bug] = {
    # embedding
    "positions from 1": Bug(
        "embed", ("position_offset",), {"embed": lambda s, i, ids, p: s.w.wte[ids] + s.w.wpe[p + 1]}
    ),
    "no positions": Bug("embed", ("missing_positions",), {"embed": lambda s, i, ids, p: s.w.wte[ids]}),
    "positions all 0": Bug("embed", ("positions",), {"embed": lambda s, i, ids, p: s.w.wte[ids] + s.w.wpe[0 * p]}),
    "scaled embedding": Bug(
        "embed",
        ("scaled_embedding",),
        {"embed": lambda s, i, ids, p: s.w.wte[ids] * F(math.sqrt(s.w.wte.shape[1])) + s.w.wpe[p]},
    ),
    "positions twice": Bug(
        "embed", ("scaled_embedding",), {"embed": lambda s, i, ids, p: s.w.wte[ids] + 2 * s.w.wpe[p]}
    ),
    "sinusoids for wpe": Bug("embed", ("positions",), {"embed": sinusoids}),
    "tokens shifted": Bug(
        "embed", ("token_shift",), {"embed": lambda s, i, ids, p: s.w.wte[np.roll(ids, 1, 1)] + s.w.wpe[p]}
    ),
    "wpe row repeated": Bug("embed", ("position_rows",), rows(repeated)),
    "wpe rows zero": Bug("embed", ("position_rows",), rows(zeroed)),
    "wpe reversed": Bug("embed", ("position_rows", "positions"), rows(lambda w: w[::-1])),
    "wte int8": Bug("embed", ("quantised",), {"embed": lambda s, i, ids, p: int8(s.w.wte)[ids] + s.w.wpe[p]}),
    # norms
    "epsilon 1e-3": Bug("h.1.ln_1", ("epsilon_value",), normed("ln_1", with_epsilon(1e-3))),
    "epsilon 3e-2": Bug("h.1.ln_2", ("epsilon_value",), normed("ln_2", with_epsilon(3e-2))),
    "epsilon 1e-1 ln_f": Bug("ln_f", ("epsilon_value",), normed("ln_f", with_epsilon(1e-1))),
    "rms norm": Bug("h.1.ln_2", ("no_centring",), normed("ln_2", rms_norm)),
    "ddof 1": Bug("h.1.ln_1", ("ddof",), normed("ln_1", sample_variance)),
    "ddof 1 everywhere": Bug(
        "h.0.ln_1",
        ("ddof",),
        {**normed("ln_1", sample_variance), **normed("ln_2", sample_variance), **normed("ln_f", sample_variance)},
        None,
    ),
    "norm left out": Bug("h.1.ln_2", ("missing_norm",), {"ln_2": lambda s, i, x: x}),
    "ln_f left out": Bug("ln_f", ("missing_norm",), {"ln_f": lambda s, i, x: x}),
    "norms exchanged": Bug(
        "h.1.ln_1",
        ("other_layer", "weights_exchanged"),
        {
            "ln_1": lambda s, i, x: s.normalised(x, 1e-5) * s.w.h[i].ln_2.weight + s.w.h[i].ln_2.bias,
            "ln_2": lambda s, i, x: s.normalised(x, 1e-5) * s.w.h[i].ln_1.weight + s.w.h[i].ln_1.bias,
        },
    ),
    "1 + weight": Bug(
        "h.1.ln_1", ("norm_form",), normed("ln_1", lambda s, x, w, b, e: s.normalised(x, e) * (1 + w) + b)
    ),
    "norm bias missing": Bug(
        "h.1.ln_2", ("missing_bias",), normed("ln_2", lambda s, x, w, b, e: s.normalised(x, e) * w)
    ),
    # c_attn and heads
    "k q v": Bug("h.1.attn.q", ("qkv_order",), {"c_attn": c_attn_with(lambda w, H: w[:, [1, 0, 2]])}),
    "q v k": Bug("h.1.attn.k", ("qkv_order",), {"c_attn": c_attn_with(lambda w, H: w[:, [0, 2, 1]])}),
    "heads interleaved": Bug(
        "h.1.attn.q", ("head_split",), {"c_attn": c_attn_with(lambda w, H: w.transpose(0, 2, 1, 3))}
    ),
    "heads 0 and 1 swapped": Bug("h.1.attn.q", ("swapped_heads",), {"c_attn": c_attn_with(swapped((0, 1, 2), 0, 1))}),
    "q heads swapped": Bug("h.1.attn.q", ("swapped_heads",), {"c_attn": c_attn_with(swapped((0,), 1, 3))}),
    "c_attn bias missing": Bug("h.1.attn.q", ("missing_bias",), linear("c_attn", lambda x, w, b: x @ w)),
    "c_attn of layer 0": Bug("h.1.attn.q", ("other_layer",), from_layer("c_attn", 0)),
    "c_attn reads the stream": Bug("h.1.ln_1", ("missing_norm",), {"ln_1": lambda s, i, x: x}),
    "head split (D, H)": Bug(
        "h.1.attn.q",
        ("head_split",),
        {"split": lambda s, i, x: x.reshape(*x.shape[:2], 3, -1, s.H).transpose(2, 0, 4, 1, 3)},
    ),
    "heads not transposed": Bug(
        "h.1.attn.q",
        ("head_split",),
        {"split": lambda s, i, x: np.stack([y.reshape(len(x), s.H, x.shape[1], -1) for y in np.split(x, 3, -1)])},
    ),
    "c_attn misread everywhere": Bug("h.0.attn.q", ("transposed",), linear("c_attn", misread), None),
    "all maps misread": Bug(
        "h.0.attn.q",
        ("transposed",),
        {k: v for n in ("c_attn", "out", "c_fc", "mlp") for k, v in linear(n, misread).items()},
        None,
    ),
    "rotary embedding": Bug(
        "h.0.attn.q",
        ("rotary",),
        {"split": lambda s, i, x: np.stack([f(y) for f, y in zip(ROTARY, Port.split(s, i, x), strict=True)])},
        None,
    ),
    "keys and values of one head": Bug(
        "h.0.attn.k",
        ("shared_heads",),
        {
            "split": lambda s, i, x: np.stack(
                [
                    y[:, : s.H if n == 0 else 1].repeat(1 if n == 0 else s.H, 1)
                    for n, y in enumerate(Port.split(s, i, x))
                ]
            )
        },
        None,
    ),
    # scores, mask, softmax
    "no scale": Bug("h.1.attn.scores", ("scale",), {"scores": lambda s, i, q, k: q @ k.swapaxes(-1, -2)}),
    "scale 1 / D": Bug(
        "h.1.attn.scores", ("scale",), {"scores": lambda s, i, q, k: q @ k.swapaxes(-1, -2) / F(q.shape[-1])}
    ),
    "scale 0.37": Bug(
        "h.1.attn.scores", ("scale", "factor"), {"scores": lambda s, i, q, k: q @ k.swapaxes(-1, -2) * F(0.37)}
    ),
    "scale by layer": Bug(
        "h.1.attn.scores",
        ("scale",),
        {"scores": lambda s, i, q, k: q @ k.swapaxes(-1, -2) / F(math.sqrt(q.shape[-1]) * (i + 1))},
        None,
    ),
    "no mask": Bug("h.0.attn.probs", ("mask_missing",), {"seen": lambda s, i, T, S, m: np.ones((T, S), bool)}, None),
    "mask one ahead": Bug("h.1.attn.probs", ("mask_shift",), {"seen": shifted(1)}),
    "mask strict": Bug("h.0.attn.probs", ("mask_shift", "mask_shape"), {"seen": shifted(-1)}, None),
    "mask in blocks of 4": Bug("h.1.attn.probs", ("mask_shape",), {"seen": blocks(4)}),
    "window of 4": Bug(
        "h.1.attn.probs",
        ("mask_shape",),
        {"seen": lambda s, i, T, S, m: np.tri(T, S, 0, bool) & ~np.tri(T, S, -4, bool)},
    ),
    "softmax over queries": Bug(
        "h.1.attn.probs", ("softmax_form",), {"probs": lambda s, i, x, seen: softmax(np.where(seen, x, -1e30), -2)}
    ),
    "softmax base 2": Bug("h.1.attn.probs", ("softmax_form",), {"probs": base_2}),
    "softmax + 1": Bug("h.1.attn.probs", ("softmax_form",), {"probs": quiet}),
    "mask after softmax": Bug("h.1.attn.probs", ("softmax_form",), {"probs": lambda s, i, x, seen: softmax(x) * seen}),
    "mask value -5": Bug(
        "h.1.attn.probs", ("mask_value",), {"probs": lambda s, i, x, seen: softmax(np.where(seen, x, F(-5)))}
    ),
    "dropout on probs": Bug("h.1.attn.probs", ("dropout",), mapped("probs", dropped), outputs_tell=False),
    # merge, c_proj
    "heads merged untransposed": Bug(
        "h.1.attn.heads", ("head_split",), {"heads": lambda s, i, p, v: (p @ v).reshape(len(p), p.shape[2], -1)}
    ),
    "c_proj transposed": Bug("h.1.attn.out", ("transposed",), linear("out", lambda x, w, b: x @ w.T + b)),
    "c_proj of layer 2": Bug("h.1.attn.out", ("other_layer",), from_layer("out", 2)),
    "c_proj bias twice": Bug("h.1.attn.out", ("bias_twice",), linear("out", lambda x, w, b: x @ w + 2 * b)),
    "c_proj bias negated": Bug("h.1.attn.out", ("bias_negated",), linear("out", lambda x, w, b: x @ w - b)),
    "out cut off to integers": Bug("h.1.attn.out", ("integers",), mapped("out", np.trunc)),
    "dropout on out": Bug("h.1.attn.out", ("dropout",), mapped("out", dropped), outputs_tell=False),
    # residual and MLP
    "no residual": Bug("h.1.resid_mid", ("missing_residual",), {"resid_mid": lambda s, i, x, y, n: y}),
    "residual after the norm": Bug("h.1.resid_mid", ("other_input",), {"resid_mid": lambda s, i, x, y, n: n + y}),
    "residual doubled": Bug(
        "h.1.resid_post", ("residual_twice", "other_input"), {"resid_post": lambda s, i, x, y, n: 2 * x + y}
    ),
    "MLP reads the stream": Bug(
        "h.1.mlp.c_fc",
        ("other_input", "missing_norm"),  # with outputs alone the two are one
        {"c_fc": lambda s, i, x, stream: Port.c_fc(s, i, stream, stream)},
        outputs_tell=False,
    ),
    "c_fc dead column": Bug(
        "h.1.mlp.c_fc", ("dead_column",), linear("c_fc", lambda x, w, b: x @ dead(w, 17) + dead(b, 17))
    ),
    "c_fc int8": Bug("h.1.mlp.c_fc", ("quantised",), linear("c_fc", lambda x, w, b: x @ int8(w) + b)),
    "c_fc fp16 weights": Bug("h.1.mlp.c_fc", ("rounding",), linear("c_fc", lambda x, w, b: x @ narrow(w) + b)),
    "c_fc fp16 result": Bug("h.1.mlp.c_fc", ("rounding",), linear("c_fc", lambda x, w, b: narrow(x @ w + b))),
    "GELU by erf": Bug("h.1.mlp.gelu", ("gelu_form",), {"gelu": erf}),
    "GELU by erf everywhere": Bug("h.0.mlp.gelu", ("gelu_form",), {"gelu": erf}, None),
    "GELU quick": Bug("h.1.mlp.gelu", ("gelu_form",), {"gelu": lambda s, i, x: x / (1 + np.exp(F(-1.702) * x))}),
    "ReLU": Bug("h.1.mlp.gelu", ("gelu_form",), {"gelu": lambda s, i, x: np.maximum(x, 0)}),
    "no activation": Bug("h.1.mlp.gelu", ("gelu_form",), {"gelu": lambda s, i, x: x}),
    "GELU 0.44715": Bug(
        "h.1.mlp.gelu",
        ("gelu_constant",),
        {"gelu": lambda s, i, x: 0.5 * x * (1 + np.tanh(F(0.797885) * (x + F(0.44715) * x**3)))},
    ),
    "GELU 0.0447": Bug(
        "h.1.mlp.gelu",
        ("gelu_constant",),
        {"gelu": lambda s, i, x: 0.5 * x * (1 + np.tanh(F(0.7978845608) * (x + F(0.0447) * x**3)))},
        outputs_tell=False,
    ),
    "GELU twice": Bug(
        "h.0.mlp.gelu", ("gelu_form",), {"gelu": lambda s, i, x: Port.gelu(s, i, Port.gelu(s, i, x))}, None
    ),
    "mlp.c_proj of layer 0": Bug("h.1.mlp.out", ("other_layer",), from_layer("mlp", 0)),
    "mlp bias missing": Bug("h.1.mlp.out", ("missing_bias",), linear("mlp", lambda x, w, b: x @ w)),
    "MLP twice": Bug(
        "h.1.resid_post",
        ("residual_twice", "other_input", "branch_twice"),
        {"resid_post": lambda s, i, x, y, n: x + 2 * y},
    ),
    "dropout on MLP": Bug("h.1.mlp.out", ("dropout",), mapped("mlp", dropped), outputs_tell=False),
    # head
    "softmaxed logits": Bug("logits", ("logits_form",), mapped("logits", softmax)),
    "log-softmaxed logits": Bug("logits", ("logits_form",), mapped("logits", lambda x: np.log(softmax(x)))),
    "centred logits": Bug("logits", ("logits_form",), mapped("logits", lambda x: x - x.mean(-1, keepdims=True))),
    "logits in integers": Bug("logits", ("integers",), mapped("logits", np.trunc)),
    "logits at temperature 0.7": Bug("logits", ("factor",), mapped("logits", lambda x: x / F(0.7))),
    "logits capped": Bug("logits", ("logits_form",), mapped("logits", lambda x: 30 * np.tanh(x / 30))),
    "logits to 2 decimals": Bug("logits", ("rounding",), mapped("logits", lambda x: np.round(x, 2))),
    "ln_f twice": Bug("ln_f", ("norm_form",), {"ln_f": lambda s, i, x: Port.ln_f(s, i, Port.ln_f(s, i, x))}),
    "logits in fp16": Bug("logits", ("rounding",), mapped("logits", narrow), outputs_tell=False),
    "last position everywhere": Bug("logits", ("last_everywhere",), mapped("logits", last_everywhere)),
    "head reads the stream": Bug("ln_f", ("missing_norm",), {"ln_f": lambda s, i, x: x}),
    # one part of an array
    "position 5 of out": Bug(
        "h.1.attn.out",
        ("one_part",),
        {"out": only(np.s_[:, 5], Port.out, lambda s, i, x: Port.out(s, i, x) * F(1.5) + 1)},
        outputs_tell=False,
    ),
    "column 17 of c_fc": Bug(
        "h.1.mlp.c_fc",
        ("one_part",),
        {"c_fc": only(np.s_[..., 17], Port.c_fc, lambda s, i, x, y: np.cos(Port.c_fc(s, i, x, y)))},
        outputs_tell=False,
    ),
    "head 2 unscaled": Bug(
        "h.1.attn.scores",
        ("scale",),
        {"scores": only(np.s_[:, 2], Port.scores, lambda s, i, q, k: q @ k.swapaxes(-1, -2))},
    ),
    "one number of resid_mid": Bug(
        "h.1.resid_mid",
        ("one_part", "one_number"),
        {"resid_mid": only(np.s_[0, 3, 7], Port.resid_mid, lambda s, i, x, y, n: x + y + 3)},
        outputs_tell=False,
    ),
    "GELU by erf from position 3": Bug("h.1.mlp.gelu", ("gelu_form",), {"gelu": only(np.s_[:, 3:], Port.gelu, erf)}),
}


def port_of(weights: Any, bug: Bug | None) -> Port:
    port = Port(
        weights if bug is None else bug.weights(weights), None if bug is None or bug.layers is None else set(bug.layers)
    )
    port.wrong = {} if bug is None else bug.wrong
    return port
