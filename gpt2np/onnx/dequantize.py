"""Quantised graphs as the float graphs that they stand for.

Quantisation tools replace float nodes by integer ones and round activations on the way. The weights in them are
exact numbers all the same, (integer - zero point) * scale, and the graph between them is the old one. So every
such node is rewritten, as the graph is read, into the float nodes that it approximates: values keep their
names, weights become DequantizeLinear of what the file holds, and rounding an activation becomes Identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .graph import Graph, Node

Rule = Callable[["Graph", "Node"], "list[Node] | None"]

UNPACK = "gpt2np.UnpackBits"  # our own: packed integers of a com.microsoft node -> float matrix


def _float(graph: Graph, name: str, scale: str, zero: str, origin: Node, made: list[Node], **attributes: Any) -> str:
    """Name of the float value that a quantised operand stands for."""
    if not graph.holds(name):
        return name  # an activation: its rounding is undone
    out = f"{name} as float in {origin.outputs[0]}"
    made.append(_node(origin, "DequantizeLinear", (name, scale, zero) if zero else (name, scale), out, **attributes))
    return out


def _node(origin: Node, op: str, inputs: tuple[str, ...], output: str, **attributes: Any) -> Node:
    from .graph import Node

    domain = op.rpartition(".")[0]
    attributes["written_as"] = origin.op
    return Node(op, domain, origin.name, inputs, (output,), attributes)


def _constant(graph: Graph, name: str, value: Any) -> str:
    graph.constants[name] = np.asarray(value)
    graph.invented.add(name)
    return name


def _quantize(graph: Graph, node: Node) -> list[Node]:
    """Constants that are rounded as the file is run keep their exact values, too."""
    return [_node(node, "Identity", node.inputs[:1], node.outputs[0])]


def _dequantize(graph: Graph, node: Node) -> list[Node] | None:
    """Of an activation; of a constant, or of rows gathered from one, it is what it says."""
    return None if graph.holds(node.inputs[0]) else [_node(node, "Identity", node.inputs[:1], node.outputs[0])]


def _dynamic_quantize(graph: Graph, node: Node) -> list[Node]:
    """Output 1 and 2, scale and zero point of the activation, become 1 and 0: what they undo is not done."""
    for output, value in zip(node.outputs[1:], (np.float32(1), np.uint8(0)), strict=False):
        if output:
            _constant(graph, output, value)
    return [_node(node, "Identity", node.inputs[:1], node.outputs[0])]


def _matmul_integer(graph: Graph, node: Node) -> list[Node] | None:
    b = node.inputs[1]
    if b not in graph.constants:
        return [_node(node, "MatMul", node.inputs[:2], node.outputs[0])]
    made: list[Node] = []
    one = _constant(graph, f"one for {node.outputs[0]}", np.float32(1))
    weight = _float(graph, b, one, node.input(3), node, made, axis=-1)
    return [*made, _node(node, "MatMul", (node.inputs[0], weight), node.outputs[0])]


def _with_bias(graph: Graph, node: Node, made: list[Node], a: str, weight: str, bias: str) -> list[Node]:
    if not bias:
        return [*made, _node(node, "MatMul", (a, weight), node.outputs[0])]
    product = f"{node.outputs[0]} without bias"
    graph.invented.add(product)
    made.append(_node(node, "MatMul", (a, weight), product))
    return [*made, _node(node, "Add", (product, bias), node.outputs[0])]


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
        return [*made, _node(node, op, (a, b), node.outputs[0])]

    return rule


def _qlinear_one(op: str) -> Rule:
    def rule(graph: Graph, node: Node) -> list[Node]:
        attributes = {k: v for k, v in node.attributes.items() if k != "opset"}
        return [_node(node, op, node.inputs[:1], node.outputs[0], **attributes)]

    return rule


def _qlinear_concat(graph: Graph, node: Node) -> list[Node]:
    """inputs: scale and zero of y, then value, scale, zero of each part."""
    made: list[Node] = []
    parts = [
        _float(graph, node.inputs[i], node.inputs[i + 1], node.input(i + 2), node, made)
        for i in range(2, len(node.inputs), 3)
    ]
    return [*made, _node(node, "Concat", tuple(parts), node.outputs[0], axis=node.attributes["axis"])]


def _qlinear_where(graph: Graph, node: Node) -> list[Node]:
    """inputs: condition, then value, scale, zero of both branches, then scale and zero of y."""
    made: list[Node] = []
    x, y = (_float(graph, node.inputs[i], node.inputs[i + 1], node.input(i + 2), node, made, axis=-1) for i in (1, 4))
    return [*made, _node(node, "Where", (node.inputs[0], x, y), node.outputs[0])]


def _qgemm(graph: Graph, node: Node) -> list[Node]:
    a, a_scale, _, b, b_scale, b_zero, c = (node.input(i) for i in range(7))
    made: list[Node] = []
    axis = 0 if node.attributes.get("transB", 0) else 1
    weight = _float(graph, b, b_scale, b_zero, node, made, axis=axis)
    inputs: tuple[str, ...] = (a, weight)
    if c:  # int32, in units of a_scale * b_scale
        unit = f"{node.outputs[0]} unit of bias"
        made.append(_node(node, "Mul", (a_scale, b_scale), unit))
        inputs = (*inputs, _float(graph, c, unit, "", node, made, axis=-1))
    if node.input(7):
        attributes = {k: v for k, v in node.attributes.items() if k in ("transA", "transB", "alpha")}
    return [*made, _node(node, "Gemm", inputs, node.outputs[0], **attributes)]


def _qattention(graph: Graph, node: Node) -> list[Node]:
    a, weight, bias, _, w_scale, mask, _, w_zero, past = (node.input(i) for i in range(9))
    made: list[Node] = []
    weight = _float(graph, weight, w_scale, w_zero, node, made, axis=-1)
    from .graph import Node

    attributes = {**node.attributes, "written_as": node.op}
    op = "com.microsoft.Attention"
    return [*made, Node(op, "com.microsoft", node.name, (a, weight, bias, mask, past), node.outputs, attributes)]


def _matmul_nbits(graph: Graph, node: Node) -> list[Node] | None:
    a, b, scales, zeros, order, bias = (node.input(i) for i in range(6))
    if order or b not in graph.constants:
        return None
    out = f"{b} unpacked in {node.outputs[0]}"
    graph.invented.add(out)
    unpack = _node(node, UNPACK, (b, scales, zeros), out, **node.attributes)
    return _with_bias(graph, node, [unpack], a, out, bias)


def _gather_block_quantized(graph: Graph, node: Node) -> list[Node] | None:
    table, rows, scales, zeros = (node.input(i) for i in range(4))
    if table not in graph.constants or node.attributes.get("gather_axis", 0) != 0:
        return None
    K = graph.shape(scales)[-1] * node.attributes.get("block_size", 128)
    width = graph.shape(table)[-1]
    packed = graph.constants[table].dtype.name in ("uint8", "int8")
    bits = node.attributes.get("bits", 4)
    K = min(K, width * (8 // bits) if packed else width)
    out = f"{table} unpacked in {node.outputs[0]}"
    graph.invented.add(out)
    attributes = {
        "K": K,
        "N": graph.shape(table)[0],
        "bits": bits,
        "rows_first": 1,
        "block_size": node.attributes.get("block_size", 128),
    }
    unpack = _node(node, UNPACK, (table, scales, zeros), out, **attributes)
    return [unpack, _node(node, "Gather", (out, rows), node.outputs[0], axis=0)]


WEIGHTS_ONLY = frozenset({"com.microsoft.MatMulNBits", "com.microsoft.GatherBlockQuantized"})

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
    "com.microsoft.MatMulNBits": _matmul_nbits,
    "com.microsoft.GatherBlockQuantized": _gather_block_quantized,
}
