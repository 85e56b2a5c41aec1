"""Weights stored as packed integers, as the numbers that they stand for.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..graph import UNPACK, Node

Array = np.ndarray


def spread(a: Array, shape: tuple[int, ...], axis: int, block: int = 0) -> Array:
    """Bring scales or zero points (one, one per slice of an axis, or one per block) to a shape that broadcasts."""
    if a.size == 1:
        return a.reshape(())
    axis = axis + len(shape) if axis < 0 else axis
    if block < 0:
        raise ValueError(f"blocks of {block} elements")
    if block:
        return np.take(a, np.arange(shape[axis]) // block, axis)
    return a.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def dequantize(x: Array, scale: Array, zero: Array | None, axis: int = 1, block: int = 0) -> Array:
    """(x - zero) * scale in the scale's type, computed in place in float32: no second copy of a large weight."""
    out = x.astype(np.float32)
    if zero is not None:
        out -= spread(zero.astype(np.float32), x.shape, axis, block)
    out *= spread(scale.astype(np.float32), x.shape, axis, block)
    return np.asarray(out.astype(scale.dtype, copy=False))


# What the 16 values of bitsandbytes' 4-bit types stand for, as fractions of a block's largest element: FP4, NF4
# (onnxruntime/contrib_ops/cpu/quantization/blockwise_quant_block_bnb4.h)
BNB4 = (
    (
        0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
        -0.0, -5.208333333e-03, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
    ),
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip


def unpack_bits(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    """com.microsoft.MatMulNBits' weights (K, N), or GatherBlockQuantized's table (N, K): blocks along K."""
    packed, scales, zeros = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None
    K, N, block = (int(node.attributes[k]) for k in ("K", "N", "block_size"))
    if "quant_type" in node.attributes:  # MatMulBnb4: blocks go on from row to row; the first of a pair is the high one
        pairs = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: N * K]
        levels = np.array(BNB4[node.attributes["quant_type"]], np.float32)
        spread = scales.astype(np.float32).reshape(-1)[np.arange(N * K) // block]
        return np.asarray((levels[pairs] * spread).reshape(N, K).T)
    bits = int(node.attributes["bits"])
    of_block = np.arange(K) // block

    def unpacked(array: Array) -> Array:
        """(N, more or less) integers from whole numbers or from `bits` bits each, the lowest first; rows are padded."""
        array = array.reshape(N, -1)
        if array.dtype.name in ("int4", "uint4", "int2", "uint2"):
            return array.astype(np.int16)
        if bits == 8 or not array.dtype.name.startswith(("uint8", "int8")):
            return array
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((array.view(np.uint8)[:, :, None] >> shifts) & (2**bits - 1)).reshape(N, -1)

    table = unpacked(packed)[:, :K].astype(np.float32)
    if zeros is not None:
        table -= unpacked(zeros).astype(np.float32)[:, of_block]
    elif packed.dtype.name not in ("int4", "int8"):
        table -= np.float32(2 ** (bits - 1))
    table *= scales.astype(np.float32).reshape(N, -1)[:, of_block]
    return np.asarray(table if node.attributes.get("rows_first", 0) else table.T)


def steps(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    """The scale of every number that DequantizeLinear or `unpack_bits` gives, float32, in the shape of the numbers."""
    x, scales = inputs[0], inputs[1].astype(np.float32)
    if node.op == UNPACK:
        K, N, block = (int(node.attributes[k]) for k in ("K", "N", "block_size"))
        table = scales.reshape(N, -1)[:, np.arange(K) // block]
        return np.asarray(table if node.attributes.get("rows_first", 0) else table.T)
    axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    return np.broadcast_to(spread(scales, x.shape, axis, block), x.shape)
