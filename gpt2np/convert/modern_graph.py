"""A modern graph, opset 17 and newer, with the inputs that Hugging Face's Optimum gives its exports."""

from __future__ import annotations

import numpy as np

from .builder import GPT2Builder, GraphBuilder


class ModernBuilder(GPT2Builder):
    """LayerNormalization, an attention_mask, position_ids and, if wanted, keys and values of the past."""

    def build(self) -> GraphBuilder:
        g, c, top = self.graph, self.config, self.scope
        past, total = "past_sequence_length", "past_sequence_length + sequence_length"
        ids: list[int | str] = ["batch_size", "sequence_length"]
        if not self.with_past:
            total = "sequence_length"
        g.inputs.append(self.value("input_ids", np.int64, ids))
        g.inputs.append(self.value("attention_mask", np.int64, ["batch_size", total]))
        g.inputs.append(self.value("position_ids", np.int64, ids))
        output = "logits" if self.lm_head else "last_hidden_state"
        g.outputs.append(self.value(output, np.float32, [*ids, c.vocab_size if self.lm_head else c.n_embd]))
        if self.with_past:
            for i in range(c.n_layer):
                for part in ("key", "value"):
                    name, H, D = f"past_key_values.{i}.{part}", c.n_head, c.head_size
                    g.inputs.append(self.value(name, np.float32, ["batch_size", H, past, D]))
                    g.outputs.append(self.value(f"present.{i}.{part}", np.float32, ["batch_size", H, total, D]))

        positions = "position_ids"
        if c.position_offset:
            positions = g.op(top, "Add", positions, g.constant(top, c.position_offset))
        wte = self.weight("wte.weight")
        vectors = g.op(f"{top}/wte", "Gather", wte, "input_ids")
        x = g.op(top, "Add", vectors, g.op(f"{top}/wpe", "Gather", self.weight("wpe.weight"), positions))
        mask = self.mask(top)
        for i in range(c.n_layer):
            x = self.block(i, x, mask, f"{top}/h.{i}")
        x = self.layer_norm(x, "ln_f", f"{top}/ln_f", output="" if self.lm_head else output)
        if self.lm_head:
            table = wte if c.tied else self.weight("lm_head.weight")
            self.head(x, g.op("/lm_head", "Transpose", table, perm=[1, 0]), output)
        return g

    def mask(self, scope: str) -> str:
        """(B, 1, T, S), to be added to the scores: 0 where a key is neither in the future nor padding."""
        g = self.graph
        length, total = g.dim(scope, "input_ids", 1), g.dim(scope, "attention_mask", 1)
        zero, one = g.constant(scope, 0), g.constant(scope, 1)
        first = g.op(scope, "Sub", total, length)
        queries = g.op(scope, "Range", first, total, one)  # (T,) places in the whole sequence
        keys = g.op(scope, "Range", zero, total, one)  # (S,)
        if self.config.mask.shift:
            queries = g.op(scope, "Add", queries, g.constant(scope, self.config.mask.shift))
        causal = g.op(scope, "LessOrEqual", g.unsqueeze(scope, keys, 0), g.unsqueeze(scope, queries, 1))  # (T, S)
        real = g.op(scope, "Cast", "attention_mask", to=9)
        real = g.unsqueeze(scope, g.unsqueeze(scope, real, 1), 1)  # (B, S) -> (B, 1, 1, S)
        allowed = g.op(scope, "And", causal, real)
        values = (g.constant(scope, value, np.float32) for value in (0, self.config.mask.value))
        return str(g.op(scope, "Where", allowed, *values))

    def layer_norm(self, x: str, name: str, scope: str, output: str = "") -> str:
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        epsilon = self.config.epsilon(name)
        return str(self.graph.op(scope, "LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon, output=output))

    def linear(self, x: str, name: str, scope: str) -> str:
        y = self.graph.op(scope, "MatMul", x, self.weight(f"{name}.weight"))
        return str(self.graph.op(scope, "Add", y, self.weight(f"{name}.bias")))

    def attention(self, i: int, x: str, mask: str, scope: str) -> str:
        g = self.graph
        H, D = self.config.n_head, self.config.head_size
        qkv = g.split(scope, self.linear(x, f"h.{i}.attn.c_attn", f"{scope}/c_attn"), [H * D] * 3, axis=-1)
        shape = g.constant(scope, [0, 0, H, D])  # 0: as in the input
        q, k, v = (g.op(scope, "Transpose", g.op(scope, "Reshape", p, shape), perm=[0, 2, 1, 3]) for p in qkv)
        if self.with_past:
            k = g.op(scope, "Concat", f"past_key_values.{i}.key", k, axis=2, output=f"present.{i}.key")
            v = g.op(scope, "Concat", f"past_key_values.{i}.value", v, axis=2, output=f"present.{i}.value")
        scores = g.op(scope, "MatMul", q, g.op(scope, "Transpose", k, perm=[0, 1, 3, 2]))
        probs = g.op(scope, "Softmax", g.op(scope, "Add", self.scaled(scope, scores, i), mask), axis=-1)
        heads = g.op(scope, "Transpose", g.op(scope, "MatMul", probs, v), perm=[0, 2, 1, 3])
        heads = g.op(scope, "Reshape", heads, g.constant(scope, [0, 0, H * D]))
        return self.linear(heads, f"h.{i}.attn.c_proj", f"{scope}/c_proj")

    def block(self, i: int, x: str, mask: str, scope: str) -> str:
        g = self.graph
        normed = self.layer_norm(x, f"h.{i}.ln_1", f"{scope}/ln_1")
        x = g.op(scope, "Add", x, self.attention(i, normed, mask, f"{scope}/attn"))
        normed = self.layer_norm(x, f"h.{i}.ln_2", f"{scope}/ln_2")
        hidden = self.linear(normed, f"h.{i}.mlp.c_fc", f"{scope}/mlp/c_fc")
        hidden = self.activation(f"{scope}/mlp", hidden, i)
        return str(g.op(scope, "Add", x, self.linear(hidden, f"h.{i}.mlp.c_proj", f"{scope}/mlp/c_proj")))
