"""The graph of the ONNX Model Zoo's GPT-2: opsets 10 to 16, node by node and name by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UnsupportedModelError
from .builder import GPT2Builder, GraphBuilder

if TYPE_CHECKING:
    import onnx


class ZooBuilder(GPT2Builder):
    """The graph of gpt2-10.onnx (hidden states) and gpt2-lm-head-10.onnx, operation by operation."""

    def build(self) -> GraphBuilder:
        g, c, top = self.graph, self.config, self.scope
        C, H, D = c.n_embd, c.n_head, c.head_size
        if not math.isfinite(c.mask.value):
            raise UnsupportedModelError("the zoo's graph multiplies with mask.value, which must therefore be finite")
        axes: list[int | str] = [f"input1_dynamic_axes_{i}" for i in (1, 2, 3)]
        g.inputs.append(self.value("input1", np.int64, axes))
        g.outputs.append(self.value("output1", np.float32, [*axes, c.vocab_size if self.lm_head else C]))

        dims = [g.dim(top, "input1", axis) for axis in range(3)]
        flat = [g.concat(top, g.constant(top, [-1]), g.unsqueeze(top, dims[2], 0)) for _ in range(2)]
        ids = g.op(top, "Reshape", "input1", flat[0])  # (d1, d2, T) -> (B, T)
        x = g.op(top, "Add", self.gather("wte", ids), self.gather("wpe", self.positions(dims[2], flat[1])))
        width = g.dim(top, x, 2)
        for i in range(c.n_layer):
            x = self.block(i, x, f"{top}/h.{i}")
            present: list[int | str] = [2, *(f"output{i + 2}_dim_{axis}" for axis in (1, 2, 3, 4))]
            present[2], present[4] = H, D
            g.outputs.append(self.value(f"output{i + 2}", np.float32, present))
        x = self.layer_norm(x, "ln_f", f"{top}/ln_f")
        shape = g.concat(top, *(g.unsqueeze(top, dim, 0) for dim in (*dims, width)))
        x = g.op(top, "Reshape", x, shape, output="" if self.lm_head else "output1")  # (B, T, C) -> (d1, d2, T, C)
        if self.lm_head:  # PyTorch's exporter folds the transposition, and so stores the tied matrix again, as (C, V)
            self.head(x, self.weight("wte.weight" if c.tied else "lm_head.weight", transposed=True), "output1")
        return g

    def gather(self, name: str, ids: str) -> str:
        return str(self.graph.op(f"{self.scope}/{name}", "Gather", self.weight(f"{name}.weight"), ids))

    def positions(self, length: str, shape: str) -> str:
        """0 .. T - 1 as (1, T), by the detour that PyTorch's exporter takes for arange at opset 10."""
        g, top = self.graph, self.scope
        past = g.constant(top, [0])
        first = g.constant(top, [self.config.position_offset]) if self.config.position_offset else past
        count = g.op(top, "Sub", g.unsqueeze(top, g.op(top, "Cast", length, to=7), 0), past)
        ones = g.op(top, "ConstantOfShape", count, value=_int64_one())
        steps = g.op(top, "Transpose", g.op(top, "NonZero", ones), perm=[1, 0])
        if g.opset < 13:
            steps = g.op(top, "Squeeze", steps, axes=[1])
        else:
            steps = g.op(top, "Squeeze", steps, g.constant(top, [1]))
        steps = g.op(top, "Cast", g.op(top, "Add", steps, first), to=7)
        return str(g.op(top, "Reshape", g.unsqueeze(top, steps, 0), shape))

    def layer_norm(self, x: str, name: str, scope: str) -> str:
        g = self.graph
        centred = g.op(scope, "Sub", x, g.op(scope, "ReduceMean", x, axes=[-1]))
        square = g.op(scope, "Pow", centred, g.constant(scope, 2, np.float32))
        variance = g.op(scope, "ReduceMean", square, axes=[-1])
        epsilon = g.constant(scope, self.config.epsilon(name), np.float32)
        root = g.op(scope, "Sqrt", g.op(scope, "Add", variance, epsilon))
        scaled = g.op(scope, "Mul", g.op(scope, "Div", centred, root), self.weight(f"{name}.weight"))
        return str(g.op(scope, "Add", scaled, self.weight(f"{name}.bias")))

    def linear(self, x: str, name: str, scope: str) -> str:
        """Conv1D of transformers: (B, T, inputs) -> (B * T, inputs) -> Gemm -> (B, T, outputs)."""
        g = self.graph
        batch, length, inputs = (g.dim(scope, x, axis) for axis in range(3))
        rows = g.op(scope, "Reshape", x, g.concat(scope, g.constant(scope, [-1]), g.unsqueeze(scope, inputs, 0)))
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        y = g.op(scope, "Gemm", rows, weight, bias, alpha=1.0, beta=1.0)
        outputs = g.constant(scope, list(self.weights[f"{name}.bias"].shape))
        shape = g.concat(scope, g.unsqueeze(scope, batch, 0), g.unsqueeze(scope, length, 0), outputs)
        return str(g.op(scope, "Reshape", y, shape))

    def heads(self, x: str, perm: list[int], scope: str) -> tuple[str, str]:
        """(B, T, HD) -> (B, T, H, D), and the same transposed."""
        g = self.graph
        H = self.config.n_head
        batch, length, width = (g.dim(scope, x, axis) for axis in range(3))
        size = g.op(scope, "Div", width, g.constant(scope, H))
        size = g.op(scope, "Cast", g.op(scope, "Cast", size, to=7), to=7)
        start = [g.unsqueeze(scope, batch, 0), g.unsqueeze(scope, length, 0), g.constant(scope, [H])]
        x = g.op(scope, "Reshape", x, g.concat(scope, *start, g.unsqueeze(scope, size, 0)))
        return x, str(g.op(scope, "Transpose", x, perm=perm))

    def mask(self, i: int, scores: str, scope: str) -> str:
        """Scores (B, H, T, S) with the future masked by the buffer attn.bias (1, 1, N, N)."""
        g, N = self.graph, self.config.n_ctx
        dtype = np.uint8 if self.lm_head else np.float32
        allowed = self.initializer(
            f"{self.prefix}h.{i}.attn.bias",
            dtype,
            (1, 1, N, N),
            lambda: iter([np.tri(N, N, self.config.mask.shift, dtype)]),
        )
        rows, columns = g.dim(scope, scores, 2), g.dim(scope, scores, 3)
        first = g.op(scope, "Sub", columns, rows)
        axis = g.constant(scope, [2])
        bounds = g.unsqueeze(scope, first, 0), g.unsqueeze(scope, columns, 0)
        allowed = g.op(scope, "Slice", allowed, *bounds, axis, g.constant(scope, [1]))
        axis, start = g.constant(scope, [3]), g.constant(scope, [0])
        end = g.unsqueeze(scope, columns, 0)
        allowed = g.op(scope, "Slice", allowed, start, end, axis, g.constant(scope, [1]))
        if self.lm_head:
            value = g.constant(scope, self.config.mask.value, np.float32)
            return str(g.op(scope, "Where", g.op(scope, "Cast", allowed, to=9), scores, value))
        kept = g.op(scope, "Mul", scores, allowed)
        forbidden = g.op(scope, "Sub", g.constant(scope, 1, np.float32), allowed)
        penalty = g.op(scope, "Mul", forbidden, g.constant(scope, -self.config.mask.value, np.float32))
        return str(g.op(scope, "Sub", kept, penalty))

    def attention(self, i: int, x: str, scope: str) -> str:
        g = self.graph
        HD = self.config.n_head * self.config.head_size
        x = self.linear(x, f"h.{i}.attn.c_attn", f"{scope}/c_attn")
        parts = g.split(scope, x, [HD] * 3, axis=2)
        _, q = self.heads(parts[0], [0, 2, 1, 3], scope)  # (B, H, T, D)
        k, k_transposed = self.heads(parts[1], [0, 2, 3, 1], scope)  # (B, H, D, T)
        _, v = self.heads(parts[2], [0, 2, 1, 3], scope)
        k = g.op(scope, "Transpose", k, perm=[0, 2, 1, 3])
        present = g.unsqueeze(scope, k, 0), g.unsqueeze(scope, v, 0)
        g.op(scope, "Concat", *present, axis=0, output=f"output{i + 2}")
        scores = self.scaled(scope, g.op(scope, "MatMul", q, k_transposed), i)
        probs = g.op(scope, "Softmax", self.mask(i, scores, scope), axis=3)
        x = g.op(scope, "Transpose", g.op(scope, "MatMul", probs, v), perm=[0, 2, 1, 3])
        batch, length, head, size = (g.dim(scope, x, axis) for axis in range(4))
        width = g.op(scope, "Mul", head, size)
        x = g.op(scope, "Reshape", x, g.concat(scope, *(g.unsqueeze(scope, d, 0) for d in (batch, length, width))))
        return self.linear(x, f"h.{i}.attn.c_proj", f"{scope}/c_proj")

    def block(self, i: int, x: str, scope: str) -> str:
        g = self.graph
        normed = self.layer_norm(x, f"h.{i}.ln_1", f"{scope}/ln_1")
        x = g.op(scope, "Add", x, self.attention(i, normed, f"{scope}/attn"))
        normed = self.layer_norm(x, f"h.{i}.ln_2", f"{scope}/ln_2")
        hidden = self.linear(normed, f"h.{i}.mlp.c_fc", f"{scope}/mlp/c_fc")
        hidden = self.activation(f"{scope}/mlp", hidden, i)
        return str(g.op(scope, "Add", x, self.linear(hidden, f"h.{i}.mlp.c_proj", f"{scope}/mlp/c_proj")))


def _int64_one() -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array([1], np.int64))
