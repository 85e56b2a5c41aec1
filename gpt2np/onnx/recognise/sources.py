"""Weights that have been found in a graph, each with the way to read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...arrays import empty_aligned
from ...errors import WeightError
from ..evaluate.evaluator import Evaluator
from ..evaluate.operators import DEQUANTIZE, STEPS, is_float
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
    # Of whole numbers with scales: the scale of each number, seen through the same steps, in the weight's shape.
    scales: Callable[[], Array] | None = field(default=None, repr=False, compare=False)

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

    def steps(self) -> Array | None:
        """Of a weight that the file holds as whole numbers: how much one is worth, for each number; else None.

        It is a guess: steps on the way may have changed the numbers in another manner than their scales.
        """
        if self.scales is None:
            return None
        with typed_errors(f"the scales of {self.describe()}"):
            scales = self.scales()
            return scales if scales.shape == self.shape and scales.dtype == np.float32 else None

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
        return Source(
            shape, self.origin, (*self.through, step), lambda: change(self.read()), scales=_changed(self.scales, change)
        )

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
        return replace(total, origin=tuple(dict.fromkeys((*self.origin, *other.origin))), scales=None)

    def with_product(self, left: Source, right: Source) -> Source:
        """The matrix plus the product of two others."""

        def merged(a: Array) -> Array:
            product = left.read().astype(np.float64) @ right.read().astype(np.float64)
            return (a + product).astype(a.dtype)

        origin = tuple(dict.fromkeys((*self.origin, *left.origin, *right.origin)))
        return replace(self.then("LoRA", self.shape, merged), origin=origin, scales=None)

    def reshaped(self, shape: tuple[int, ...]) -> Source:
        """The same elements in another shape."""
        if shape == self.shape:
            return self
        return replace(self.then("", shape, lambda a: a.reshape(shape)), through=self.through)

    def taken(self, index: Array, axis: int, step: str) -> Source:
        """Rows or columns in another order."""
        size = self.shape[axis]
        if len(index) and index.max() >= size:
            raise WeightError(f"{self.describe()} has shape {self.shape}: too small, {step} needs {index.max() + 1}")
        if len(index) == size and bool((index == np.arange(size)).all()):
            return self
        shape = tuple(len(index) if i == axis % len(self.shape) else n for i, n in enumerate(self.shape))
        return self.then(step, shape, lambda a: np.take(a, index, axis))


def _changed(read: Callable[[], Array] | None, change: Callable[[Array], Array]) -> Callable[[], Array] | None:
    return None if read is None else lambda: change(read())


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

    def read(each: Sequence[Callable[[], Array]]) -> Array:
        out = empty_aligned(shape, np.dtype(np.float32))
        start = 0
        for part, read_part in zip(parts, each, strict=True):
            out[..., start : start + part.shape[-1]] = read_part()
            start += part.shape[-1]
        return out

    scales = [p.scales for p in parts if p.scales is not None]
    return Source(
        shape, origin, (*through, step), lambda: read([p.read for p in parts]),
        scales=(lambda: read(scales)) if len(scales) == len(parts) else None,
    )  # fmt: skip


def constant_source(graph: Graph, name: str) -> Source:
    """The constant value of that name, whatever chain of nodes makes it from initializers."""
    steps: list[str] = []
    origin: list[str] = []
    pending, quantised = [name], False
    while pending:
        current = pending.pop(0)
        if current in graph.constants:
            if current not in origin and current not in graph.synthetic:
                origin.append(current)
        elif (node := graph.producers.get(current)) is not None:
            if node.op != "Identity":
                steps.insert(0, node.attributes.get("written_as", node.op))
                quantised |= node.op in DEQUANTIZE and "quant_type" not in node.attributes  # MatMulBnb4's are fractions
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

    scales = scales_of(graph, name, dict) if quantised else None
    return Source(shape, tuple(origin), tuple(steps), read, scales=scales)


def scales_of(graph: Graph, name: str, feeds: Callable[[], dict[str, Array]]) -> Callable[[], Array]:
    """What reads the scales of a value that DequantizeLinear, or one of its kin, makes from the file and feeds."""

    def read() -> Array:
        evaluator = Evaluator(graph, feeds())
        evaluator.operators = STEPS
        return evaluator(name)

    return read


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
