"""Quantised graphs as the float graphs that they stand for.

Quantisation tools replace float nodes by integer ones and round activations on the way. The weights in them are
exact numbers all the same, (integer - zero point) * scale, and the graph between them is the old one. So every
such node is rewritten, as the graph is read, into the float nodes that it approximates: values keep their
names, weights become DequantizeLinear of what the file holds, and rounding an activation becomes Identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...errors import UnsupportedModelError
from ..graph import ROUND, UNPACK, Graph, Node
from .rewriter import inner, rewritten

Rule = Callable[[Graph, Node], "list[Node] | None"]


def _float(graph: Graph, name: str, scale: str, zero: str, origin: Node, made: list[Node], **attributes: Any) -> str:
    """Name of the float value that a quantised operand stands for."""
    if not graph.holds(name):
        return name  # an activation: its rounding is undone
    inputs = (name, scale, zero) if zero else (name, scale)
    return inner(graph, origin, "DequantizeLinear", inputs, "as float", made, **attributes)


def _quantize(graph: Graph, node: Node) -> list[Node]:
    """Constants that are rounded as the file is run keep their exact values, too.

    A scale that the graph computes from the activation (DynamicQuantizeLinear before opset 11) becomes 1.
    """
    for name, value in zip(node.inputs[1:], (np.float32(1), np.uint8(0)), strict=False):
        if name and not graph.is_constant(name):
            graph.override(name, value)
    return [rewritten(node, "Identity", node.inputs[:1], node.outputs[0])]


def _dequantize(graph: Graph, node: Node) -> list[Node] | None:
    """Of an activation; of a constant, or of rows gathered from one, it is what it says."""
    return None if graph.holds(node.inputs[0]) else [rewritten(node, "Identity", node.inputs[:1], node.outputs[0])]


def _dynamic_quantize(graph: Graph, node: Node) -> list[Node]:
    """Output 1 and 2, scale and zero point of the activation, become 1 and 0: what they undo is not done."""
    for output, value in zip(node.outputs[1:], (np.float32(1), np.uint8(0)), strict=False):
        if output:
            graph.override(output, value)
    return [rewritten(node, "Identity", node.inputs[:1], node.outputs[0])]


def _matmul_integer(graph: Graph, node: Node) -> list[Node] | None:
    b = node.inputs[1]
    if not graph.holds(b):
        return [rewritten(node, "MatMul", node.inputs[:2], node.outputs[0])]
    made: list[Node] = []
    one = graph.override(f"one for {node.outputs[0]}", np.float32(1))
    weight = _float(graph, b, one, node.input(3), node, made, axis=-1)
    return [*made, rewritten(node, "MatMul", (node.inputs[0], weight), node.outputs[0])]


def _with_bias(graph: Graph, node: Node, made: list[Node], a: str, weight: str, bias: str) -> list[Node]:
    if not bias:
        return [*made, rewritten(node, "MatMul", (a, weight), node.outputs[0])]
    product = inner(graph, node, "MatMul", (a, weight), "without bias", made)
    return [*made, rewritten(node, "Add", (product, bias), node.outputs[0])]


def _matmul_integer_to_float(graph: Graph, node: Node) -> list[Node] | None:
    a, b, _, b_scale, _, b_zero, bias = (node.input(i) for i in range(7))
    made: list[Node] = []
    return _with_bias(graph, node, made, a, _float(graph, b, b_scale, b_zero, node, made, axis=-1), bias)


def _dynamic_quantize_matmul(graph: Graph, node: Node) -> list[Node] | None:
    a, b, b_scale, b_zero, bias = (node.input(i) for i in range(5))
    made: list[Node] = []
    return _with_bias(graph, node, made, a, _float(graph, b, b_scale, b_zero, node, made, axis=-1), bias)


def _qlinear_two(op: str) -> Rule:
    """y = op(a, b) with inputs a, scale, zero, b, scale, zero and the scale and zero of y."""

    def rule(graph: Graph, node: Node) -> list[Node]:
        made: list[Node] = []
        a = _float(graph, node.inputs[0], node.inputs[1], node.input(2), node, made, axis=-1)
        b = _float(graph, node.inputs[3], node.inputs[4], node.input(5), node, made, axis=-1)
        return [*made, rewritten(node, op, (a, b), node.outputs[0])]

    return rule


def _qlinear_one(op: str) -> Rule:
    def rule(graph: Graph, node: Node) -> list[Node]:
        attributes = {k: v for k, v in node.attributes.items() if k != "opset"}
        return [rewritten(node, op, node.inputs[:1], node.outputs[0], **attributes)]

    return rule


def _qlinear_concat(graph: Graph, node: Node) -> list[Node]:
    """inputs: scale and zero of y, then value, scale, zero of each part."""
    made: list[Node] = []
    parts = [
        _float(graph, node.inputs[i], node.inputs[i + 1], node.input(i + 2), node, made)
        for i in range(2, len(node.inputs), 3)
    ]
    return [*made, rewritten(node, "Concat", tuple(parts), node.outputs[0], axis=node.attributes["axis"])]


def _qlinear_where(graph: Graph, node: Node) -> list[Node]:
    """inputs: condition, then value, scale, zero of both branches, then scale and zero of y."""
    made: list[Node] = []
    x, y = (_float(graph, node.inputs[i], node.inputs[i + 1], node.input(i + 2), node, made, axis=-1) for i in (1, 4))
    return [*made, rewritten(node, "Where", (node.inputs[0], x, y), node.outputs[0])]


def _qgemm(graph: Graph, node: Node) -> list[Node]:
    a, a_scale, _, b, b_scale, b_zero, c = (node.input(i) for i in range(7))
    made: list[Node] = []
    axis = 0 if node.attributes.get("transB", 0) else 1
    weight = _float(graph, b, b_scale, b_zero, node, made, axis=axis)
    inputs: tuple[str, ...] = (a, weight)
    if c:  # int32, in units of a_scale * b_scale
        unit = inner(graph, node, "Mul", (a_scale, b_scale), "as unit of the bias", made)
        inputs = (*inputs, _float(graph, c, unit, "", node, made, axis=-1))
    attributes = {k: v for k, v in node.attributes.items() if k in ("transA", "transB", "alpha")}
    return [*made, rewritten(node, "Gemm", inputs, node.outputs[0], **attributes)]


def _qattention(graph: Graph, node: Node) -> list[Node]:
    a, weight, bias, a_scale, w_scale, mask, a_zero, w_zero, past = (node.input(i) for i in range(9))
    made: list[Node] = []
    inputs: tuple[str, ...]
    if graph.rounding:
        operands = (a, weight, a_scale, w_scale, a_zero, w_zero, bias)
        qkv = inner(graph, node, "com.microsoft.MatMulIntegerToFloat", operands, "projected", made)
        inputs = (qkv, "", "", mask, past)
    else:
        inputs = (a, _float(graph, weight, w_scale, w_zero, node, made, axis=-1), bias, mask, past)
    attributes = {**node.attributes, "written_as": node.op}
    return [*made, Node("com.microsoft.Attention", "com.microsoft", node.name, inputs, node.outputs, attributes)]


def _check_packed(graph: Graph, node: Node, name: str, bits: int, block: int, K: int, N: int, scales: str) -> None:
    """Raise before any work unless a packed matrix and its scales have the sizes that the attributes tell."""
    held = math.prod(graph.shape(name))
    if graph.constants[name].dtype.name in ("uint8", "int8") and bits in (2, 4):
        held *= 8 // bits
    if bits not in (2, 4, 8) or block < 1 or K < 1 or N < 1 or held < K * N or held > 2 * N * (K + block):
        raise UnsupportedModelError(
            f"{node.describe()}: {name!r} holds {held} elements of {bits} bits, which is no {N} x {K} matrix"
        )
    if scales not in graph.constants:
        raise UnsupportedModelError(
            f"{node.describe()}: its scales {scales!r} are computed by nodes; expected is a tensor that the file holds"
        )
    count = math.prod(graph.shape(scales))
    if count * block < K * N:
        raise UnsupportedModelError(
            f"{node.describe()}: {scales!r} holds {count} scales, too few for blocks of {block} in {N} x {K} elements"
        )


def _matmul_nbits(graph: Graph, node: Node) -> list[Node] | None:
    a, b, scales, zeros, order, bias = (node.input(i) for i in range(6))
    if order or b not in graph.constants:
        return None
    bits, block, K, N = (node.attributes.get(k, d) for k, d in (("bits", 4), ("block_size", 0), ("K", 0), ("N", 0)))
    _check_packed(graph, node, b, bits, block, K, N, scales)
    made: list[Node] = []
    weight = inner(graph, node, UNPACK, (b, scales, zeros), "unpacked", made, **node.attributes)
    if graph.rounding and node.attributes.get("accuracy_level", 0) == 4:
        a = inner(graph, node, ROUND, (a,), "rounded", made, **node.attributes)
    return _with_bias(graph, node, made, a, weight, bias)


def _matmul_bnb4(graph: Graph, node: Node) -> list[Node] | None:
    a, b, absmax = node.inputs
    if b not in graph.constants or not node.attributes.get("transB", 1):
        return None
    block, K, N = (node.attributes.get(k, 0) for k in ("block_size", "K", "N"))
    _check_packed(graph, node, b, 4, block, K, N, absmax)
    made: list[Node] = []
    weight = inner(graph, node, UNPACK, (b, absmax), "unpacked", made, **node.attributes)
    return _with_bias(graph, node, made, a, weight, "")


def _gather_block_quantized(graph: Graph, node: Node) -> list[Node] | None:
    table, rows, scales, zeros = (node.input(i) for i in range(4))
    if table not in graph.constants or node.attributes.get("gather_axis", 0) != 0:
        return None
    bits, block = node.attributes.get("bits", 4), node.attributes.get("block_size", 128)
    if scales not in graph.constants or not all(len(graph.shape(name)) == 2 for name in (table, scales)):
        return None
    N, width = graph.shape(table)
    packed = bits in (2, 4) and graph.constants[table].dtype.name in ("uint8", "int8")
    K = min(graph.shape(scales)[1] * block, width * (8 // bits) if packed else width)
    _check_packed(graph, node, table, bits, block, K, N, scales)
    attributes = {"K": K, "N": N, "bits": bits, "rows_first": 1, "block_size": block}
    made: list[Node] = []
    unpacked = inner(graph, node, UNPACK, (table, scales, zeros), "unpacked", made, **attributes)
    return [*made, rewritten(node, "Gather", (unpacked, rows), node.outputs[0], axis=0)]


# Operators whose weights are packed integers beside their scales.
PACKED = frozenset({"com.microsoft.GatherBlockQuantized", "com.microsoft.MatMulBnb4", "com.microsoft.MatMulNBits"})
# What is rewritten in a literal graph, too: the rewritten nodes round as the operator does.
LITERAL = PACKED | {"com.microsoft.QAttention"}


# The operators that round activations as the file is run.
ROUNDING = frozenset(
    {
        "QuantizeLinear",
        "com.microsoft.QuantizeLinear",
        "DynamicQuantizeLinear",
        "com.microsoft.DynamicQuantizeMatMul",
        "QLinearMatMul",
        "com.microsoft.QLinearAdd",
        "com.microsoft.QLinearMul",
        "com.microsoft.QLinearSigmoid",
        "com.microsoft.QLinearSoftmax",
        "com.microsoft.QGemm",
        "com.microsoft.QAttention",
    }
)


RULES: dict[str, Rule] = {
    "QuantizeLinear": _quantize,
    "com.microsoft.QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "com.microsoft.DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "com.microsoft.MatMulIntegerToFloat": _matmul_integer_to_float,
    "com.microsoft.DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "QLinearMatMul": _qlinear_two("MatMul"),
    "com.microsoft.QLinearAdd": _qlinear_two("Add"),
    "com.microsoft.QLinearMul": _qlinear_two("Mul"),
    "com.microsoft.QLinearSigmoid": _qlinear_one("Sigmoid"),
    "com.microsoft.QLinearSoftmax": _qlinear_one("Softmax"),
    "com.microsoft.QLinearConcat": _qlinear_concat,
    "com.microsoft.QLinearWhere": _qlinear_where,
    "com.microsoft.QGemm": _qgemm,
    "com.microsoft.QAttention": _qattention,
    "com.microsoft.MatMulBnb4": _matmul_bnb4,
    "com.microsoft.MatMulNBits": _matmul_nbits,
    "com.microsoft.GatherBlockQuantized": _gather_block_quantized,
}
