"""Operators that round activations to integers, as ONNX Runtime runs them on the CPU.

They are used to run a quantised file literally, rounding included; to read its weights they are not needed
(see normalise/quantised.py). Meaning: https://onnx.ai/onnx/operators/ and, for com.microsoft,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..evaluate.packed import dequantize, spread
from ..graph import ROUND, Node

Array = np.ndarray
Product = Callable[[Array, Array, "Array | None", "Array | None"], Array]


_RANGES = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}


def quantize(x: Array, scale: Array, zero: Array | None, axis: int = 1, block: int = 0) -> Array:
    """saturate(round(x / scale) + zero), ties to even."""
    dtype = np.dtype(np.uint8) if zero is None else zero.dtype
    low, high = _RANGES.get(dtype.name) or (np.iinfo(dtype).min, np.iinfo(dtype).max)
    scaled = np.rint(x / spread(scale, x.shape, axis, block))
    if zero is not None:
        scaled = scaled + spread(zero.astype(np.float32), x.shape, axis, block)
    return np.minimum(np.fmax(scaled, low), high).astype(dtype)  # NaN, of inf / inf, becomes the least


def dynamic_quantize(x: Array) -> tuple[Array, Array, Array]:
    """Integers uint8, scale and zero point from the smallest and largest element of the whole array."""
    low, high = min(np.float32(0), x.min(initial=0)), max(np.float32(0), x.max(initial=0))
    scale = np.float32((high - low) / np.float32(255)) if high > low else np.float32(1)
    zero = np.uint8(np.clip(np.rint(-low / scale), 0, 255))
    return quantize(x, np.asarray(scale), np.asarray(zero)), np.asarray(scale), np.asarray(zero)


def _input(inputs: Sequence[Any], index: int) -> Any:
    return inputs[index] if index < len(inputs) else None


def integer_product(a: Array, b: Array, a_zero: Array | None, b_zero: Array | None) -> Array:
    """(a - a_zero) @ (b - b_zero), exactly: float64 holds every such sum."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    if a_zero is not None:
        left -= spread(a_zero, a.shape, -2)
    if b_zero is not None:
        right -= spread(b_zero, b.shape, -1)
    return left @ right


def saturating_product(a: Array, b: Array, a_zero: Array | None, b_zero: Array | None) -> Array:
    """As x86 CPUs without VNNI multiply uint8 by int8: two neighbouring products are added in 16 bits (vpmaddubsw)."""
    exact = integer_product(a, b, a_zero, b_zero)
    if a.dtype != np.uint8 or b.dtype != np.int8:
        return exact
    left, right = a.astype(np.float32), b.astype(np.float32)
    for k in range(0, a.shape[-1] - 1, 2):
        pair = left[..., k : k + 2] @ right[..., k : k + 2, :]
        exact += np.clip(pair, -(2.0**15), 2.0**15 - 1) - pair
    return exact


def _dynamic_quantize_linear(node: Node, inputs: Sequence[Any], opset: int) -> list[Array]:
    return list(dynamic_quantize(inputs[0]))


def _quantize_linear(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    return quantize(
        inputs[0], inputs[1], _input(inputs, 2), node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    )


def _matmul_integer(node: Node, inputs: Sequence[Any], opset: int, product: Product = integer_product) -> Array:
    return product(inputs[0], inputs[1], _input(inputs, 2), _input(inputs, 3)).astype(np.int32)


def _scaled(product: Array, a_scale: Array, b_scale: Array, bias: Array | None) -> Array:
    out = product.astype(np.float32) * (a_scale * b_scale)
    return np.asarray(out if bias is None else out + bias)


def _matmul_integer_to_float(
    node: Node, inputs: Sequence[Any], opset: int, product: Product = integer_product
) -> Array:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = (_input(inputs, i) for i in range(7))
    return _scaled(product(a, b, a_zero, b_zero), a_scale, b_scale, bias)


def _dynamic_quantize_matmul(
    node: Node, inputs: Sequence[Any], opset: int, product: Product = integer_product
) -> Array:
    x, b, b_scale, b_zero, bias = (_input(inputs, i) for i in range(5))
    a, a_scale, a_zero = dynamic_quantize(x)
    return _scaled(product(a, b, a_zero, b_zero), a_scale, b_scale, bias)


def _qlinear(function: Callable[[Array, Array], Array]) -> Any:
    """y = function(a, b); inputs a, scale, zero, b, scale, zero, and scale and zero of y."""

    def run(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        a_x, a_scale, a_zero, b_x, b_scale, b_zero = inputs[:6]
        a, b = dequantize(a_x, a_scale, a_zero, -2), dequantize(b_x, b_scale, b_zero, -1)
        return quantize(function(a, b), inputs[6], _input(inputs, 7))

    return run


def _qlinear_matmul(node: Node, inputs: Sequence[Any], opset: int, product: Product = integer_product) -> Array:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
    ratio = a_scale * b_scale / y_scale
    return quantize(product(a, b, a_zero, b_zero).astype(np.float32) * ratio, np.asarray(np.float32(1)), y_zero)


def _qlinear_sigmoid(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    return quantize(1 / (1 + np.exp(-dequantize(*inputs[0:3]))), inputs[3], _input(inputs, 4))


def _qlinear_softmax(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    """In whole numbers, from a table of exp; over the last axis."""
    x, x_scale, _, y_scale, y_zero = (_input(inputs, i) for i in range(5))
    unit = min((2**32 - 1) // x.shape[-1], 0x7FFFFF)
    table = np.rint(unit * np.exp(np.arange(-255, 1) * float(x_scale))).astype(np.int64)
    exps = table[255 + x.astype(np.int64) - x.max(-1, keepdims=True)]
    total = exps.sum(-1, keepdims=True)
    y = (exps * int(1 / y_scale) + total // 2) // total + y_zero.astype(np.int64)
    limits = np.iinfo(y_zero.dtype)
    return np.clip(y, limits.min, limits.max).astype(y_zero.dtype)


def _qlinear_concat(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    parts = [dequantize(*inputs[i : i + 3]) for i in range(2, len(inputs), 3)]
    return quantize(np.concatenate(parts, node.attributes["axis"]), inputs[0], inputs[1])


def _qlinear_where(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x, y = dequantize(*inputs[1:4]), dequantize(*inputs[4:7])
    return quantize(np.where(inputs[0], x, y), inputs[7], inputs[8])


def _qgemm(node: Node, inputs: Sequence[Any], opset: int, product: Product = integer_product) -> Array:
    a, a_scale, a_zero, b, b_scale, b_zero, c, y_scale, y_zero = (_input(inputs, i) for i in range(9))
    if node.attributes.get("transB", 0):
        b = b.T
    total = product(a, b, a_zero, b_zero)
    total = total if c is None else total + c
    out = total.astype(np.float32) * (np.float32(node.attributes.get("alpha", 1.0)) * a_scale * b_scale)
    return np.asarray(out) if y_scale is None else quantize(out, y_scale, y_zero)


def _round_blocks(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    """What MatMulNBits with accuracy_level 4 multiplies by its weights."""
    x = inputs[0]
    block = min(int(node.attributes["block_size"]), x.shape[-1])
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)])
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.asarray((np.rint(blocks * inverse) * scale).reshape(padded.shape)[..., : x.shape[-1]])


PRODUCTS: dict[str, Any] = {
    "MatMulInteger": _matmul_integer,
    "com.microsoft.MatMulIntegerToFloat": _matmul_integer_to_float,
    "com.microsoft.DynamicQuantizeMatMul": _dynamic_quantize_matmul,
    "QLinearMatMul": _qlinear_matmul,
    "com.microsoft.QGemm": _qgemm,
}


SATURATING: dict[str, Any] = {op: partial(run, product=saturating_product) for op, run in PRODUCTS.items()}


OPERATORS: dict[str, Any] = {
    **PRODUCTS,
    "QuantizeLinear": _quantize_linear,
    "com.microsoft.QuantizeLinear": _quantize_linear,
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "com.microsoft.QLinearAdd": _qlinear(np.add),
    "com.microsoft.QLinearMul": _qlinear(np.multiply),
    "com.microsoft.QLinearSigmoid": _qlinear_sigmoid,
    "com.microsoft.QLinearSoftmax": _qlinear_softmax,
    "com.microsoft.QLinearConcat": _qlinear_concat,
    "com.microsoft.QLinearWhere": _qlinear_where,
    ROUND: _round_blocks,
}
