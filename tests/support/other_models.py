"""More mistakes of ports: parts of other models, layers in another order, 8 bits, what decoding does to logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from port_bugs import Bug, F, linear, mapped, narrow, normed, without
from ports import Array, Port, Step


def other_token(self: Port, i: None, ids: Array, positions: Array) -> Array:
    ids = ids.copy()
    ids[0, 4] = (ids[0, 4] + 31) % len(self.w.wte)
    return self.w.wte[ids] + self.w.wpe[positions]


def in_heads(count: int) -> dict[str, Step]:
    """q, k and v cut into another number of heads."""

    def split(self: Port, i: int, x: Array) -> Array:
        return x.reshape(*x.shape[:2], 3, count, -1).transpose(2, 0, 3, 1, 4)

    return {"split": split, "scores": lambda s, i, q, k: q @ k.swapaxes(-1, -2) / F(math.sqrt(q.shape[-1]))}


def in_qkv(*changes: Callable[[Array], Array]) -> dict[str, Step]:
    """q, k and v, each changed in its own way."""
    return {"split": lambda s, i, x: np.stack([f(y) for f, y in zip(changes, Port.split(s, i, x), strict=True)])}


def unit(x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + F(1e-5))


def alibi(self: Port, i: int, q: Array, k: Array) -> Array:
    scores = Port.scores(self, i, q, k)
    H, T, S = scores.shape[1:]
    slopes = 2.0 ** (-8 * (np.arange(H) + 1) / H)[:, None, None]
    return scores + (slopes * (np.arange(S) - np.arange(S - T, S)[:, None])).astype(np.float32)


def int8_rows(x: Array) -> Array:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return (np.rint(x / scale) * scale).astype(np.float32)


def twice(self: Port, i: int, x: Array, out: Array, normed: Array) -> Array:
    """The stream after a layer, put through the layer once more."""
    x = x + out
    q, k, v = self.split(i, self.c_attn(i, self.ln_1(i, x)))
    probs = self.probs(i, self.scores(i, q, k), self.seen(i, q.shape[2], k.shape[2], None))
    x = x + self.out(i, self.heads(i, probs, v))
    return x + self.mlp(i, self.gelu(i, self.c_fc(i, self.ln_2(i, x), x)))


def half(x: Array, w: Array, b: Array) -> Array:
    """One of two devices' part of a linear map."""
    return x[..., : len(w) // 2] @ w[: len(w) // 2] + b


def largest(x: Array) -> Array:
    return np.where(x < np.sort(x, -1)[..., -10:-9], -np.inf, x)


OTHERS: dict[str, Bug] = {
    "2 heads for 4": Bug("h.0.attn.q", ("head_count",), in_heads(2), None),
    "q and k normalised": Bug("h.0.attn.q", ("qk_norm",), in_qkv(unit, unit, np.asarray), None),
    "ALiBi": Bug("h.0.attn.scores", ("alibi",), {"scores": alibi}, None),
    "scores capped": Bug("h.0.attn.scores", ("scores_form",), mapped("scores", lambda x: 2 * np.tanh(x / 2)), None),
    "q without its weight": Bug(
        "h.1.attn.q",
        ("missing_weight",),
        {"c_attn": lambda s, i, x: x @ without(s, s.w.h[i].attn.c_attn[0], 0) + s.w.h[i].attn.c_attn[1]},
    ),
    "heads 0 and 2 zero": Bug(
        "h.1.attn.heads",
        ("dead_head",),
        {"heads": lambda s, i, p, v: Port.heads(s, i, p * (np.arange(s.H) % 2)[:, None, None], v)},
    ),
    "heads 0 and 2 zero everywhere": Bug(
        "h.0.attn.heads",
        ("dead_head",),
        {"heads": lambda s, i, p, v: Port.heads(s, i, p * (np.arange(s.H) % 2)[:, None, None], v)},
        None,
    ),
    "squares summed in the norms": Bug(
        "h.0.ln_1",
        ("norm_form",),
        {k: v for n in ("ln_1", "ln_2") for k, v in normed(n, lambda s, x, w, b, e: unit(x) * w / F(8) + b).items()},
        None,
    ),
    "keys and values in float16": Bug("h.0.attn.k", ("rounding",), in_qkv(np.asarray, narrow, narrow), None),
    "keys and values in int8": Bug("h.0.attn.k", ("quantised",), in_qkv(np.asarray, int8_rows, int8_rows), None),
    "c_fc reads int8": Bug(
        "h.1.mlp.c_fc",
        ("quantised",),
        linear("c_fc", lambda x, w, b: int8_rows(x) @ w + b),
        outputs_tell=False,
    ),
    "c_proj reads other numbers": Bug(
        "h.1.attn.out",
        ("permuted",),
        linear("out", lambda x, w, b: x[..., np.random.default_rng(3).permutation(len(w))] @ w + b),
        outputs_tell=False,
    ),
    "c_proj's heads in reverse order": Bug(
        "h.1.attn.out",
        ("swapped_heads", "permuted"),
        {"out": lambda s, i, x: Port.out(s, i, x.reshape(*x.shape[:2], s.H, -1)[:, :, ::-1].reshape(x.shape))},
    ),
    "ln_2 in int8": Bug("h.1.ln_2", ("quantised",), mapped("ln_2", int8_rows)),
    "half of each c_proj": Bug(
        "h.0.attn.out", ("missing_weight",), {**linear("out", half), **linear("mlp", half)}, None
    ),
    "keys and values of pairs of heads": Bug(
        "h.0.attn.k", ("shared_heads",), in_qkv(np.asarray, *(2 * [lambda x: x[:, ::2].repeat(2, axis=1)])), None
    ),
    "keys and values of the first two heads": Bug(
        "h.0.attn.k", ("shared_heads",), in_qkv(np.asarray, *(2 * [lambda x: x[:, [0, 1, 0, 1]]])), None
    ),
    "keys and values of the first sequence": Bug(
        "h.0.attn.k", ("shared_batch",), in_qkv(np.asarray, *(2 * [lambda x: x[:1].repeat(len(x), axis=0)])), None
    ),
    "values read as (T, D)": Bug(
        "h.0.attn.v",
        ("head_split",),
        in_qkv(np.asarray, np.asarray, lambda x: x.swapaxes(-1, -2).reshape(x.shape)),
        None,
    ),
    "window of 5 in every second layer": Bug(
        "h.0.attn.probs",
        ("mask_shape",),
        {"seen": lambda s, i, T, S, m: np.tri(T, S, 0, bool) & ~np.tri(T, S, -5, bool)},
        (0, 2),
    ),
    "token types of zeros": Bug(
        "embed", ("token_types",), {"embed": lambda s, i, ids, p: s.w.wte[ids] + s.w.wpe[p] + s.w.wte[0]}
    ),
    "head not transposed": Bug(
        "logits",
        ("transposed",),
        {"logits": lambda s, i, x: x @ s.w.lm_head.reshape(s.w.lm_head.shape[::-1])},
    ),
    "layer 1 twice": Bug("h.1.resid_post", ("layer_repeated",), {"resid_post": twice}),
    "one other token": Bug("embed", ("token_ids",), {"embed": other_token}, outputs_tell=False),
    "layer 1 left out": Bug(
        "h.1.resid_mid",
        ("layer_dropped",),
        {"resid_mid": lambda s, i, x, y, n: x, "resid_post": lambda s, i, x, y, n: x},
    ),
    "layers 1 and 2 exchanged": Bug(
        "h.1.ln_1",
        ("layer_order", "other_layer"),  # of taps, the first one shows the first of the weights
        {},
        weights=lambda w: w._replace(h=(w.h[0], w.h[2], w.h[1])),
    ),
    "ln_2 is ln_1": Bug(
        "h.0.ln_2",
        ("other_layer",),
        {},
        weights=lambda w: w._replace(h=tuple(b._replace(ln_2=b.ln_1) for b in w.h)),
    ),
    "ten largest logits": Bug("logits", ("logits_form",), mapped("logits", largest)),
    "logits one position late": Bug("logits", ("output_order",), mapped("logits", lambda x: np.roll(x, 1, 1))),
    "vocabulary rolled": Bug("logits", ("output_order",), mapped("logits", lambda x: np.roll(x, 1, -1))),
}
