"""A port of GPT-2, written out on its own, and the mistakes that ports make: the debugger's judge.

`Port` computes a forward pass step by step in float32; `port_bugs.PORTS` replaces steps by mistaken ones.
Nothing here uses gpt2np's own operations: a mistake in these would otherwise hide in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray
Step = Callable[..., Array]


class Port:
    """One forward pass. Weights come from `gpt2np.load(...).weights`; a step is a method that a bug replaces."""

    def __init__(self, weights: Any, layers: set[int] | None = None) -> None:
        self.w, self.layers = weights, layers  # layers: where the mistake is made; None: in every one
        self.wrong: dict[str, Step] = {}
        self.taps: dict[str, Array] = {}
        self.H = weights.h[0].attn.n_head

    def step(self, name: str, layer: int | None, *x: Any) -> Array:
        here = layer is None or self.layers is None or layer in self.layers
        f = self.wrong[name].__get__(self) if name in self.wrong and here else getattr(self, name)
        return np.asarray(f(layer, *x), np.float32)

    # the steps, right
    def embed(self, i: None, ids: Array, positions: Array) -> Array:
        return self.w.wte[ids] + self.w.wpe[positions]

    def normalised(self, x: Array, epsilon: float) -> Array:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)

    def ln_1(self, i: int, x: Array) -> Array:
        weight, bias, epsilon = self.w.h[i].ln_1
        return self.normalised(x, epsilon) * weight + bias

    def ln_2(self, i: int, x: Array) -> Array:
        weight, bias, epsilon = self.w.h[i].ln_2
        return self.normalised(x, epsilon) * weight + bias

    def ln_f(self, i: None, x: Array) -> Array:
        weight, bias, epsilon = self.w.ln_f
        return self.normalised(x, epsilon) * weight + bias

    def c_attn(self, i: int, x: Array) -> Array:
        weight, bias = self.w.h[i].attn.c_attn
        return x @ weight + bias  # (B, T, 3HD)

    def split(self, i: int, qkv: Array) -> Array:
        B, T, width = qkv.shape
        return qkv.reshape(B, T, 3, self.H, width // (3 * self.H)).transpose(2, 0, 3, 1, 4)  # (3, B, H, T, D)

    def joined(self, i: int, past: Array | None, new: Array) -> Array:
        return new if past is None else np.concatenate([past, new], axis=2)

    def scores(self, i: int, q: Array, keys: Array) -> Array:
        return q @ keys.swapaxes(-1, -2) * np.float32(self.w.h[i].attn.scale)

    def seen(self, i: int, T: int, S: int, mask: Array | None) -> Array:
        causal = np.tri(T, S, S - T, dtype=bool)
        return causal if mask is None else causal & np.asarray(mask, bool)[:, None, None, :]

    def probs(self, i: int, scores: Array, seen: Array) -> Array:
        scores = np.where(seen, scores, np.finfo(np.float32).min)
        exps = np.exp(scores - scores.max(-1, keepdims=True))
        return exps / exps.sum(-1, keepdims=True)

    def heads(self, i: int, probs: Array, values: Array) -> Array:
        mixed = (probs @ values).transpose(0, 2, 1, 3)
        return mixed.reshape(*mixed.shape[:2], -1)

    def out(self, i: int, x: Array) -> Array:
        weight, bias = self.w.h[i].attn.c_proj
        return x @ weight + bias

    def resid_mid(self, i: int, x: Array, out: Array, normed: Array) -> Array:
        return x + out

    def c_fc(self, i: int, x: Array, stream: Array) -> Array:
        weight, bias = self.w.h[i].mlp.c_fc
        return x @ weight + bias

    def gelu(self, i: int, x: Array) -> Array:
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))

    def mlp(self, i: int, x: Array) -> Array:
        weight, bias = self.w.h[i].mlp.c_proj
        return x @ weight + bias

    def resid_post(self, i: int, x: Array, out: Array, normed: Array) -> Array:
        return x + out

    def logits(self, i: None, x: Array) -> Array:
        return x @ self.w.lm_head.T

    def run(
        self, ids: Array, positions: Array | None = None, past: list[Array] | None = None, mask: Array | None = None
    ) -> list[Array]:
        """All taps into `self.taps`; the presents, L x (2, B, H, S, D)."""
        P = 0 if past is None else past[0].shape[3]
        B, T = ids.shape
        positions = np.broadcast_to(np.arange(P, P + T), (B, T)) if positions is None else positions
        t, presents = self.taps, []
        x = t["embed"] = self.step("embed", None, ids, positions)
        for i in range(len(self.w.h)):
            n = f"h.{i}"
            normed = t[f"{n}.ln_1"] = self.step("ln_1", i, x)
            q, k, v = self.step("split", i, self.step("c_attn", i, normed))
            t[f"{n}.attn.q"], t[f"{n}.attn.k"], t[f"{n}.attn.v"] = q, k, v
            before = (None, None) if past is None else past[i]
            keys, values = (self.step("joined", i, old, new) for old, new in zip(before, (k, v), strict=True))
            presents.append(np.stack([keys, values]))
            scores = t[f"{n}.attn.scores"] = self.step("scores", i, q, keys)
            seen = self.step("seen", i, T, keys.shape[2], mask).astype(bool)
            probs = t[f"{n}.attn.probs"] = self.step("probs", i, scores, seen)
            heads = t[f"{n}.attn.heads"] = self.step("heads", i, probs, values)
            out = t[f"{n}.attn.out"] = self.step("out", i, heads)
            middle = t[f"{n}.resid_mid"] = self.step("resid_mid", i, x, out, normed)
            normed = t[f"{n}.ln_2"] = self.step("ln_2", i, middle)
            c_fc = t[f"{n}.mlp.c_fc"] = self.step("c_fc", i, normed, middle)
            gelu = t[f"{n}.mlp.gelu"] = self.step("gelu", i, c_fc)
            out = t[f"{n}.mlp.out"] = self.step("mlp", i, gelu)
            x = t[f"{n}.resid_post"] = self.step("resid_post", i, middle, out, normed)
        x = t["ln_f"] = self.step("ln_f", None, x)
        t["logits"] = self.step("logits", None, x)
        return presents
