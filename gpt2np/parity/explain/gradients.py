"""Reverse mode through the operations: how much each weight could have caused a difference.

Used by the probes to find a single wrong weight element among millions: the gradient of the error with
respect to every element costs one backward pass. Only unmodified operations are differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import Program, split_tap, tap_inputs

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


class Gradients:
    """Cotangents flow from the observed taps back to the weights of `taps`, in float64."""

    def __init__(self, program: Program, call: Call, values: Mapping[str, Array], taps: Sequence[str]) -> None:
        self.program, self.call, self.values, self.taps = program, call, values, list(taps)

    def __call__(self, cotangents: Mapping[str, Array]) -> dict[str, Array]:
        """{weight name: sum over the observed taps of cotangent . d tap / d weight}, and None-free."""
        flow: dict[str, Array] = {tap: np.array(value, np.float64) for tap, value in cotangents.items()}
        grads: dict[str, Array] = {}
        for tap in reversed(self.taps):
            if tap in flow:
                self._back(tap, flow.pop(tap), flow, grads)
        return grads

    def _give(self, flow: dict[str, Array], tap: str, cotangent: Array) -> None:
        if tap in self.taps:
            flow[tap] = flow[tap] + cotangent if tap in flow else cotangent

    def _back(self, tap: str, g: Array, flow: dict[str, Array], grads: dict[str, Array]) -> None:
        p, call = self.program, self.call
        layer, part = split_tap(tap)
        names = tap_inputs(tap, p.config)
        x = [self.values[n] for n in names]

        def add(name: str, grad: Array) -> None:
            grads[name] = grads[name] + grad if name in grads else grad

        def linear(name: str, columns: slice) -> None:
            w = p.weights(f"{name}.weight", F64)
            rows, flat = x[0].reshape(-1, x[0].shape[-1]), g2.reshape(-1, g2.shape[-1])
            grad, bias = np.zeros(w.shape), np.zeros(w.shape[1])
            grad[:, columns], bias[columns] = rows.T @ flat, flat.sum(axis=0)
            add(f"{name}.weight", grad)
            add(f"{name}.bias", bias)
            self._give(flow, names[0], g2 @ w[:, columns].T)

        if part in ("ln_1", "ln_2", "ln_f"):
            w, _, eps = p.norm(tap, F64)
            centred = x[0] - x[0].mean(axis=-1, keepdims=True)
            root = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
            unit = centred / root
            axes = tuple(range(g.ndim - 1))
            add(f"{tap}.weight", (g * unit).sum(axis=axes))
            add(f"{tap}.bias", g.sum(axis=axes))
            gw = g * w
            inner = gw - gw.mean(axis=-1, keepdims=True) - unit * (gw * unit).mean(axis=-1, keepdims=True)
            self._give(flow, names[0], inner / root)
        elif part in ("attn.q", "attn.k", "attn.v"):
            width = g.shape[1] * g.shape[3]
            which = "qkv".index(part[-1])
            g2 = g.transpose(0, 2, 1, 3).reshape(g.shape[0], g.shape[2], width)  # (B, H, T, D) -> (B, T, HD)
            linear(f"{tap[:-2]}.c_attn", slice(which * width, (which + 1) * width))
        elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
            g2 = g
            linear(tap.replace(".out", ".c_proj"), slice(None))
        elif part == "attn.scores":
            assert layer is not None
            q, k = x
            keys = k if call.past is None else np.concatenate([call.past[layer][0].astype(F64), k], axis=2)
            scale = p.config.layer_scale(layer)
            self._give(flow, names[0], g @ keys * scale)
            self._give(flow, names[1], (g.swapaxes(-1, -2) @ q * scale)[:, :, call.start :])
        elif part == "attn.probs":
            probs = self.values[tap]
            self._give(flow, names[0], probs * (g - (g * probs).sum(axis=-1, keepdims=True)))
        elif part == "attn.heads":
            assert layer is not None
            probs, v = x
            B, H, T, D = v.shape
            values = v if call.past is None else np.concatenate([call.past[layer][1].astype(F64), v], axis=2)
            by_head = g.reshape(B, T, H, D).transpose(0, 2, 1, 3)  # (B, T, HD) -> (B, H, T, D)
            self._give(flow, names[0], by_head @ values.swapaxes(-1, -2))
            self._give(flow, names[1], (probs.swapaxes(-1, -2) @ by_head)[:, :, call.start :])
        elif part in ("resid_mid", "resid_post"):
            self._give(flow, names[0], g)
            self._give(flow, names[1], g)
        elif part == "mlp.gelu":
            step = 1e-5 * np.maximum(1.0, np.abs(x[0]))
            high, low = (p.run(tap, call, [x[0] + s], F64) for s in (step, -step))
            self._give(flow, names[0], g * (high - low) / (2 * step))
        elif part == "logits":
            flat = g.reshape(-1, g.shape[-1])
            add(p.head, flat.T @ x[0].reshape(-1, x[0].shape[-1]))
            if "lm_head.bias" in p.weights.sources:
                add("lm_head.bias", flat.sum(axis=0))
            self._give(flow, names[0], g @ p.weights(p.head, F64).astype(F64))
        elif part == "embed":
            width = g.shape[-1]
            tokens = np.zeros(p.weights("wte.weight", F64).shape)
            np.add.at(tokens, call.input_ids.ravel(), g.reshape(-1, width))
            positions = np.zeros(p.weights("wpe.weight", F64).shape)
            np.add.at(positions, call.position_ids.ravel(), g.reshape(-1, width))
            add("wte.weight", tokens)
            add("wpe.weight", positions)
