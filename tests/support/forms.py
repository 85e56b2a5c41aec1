"""GPT-2 graphs in forms that the writer does not make, node by node, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

L, H, D, F, V, N = 2, 3, 8, 40, 37, 24
C = H * D

Attention = Callable[["Form", int, str], str]


class Form:
    """A graph under construction; `op` adds a node and returns its output's name."""

    def __init__(self, seed: int = 0, opset: int = 20) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.norm: Callable[[Form, str, str], str] | None = None  # another spelling of layer norms

    def op(self, op: str, *inputs: str, out: str | Sequence[str] = "", domain: str = "", **attributes: Any) -> str:
        names = [out] if isinstance(out, str) else list(out)
        names[0] = names[0] or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, names, names[0], domain=domain, **attributes))
        return names[0]

    def constant(self, value: Any, dtype: Any = None) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(list(values), np.int64)

    def weight(self, name: str, *shape: int) -> str:
        value = self.rng.standard_normal(shape) * (0.3 if name.startswith(("wte", "wpe")) else shape[0] ** -0.5)
        if name.endswith(".bias"):
            value = 0.1 * self.rng.standard_normal(shape)
        elif "ln_" in name:
            value = 1 + 0.2 * self.rng.standard_normal(shape)
        if not any(t.name == name for t in self.initializers):
            self.initializers.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def input(self, name: str, dtype: Any, *shape: int | str) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, *shape: int | str, dtype: Any = np.float32) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def size(self, value: str, axis: int) -> str:
        """One size of a value, as a vector of one element."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def layer_norm(self, x: str, name: str) -> str:
        if self.norm is not None:
            return self.norm(self, x, name)
        return self.op("LayerNormalization", x, self.weight(f"{name}.weight", C), self.weight(f"{name}.bias", C))

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        product = self.op("MatMul", x, self.weight(f"{name}.weight", inputs, outputs))
        return self.op("Add", product, self.weight(f"{name}.bias", outputs))

    def embed(self, ids: str, past: str = "", axis: int = 2) -> str:
        """Rows of wte and wpe; positions follow those of a past, if there is one."""
        scalar = self.constant(0, np.int64)
        start = self.op("Squeeze", self.size(past, axis)) if past else scalar
        stop = self.op("Add", start, self.op("Squeeze", self.size(ids, 1)))
        positions = self.op("Range", start, stop, self.constant(1, np.int64))
        words = self.op("Gather", self.weight("wte.weight", V, C), ids)
        return self.op("Add", words, self.op("Gather", self.weight("wpe.weight", N, C), positions))

    def blocks(self, x: str, attention: Attention, hidden: bool = False) -> str:
        """All blocks and the last layer norm: (B, T, C)."""
        for i in range(L):
            if hidden:
                self.op("Identity", x, out=self.output(f"hidden_{i}", "B", "T", C))
            heads = attention(self, i, self.layer_norm(x, f"h.{i}.ln_1"))
            x = self.op("Add", x, self.projected(heads, f"h.{i}.attn.c_proj"))
            fc = self.linear(self.layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc", C, F)
            x = self.op("Add", x, self.linear(self.op("Gelu", fc, approximate="tanh"), f"h.{i}.mlp.c_proj", F, C))
        return self.layer_norm(x, "ln_f")

    def projected(self, heads: str, name: str) -> str:
        """c_proj of merged heads (B, T, C), or of heads apart (B, T, H, D)."""
        apart = next(n for n in self.nodes if heads in n.output).op_type == "Einsum"
        if not apart:
            return self.linear(heads, name, C, C)
        product = self.op("Einsum", heads, self.weight(f"{name}.weight", H, D, C), equation="bthd,hdc->btc")
        return self.op("Add", product, self.weight(f"{name}.bias", C))

    def head(self, x: str, rows: int = V) -> None:
        """Logits by wte, or by a head of its own where it has other rows."""
        if rows == V:
            weight = self.op("Transpose", self.weight("wte.weight", V, C))
        else:
            wte = numpy_helper.to_array(next(t for t in self.initializers if t.name == "wte.weight"))
            more = self.rng.standard_normal((rows - V, C)).astype(np.float32)
            weight = self.constant(np.concatenate([wte, more]).T.copy())
        self.op("MatMul", x, weight, out=self.output("logits", "B", "T", rows))

    def save(self, path: Path) -> Path:
        graph = helper.make_graph(self.nodes, "gpt2", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
        return path


def split_heads(form: Form, x: str) -> str:
    """(B, T, HD) -> (B, H, T, D)"""
    return form.op("Transpose", form.op("Reshape", x, form.ints(0, 0, H, D)), perm=[0, 2, 1, 3])


def qkv(form: Form, i: int, x: str) -> list[str]:
    """Queries, keys and values side by side, 3 x (B, T, HD)."""
    names = [f"{what}_{i}" for what in "qkv"]
    form.op("Split", form.linear(x, f"h.{i}.attn.c_attn", C, 3 * C), out=names, axis=2, num_outputs=3)
    return names


def written_out(
    mask: Callable[[Form, str], str], past: bool = False, cached: Callable[[int], int | str] | None = None
) -> Attention:
    """Attention as plain nodes; `mask` takes the scaled scores (B, H, T, S)."""

    def attention(form: Form, i: int, x: str) -> str:
        q, k, v = (split_heads(form, part) for part in qkv(form, i, x))
        if past:
            length = "P" if cached is None else cached(i)
            for which, value in (("key", k), ("value", v)):
                old = form.input(f"past_{which}_{i}", np.float32, "B", H, length, D)
                new = form.output(f"present_{which}_{i}", "B", H, "S", D)
                form.op("Concat", old, value, out=new, axis=2)
            k, v = f"present_key_{i}", f"present_value_{i}"
        scores = form.op("MatMul", q, form.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = form.op("Mul", scores, form.constant(D**-0.5, np.float32))
        probs = form.op("Softmax", mask(form, scores), axis=-1)
        heads = form.op("Transpose", form.op("MatMul", probs, v), perm=[0, 2, 1, 3])
        return form.op("Reshape", heads, form.ints(0, 0, C))

    return attention


def causal(form: Form, scores: str) -> str:
    """Scores of later keys become -1e4, by a buffer (N, N) of which queries and keys are cut out."""
    T, S = form.size(scores, 2), form.size(scores, 3)
    buffer = form.constant(np.tri(N, dtype=bool))
    rows = form.op("Slice", buffer, form.op("Sub", S, T), S, form.ints(0))
    keep = form.op("Slice", rows, form.ints(0), S, form.ints(1))
    return form.op("Where", keep, scores, form.constant(-1e4, np.float32))


# ------------------------------------------------------------------------------------------------ fused attention
def fused(form: Form, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
    """A node of com.microsoft; inputs that are left out at the end are dropped."""
    last = max(k for k, name in enumerate(inputs) if name)
    return form.op(op, *inputs[: last + 1], out=outputs, domain="com.microsoft", num_heads=H, **attributes)


def buffers(form: Form, i: int, rows: int | str) -> tuple[list[str], list[str]]:
    """Past inputs and present outputs of one layer, keys and values apart; `rows` of a buffer, or "P" of a past."""
    pasts = [form.input(f"past_{what}_{i}", np.float32, "B", H, rows, D) for what in ("key", "value")]
    last = "S" if rows == "P" else rows
    return pasts, [form.output(f"present_{what}_{i}", "B", H, last, D) for what in ("key", "value")]


def contrib_attention(op: str = "Attention", rows: int | str = "P", mask: str = "") -> Attention:
    """Attention or DecoderMaskedSelfAttention: c_attn inside, keys and values in one tensor."""

    def attention(form: Form, i: int, x: str) -> str:
        name = f"h.{i}.attn.c_attn"
        weights = [form.weight(f"{name}.weight", C, 3 * C), form.weight(f"{name}.bias", 3 * C)]
        past = form.input(f"past_{i}", np.float32, 2, "B", H, rows, D)
        present = form.output(f"present_{i}", 2, "B", H, "S" if rows == "P" else rows, D)
        length = "" if rows == "P" else "past_sequence_length"
        how = {} if rows == "P" else {"past_present_share_buffer": 1}
        how |= {"unidirectional": 1} if op == "Attention" else {}
        return fused(form, op, [x, *weights, mask, past, "", length], [f"heads_{i}", present], **how)

    return attention


def multi_head_attention(
    rows: int | str = "P", mask: str = "", score_bias: str = "", split_bias: bool = False
) -> Attention:
    """MultiHeadAttention; with `split_bias` it adds c_attn's bias behind the split."""

    def attention(form: Form, i: int, x: str) -> str:
        bias = ""
        if split_bias:
            names = [f"{what}_{i}" for what in "qkv"]
            product = form.op("MatMul", x, form.weight(f"h.{i}.attn.c_attn.weight", C, 3 * C))
            form.op("Split", product, out=names, axis=2, num_outputs=3)
            bias = form.weight(f"h.{i}.attn.c_attn.bias", 3 * C)
        else:
            names = qkv(form, i, x)
        pasts, presents = buffers(form, i, rows)
        inputs = [*names, bias, mask, score_bias, *pasts, "" if rows == "P" else "past_sequence_length"]
        how = {} if score_bias else {"unidirectional": 1}
        return fused(form, "MultiHeadAttention", inputs, [f"heads_{i}", *presents], **how)

    return attention


def decoder_masked_attention(rows: int | str, mask: str = "", beams: bool = False) -> Attention:
    """DecoderMaskedMultiHeadAttention: one new position; the past may be one of a beam search."""

    def attention(form: Form, i: int, x: str) -> str:
        names = qkv(form, i, x)
        pasts, presents = buffers(form, i, rows)
        rest = ["past_sequence_length"] if rows != "P" else [""]
        rest += ["beam_width", "cache_indirection"] if beams else []
        how = {"past_present_share_buffer": 1} if rows != "P" else {}
        inputs = [*names, mask, "", *pasts, *rest]
        return fused(form, "DecoderMaskedMultiHeadAttention", inputs, [f"heads_{i}", *presents], **how)

    return attention


def group_query_attention(rows: int | str = "P", packed: bool = False, score_bias: str = "", **how: Any) -> Attention:
    def attention(form: Form, i: int, x: str) -> str:
        names = [form.linear(x, f"h.{i}.attn.c_attn", C, 3 * C), "", ""] if packed else qkv(form, i, x)
        pasts, presents = buffers(form, i, rows)
        inputs = [*names, *pasts, "seqlens_k", "total_sequence_length", "", "", "", score_bias]
        return fused(form, "GroupQueryAttention", inputs, [f"heads_{i}", *presents], **{"kv_num_heads": H, **how})

    return attention


# ------------------------------------------------------------------------------------------------ other spellings
def einsum_attention(form: Form, i: int, x: str) -> str:
    """Maps with an axis of heads, as Keras and Flax have them: (B, T, C) -> (B, T, H, D) and back."""
    parts = []
    for what in "qkv":
        weight, bias = form.weight(f"h.{i}.{what}.weight", C, H, D), form.weight(f"h.{i}.{what}.bias", H, D)
        parts.append(form.op("Add", form.op("Einsum", x, weight, equation="btc,chd->bthd"), bias))
    q, k, v = parts
    q = form.op("Mul", q, form.constant(D**-0.5, np.float32))
    scores = form.op("Einsum", k, q, equation="bshd,bthd->bhts")
    probs = form.op("Softmax", causal(form, scores), axis=-1)
    return form.op("Einsum", probs, v, equation="bhts,bshd->bthd")


def ellipsis_attention(form: Form, i: int, x: str) -> str:
    q, k, v = (split_heads(form, part) for part in qkv(form, i, x))
    scores = form.op("Einsum", q, k, equation="...td,...sd->...ts")
    scores = form.op("Mul", scores, form.constant(D**-0.5, np.float32))
    probs = form.op("Softmax", causal(form, scores), axis=-1)
    heads = form.op("Einsum", probs, v, equation="...ts,...sd->...td")
    return form.op("Reshape", form.op("Transpose", heads, perm=[0, 2, 1, 3]), form.ints(0, 0, C))


def rearranged_norm(form: Form, x: str, name: str) -> str:
    """x * (gain / root) + (bias - mean * (gain / root)), as TensorFlow has it."""
    gain, bias = form.weight(f"{name}.weight", C), form.weight(f"{name}.bias", C)
    mean = form.op("ReduceMean", x, form.ints(-1))
    off = form.op("Sub", x, mean)
    variance = form.op("ReduceMean", form.op("Mul", off, off), form.ints(-1))
    root = form.op("Reciprocal", form.op("Sqrt", form.op("Add", variance, form.constant(1e-3, np.float32))))
    factor = form.op("Mul", root, gain)
    return form.op("Add", form.op("Mul", x, factor), form.op("Sub", bias, form.op("Mul", mean, factor)))


def norm_with_its_gain_in_the_root(form: Form, x: str, name: str) -> str:
    """(x - mean) * (gain / root) + bias, the variance from squares, as JAX has it."""
    gain, bias = form.weight(f"{name}.weight", C), form.weight(f"{name}.bias", C)
    mean = form.op("ReduceMean", x, form.ints(-1))
    squares = form.op("ReduceMean", form.op("Mul", x, x), form.ints(-1))
    variance = form.op("Sub", squares, form.op("Mul", mean, mean))
    root = form.op("Reciprocal", form.op("Sqrt", form.op("Add", variance, form.constant(1e-3, np.float32))))
    return form.op("Add", form.op("Mul", form.op("Sub", x, mean), form.op("Mul", root, gain)), bias)
