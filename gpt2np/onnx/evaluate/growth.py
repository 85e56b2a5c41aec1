"""How large a node's results can be, before they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..graph import Node

Array = np.ndarray

FEW = 1 << 13  # elements; what makes fewer needs not be counted, such as the arithmetic of sizes


def most_bytes(node: Node, inputs: Sequence[Any]) -> int:
    """An upper bound of the bytes that a node makes; for products, of 8 for each multiplication.

    Nearly every operator gives what its inputs broadcast to, or parts of them. Those that can give more are listed.
    """
    rule = GROWING.get(node.op) or (_product if "MatMul" in node.op or "Gemm" in node.op else None)
    if rule is not None:
        return 8 * rule(node, inputs)
    together, widest, kinds = 0, [1] * 32, set()
    for i in inputs:
        for array in i if isinstance(i, tuple) else (i,) if i is not None else ():
            together += array.size
            kinds.add(array.dtype)
            for axis, size in enumerate(reversed(array.shape)):
                widest[axis] = max(widest[axis], size)
    broadcast = math.prod(widest)
    if node.op not in BROADCASTING:
        return 8 * max(together, broadcast)
    kinds.discard(np.dtype(bool))  # what is left is the result's type, or it is bool
    return broadcast * (kinds.pop().itemsize if len(kinds) == 1 else 8)


def _values(array: Array) -> int:
    return math.prod(max(int(v), 0) for v in array.reshape(-1))


def _range(node: Node, inputs: Sequence[Any]) -> int:
    start, limit, delta = (v.item() for v in inputs)
    steps = (limit - start) / delta if delta else 0  # none: NumPy raises
    return max(math.ceil(steps), 0) if math.isfinite(steps) else 1 << 62


def _gather(node: Node, inputs: Sequence[Any]) -> int:
    x, indices = inputs[:2]
    return indices.size * x.size // max(x.shape[node.attributes.get("axis", 0)], 1)


def _gather_nd(node: Node, inputs: Sequence[Any]) -> int:
    x, indices = inputs[:2]
    depth = indices.shape[-1]
    return indices.size // max(depth, 1) * math.prod(x.shape[depth:])


def _product(node: Node, inputs: Sequence[Any]) -> int:
    """(..., n, k) by (..., k, m), whichever way they lie: batch * n * k * m."""
    a, b = inputs[:2]
    if min(a.ndim, b.ndim) < 2:
        return a.size + b.size
    summed = min(set(a.shape[-2:]) & set(b.shape[-2:]) - {0}, default=1)
    batch = math.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    return batch * math.prod(a.shape[-2:]) * math.prod(b.shape[-2:]) // summed


def _einsum(node: Node, inputs: Sequence[Any]) -> int:
    """Every index with every other: NumPy walks through them all."""
    sizes: dict[str, int] = {}
    terms = node.attributes["equation"].replace(" ", "").partition("->")[0].split(",")
    for term, array in zip(terms, inputs, strict=True):
        before, dots, after = term.partition("...")
        more = array.ndim - len(before) - len(after) if dots else 0
        letters = [*before, *(f"...{i - more}" for i in range(more)), *after]
        for letter, size in zip(letters, array.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 0))
    return math.prod(sizes.values())


# Operators that give what their inputs broadcast to.
BROADCASTING = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Max", "Min", "Sum", "Where", "And", "Or", "Xor", "Equal", "Less",
        "LessOrEqual", "Greater", "GreaterOrEqual",
    }
)  # fmt: skip
# Operators whose inputs' values say how much they give.
VALUED = frozenset({"ConstantOfShape", "Range", "Tile"})
# Operators that give more than their inputs broadcast to.
GROWING: dict[str, Callable[[Node, Sequence[Any]], int]] = {
    "ConstantOfShape": lambda node, inputs: _values(inputs[0]),
    "Expand": lambda node, inputs: 0,  # a view; what reads it is counted by its shape
    "Range": _range,
    "Tile": lambda node, inputs: inputs[0].size * _values(inputs[1]),
    "NonZero": lambda node, inputs: inputs[0].size * inputs[0].ndim,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Einsum": _einsum,
}
