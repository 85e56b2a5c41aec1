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
        outputs_tell=False,
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
