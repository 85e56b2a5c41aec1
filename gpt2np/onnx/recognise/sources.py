"""Weights that have been found in a graph, each with the way to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...arrays import empty_aligned
from ...errors import WeightError
from ..evaluate.evaluator import Evaluator
from ..evaluate.operators import is_float
from ..graph import UNPACK, Graph
from ..guard import typed_errors
from ..read.tensors import Tensor

Array = np.ndarray


@dataclass(frozen=True)
class Source:
    """One weight: its shape, the initializers it comes from, and what it is seen through on the way.

    Satisfies `weights.WeightSource`. `key` tells whether two sources are one and the same tensor.
    """

    shape: tuple[int, ...]
    origin: tuple[str, ...]  # initializers (or Constant nodes); empty where the file has none and zeros stand in
    through: tuple[str, ...]  # from the file to the weight: "Cast", "Transpose", "DequantizeLinear", ...
    read: Callable[[], Array] = field(repr=False, compare=False)
    tensor: Tensor | None = field(default=None, repr=False, compare=False)  # which this weight is, unchanged

    def load(self) -> Array:
        """A new, 64-byte-aligned, C-contiguous float array: float32, or float64 if the file has float64."""
        with typed_errors(f"the weight {self.describe()}"):
            array = self._checked()
            dtype = np.dtype(np.float64 if array.dtype == np.float64 else np.float32)
            if array.dtype == dtype and array.flags.c_contiguous and array.flags.writeable:
                return array
            out = empty_aligned(array.shape, dtype)
            out[...] = array
            return out

    def blocks(self, rows: int) -> Iterable[Array]:
        """What `load` returns, some rows at a time, of the file's float type and perhaps read-only.

        Only a tensor that is the weight as it is can be read so; any other weight comes as a whole.
        """
        return [self._checked()] if self.tensor is None else self.tensor.blocks(rows)

    def _checked(self) -> Array:
        array = self.read()
        if array.shape != self.shape:
            raise WeightError(f"{self.describe()} has shape {array.shape}, expected {self.shape}")
        if not is_float(array):
            raise WeightError(f"{self.describe()} is {array.dtype}, not a floating-point weight")
        return array

    def is_same(self, other: Source) -> bool:
        """Whether both are made of the same tensors by the same steps."""
        return (self.shape, self.origin, self.through) == (other.shape, other.origin, other.through)

    def describe(self) -> str:
        """The initializers' names, for messages."""
        return " + ".join(repr(name) for name in self.origin) or "zeros"

    def then(self, step: str, shape: tuple[int, ...], change: Callable[[Array], Array]) -> Source:
        """This source, seen through one more step."""
        return Source(shape, self.origin, (*self.through, step), lambda: change(self.read()))

    def transposed(self, step: str = "Transpose") -> Source:
        """The matrix with its axes exchanged."""
        return self.then(step, self.shape[::-1], lambda a: a.T)

    def scaled(self, factor: float, step: str) -> Source:
        """The weight times a number."""
        return self if factor == 1 else self.then(step, self.shape, lambda a: a * a.dtype.type(factor))

    def times(self, factors: Source) -> Source:
        """The matrix times one number, or one number per column, that the file holds."""
        scaled = self.then("Mul", self.shape, lambda a: a * factors.read().reshape(-1).astype(a.dtype))
        return replace(scaled, origin=tuple(dict.fromkeys((*self.origin, *factors.origin))))

    def plus(self, other: Source) -> Source:
        """The sum of two of one shape."""
        total = self.then("Add", self.shape, lambda a: a + other.read().astype(a.dtype))
        return replace(total, origin=tuple(dict.fromkeys((*self.origin, *other.origin))))

    def with_product(self, left: Source, right: Source) -> Source:
        """The matrix plus the product of two others."""

        def merged(a: Array) -> Array:
            product = left.read().astype(np.float64) @ right.read().astype(np.float64)
            return (a + product).astype(a.dtype)

        origin = tuple(dict.fromkeys((*self.origin, *left.origin, *right.origin)))
        return replace(self.then("LoRA", self.shape, merged), origin=origin)

    def reshaped(self, shape: tuple[int, ...]) -> Source:
        """The same elements in another shape."""
        return (
            self
            if shape == self.shape
            else Source(shape, self.origin, self.through, lambda: self.read().reshape(shape))
        )

    def taken(self, index: Array, axis: int, step: str) -> Source:
        """Rows or columns in another order."""
        size = self.shape[axis]
        if len(index) and index.max() >= size:
            raise WeightError(f"{self.describe()} has shape {self.shape}: too small, {step} needs {index.max() + 1}")
        if len(index) == size and bool((index == np.arange(size)).all()):
            return self
        shape = tuple(len(index) if i == axis % len(self.shape) else n for i, n in enumerate(self.shape))
        return self.then(step, shape, lambda a: np.take(a, index, axis))


def zeros(shape: tuple[int, ...], why: str) -> Source:
    """A weight that the file leaves out."""
    return Source(shape, (), (why,), lambda: np.zeros(shape, np.float32))


def ones(shape: tuple[int, ...], why: str) -> Source:
    """A gain that the file leaves out."""
    return Source(shape, (), (why,), lambda: np.ones(shape, np.float32))


def joined(parts: Sequence[Source], step: str) -> Source:
    """Several maps side by side, along the last axis."""
    if len(parts) == 1:
        return parts[0]
    shape = (*parts[0].shape[:-1], sum(p.shape[-1] for p in parts))
    origin = tuple(dict.fromkeys(name for p in parts for name in p.origin))
    through = tuple(dict.fromkeys(step for p in parts for step in p.through))

    def read() -> Array:
        out = empty_aligned(shape, np.dtype(np.float32))
        start = 0
        for part in parts:
            out[..., start : start + part.shape[-1]] = part.read()
            start += part.shape[-1]
        return out

    return Source(shape, origin, (*through, step), read)


def constant_source(graph: Graph, name: str) -> Source:
    """The constant value of that name, whatever chain of nodes makes it from initializers."""
    steps: list[str] = []
    origin: list[str] = []
    pending = [name]
    while pending:
        current = pending.pop(0)
        if current in graph.constants:
            if current not in origin and current not in graph.synthetic:
                origin.append(current)
        elif (node := graph.producers.get(current)) is not None:
            if node.op != "Identity":
                steps.insert(0, node.attributes.get("written_as", node.op))
            pending.extend(i for i in node.inputs if i)
    direct = graph.strip(name, frozenset({"Identity"}))
    if direct in graph.constants:
        value = graph.constants[direct]
        if not isinstance(value, Tensor):
            return Source(graph.shape(direct), (direct,), (), lambda: np.array(value))
        return Source(value.shape, (direct,), (), value.load, value if value.dtype.kind == "f" else None)
    origin.sort(key=lambda o: -math.prod(graph.shape(o)))  # the weight itself before its scales
    shape = constant_shape(graph, name)

    def read() -> Array:
        array = Evaluator(graph, {})(name)
        if array.shape != shape:
            raise WeightError(f"{name!r} has shape {array.shape}, expected {shape}")
        return array

    return Source(shape, tuple(origin), tuple(steps), read)


def constant_shape(graph: Graph, name: str) -> tuple[int, ...]:
    """Shape of a constant value, found without reading large tensors where the nodes are common ones."""
    if name in graph.constants:
        return graph.shape(name)
    node = graph.producers.get(name)
    assert node is not None, name
    if node.op in ("Identity", "Cast", "CastLike", "DequantizeLinear", "com.microsoft.DequantizeLinear"):
        return constant_shape(graph, node.inputs[0])
    if node.op == UNPACK:
        N, K = int(node.attributes["N"]), int(node.attributes["K"])
        return (N, K) if node.attributes.get("rows_first", 0) else (K, N)
    if node.op == "Transpose":
        shape = constant_shape(graph, node.inputs[0])
        perm = node.attributes.get("perm") or range(len(shape))[::-1]
        return tuple(shape[p] for p in perm)
    if node.op in ("Mul", "Div", "Add", "Sub"):
        return tuple(np.broadcast_shapes(*(constant_shape(graph, i) for i in node.inputs)))
    return tuple(Evaluator(graph, {})(name).shape)
