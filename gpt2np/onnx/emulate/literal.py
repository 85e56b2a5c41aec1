"""A file run node by node, rounding as ONNX Runtime rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np

from ..evaluate.evaluator import Evaluator
from ..evaluate.operators import OPERATORS, Operator, axes, biased, cast, erf, gemm, one, reduced, sigmoid, softmax, two
from ..graph import ROUND, Graph, Node
from ..normalise.build import Rules, build_graph
from ..normalise.rewriter import inner, rewritten
from ..read.reader import ModelFile
from . import integers, mlas
from .float16 import float16

Array = np.ndarray
Literally = bool | Literal["saturating", "optimised", "unrounded"]


def _optimised_matmul(graph: Graph, node: Node) -> list[Node] | None:
    """By weights of 4 or 8 bits: becomes MatMulNBits of accuracy_level 4 (qdq_transformer in onnxruntime)."""
    before, source = (graph.producers.get(name) for name in node.inputs)
    if source is None or source.op != "DequantizeLinear" or source.inputs[0] not in graph.constants:
        return None
    if before is not None and before.op == "DequantizeLinear":
        return None  # two quantised operands: a product of integers
    weights, scales = (graph.constants[name] for name in source.inputs[:2])
    axis, block = source.attributes.get("axis", 1), source.attributes.get("block_size", 0)
    fits = axis == 0 and block >= 16 if block else not scales.shape or axis == 1
    if weights.dtype.name not in ("int4", "uint4", "int8", "uint8") or scales.dtype.name == "bfloat16" or not fits:
        return None
    made: list[Node] = []
    origin = replace(node, op="com.microsoft.MatMulNBits")
    a = inner(graph, origin, ROUND, node.inputs[:1], "rounded", made, block_size=block or 32)
    weight = inner(graph, origin, "DequantizeLinear", source.inputs, "as float", made, **source.attributes)
    return [*made, rewritten(origin, "MatMul", (a, weight), node.outputs[0])]


def literal_operators(graph: Graph, saturating: bool) -> dict[str, Operator]:
    """As ONNX Runtime's kernels for an x86 CPU with AVX-512 and VNNI round, or for one with AVX2 and no more."""

    def packed(name: str) -> bool:  # a matrix that is there before the first run is put into panels then
        return name in graph.constants and graph.constants[name].dtype == np.float32

    def matmul(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        return mlas.matmul(inputs[0], inputs[1], packed(node.inputs[1]))

    def product(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        return gemm(node, inputs, opset, partial(mlas.gemm, packed=packed(node.inputs[1])))

    return {
        **OPERATORS,
        **integers.OPERATORS,
        "MatMul": matmul,
        "Gemm": product,
        "Cast": _cast_unrounded,
        "Tanh": one(mlas.tanh),
        "Pow": two(mlas.power),
        "ReduceMean": _mean_of_last_axis,
        "Softmax": softmax(partial(mlas.softmax, lanes=8 if saturating else 16)),
        **(integers.SATURATING if saturating else {}),
    }


def _rounded_constant(value: float) -> np.float32:
    return np.float32(np.float16(value))


def _float16_fast_gelu(x: Array) -> Array:
    inner = x * (_rounded_constant(math.sqrt(2 / math.pi)) + _rounded_constant(0.035677408136300125) * (x * x))
    return np.asarray(np.float32(0.5) * (x * (1 + mlas.tanh(inner))))


# In float16 these have no kernels: ONNX Runtime takes them apart, with constants in float16, and runs the pieces in
# float32.
FLOAT16_FUNCTIONS: dict[str, Operator] = {
    "com.microsoft.FastGelu": biased(_float16_fast_gelu),
    "com.microsoft.Gelu": one(lambda x: 0.5 * (x * (1 + erf(_rounded_constant(math.sqrt(0.5)) * x)))),
    "com.microsoft.QuickGelu": lambda node, inputs, opset: (
        inputs[0] * sigmoid(_rounded_constant(node.attributes.get("alpha", 1.702)) * inputs[0])
    ),
}


def _cast_unrounded(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    """`Emulation.nodes` says which nodes round."""
    import onnx

    half = node.attributes["to"] == onnx.TensorProto.FLOAT16
    return np.asarray(inputs[0].astype(np.float32) if half else cast(node, inputs, opset))


def _mean_of_last_axis(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    last = inputs[0].ndim - 1
    if axes(node, inputs) in ((-1,), (last,)) and node.attributes.get("keepdims", 1):
        return mlas.mean(inputs[0])
    return np.asarray(reduced(np.mean)(node, inputs, opset))


def _is(value: Any, dtype: type) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype


def _single(value: Any) -> Any:
    """float16 is computed in float32."""
    return value.astype(np.float32) if _is(value, np.float16) else value


# What ONNX Runtime's optimisations make round.
OPTIMISED: Rules = {"MatMul": _optimised_matmul}


class Emulation:
    """A file to be run node by node.

    Parameters
    ----------
    file : ModelFile
    branch : "" or "then" or "else"
        See `build_graph`.
    way : bool or a word
        True: rounding as ONNX Runtime does without optimisations; "optimised": with them; "saturating": on a CPU
        without VNNI; "unrounded": nothing is rounded.
    """

    def __init__(self, file: ModelFile, branch: str = "", way: Literally = True) -> None:
        rounding = way != "unrounded"
        self.graph = build_graph(file, branch, rounding=rounding, more=OPTIMISED if way == "optimised" else None)
        self.graph.keep = True
        self.graph.budget = None  # it has been recognised before, and what it makes now is the caller's to bound
        self.operators = literal_operators(self.graph, way == "saturating")
        self.values, self.nodes = float16(self.graph) if rounding else (set[str](), set[int]())

    def evaluator(self, feeds: Mapping[str, Array]) -> Evaluator:
        """The file's values for these inputs."""
        return _Rounding(self, feeds)


class _Rounding(Evaluator):
    def __init__(self, emulation: Emulation, feeds: Mapping[str, Array]) -> None:
        super().__init__(emulation.graph, feeds)
        self.emulation = emulation
        self.operators = {op: partial(self._rounded, operator) for op, operator in emulation.operators.items()}

    def _rounded(self, operator: Operator, node: Node, inputs: Sequence[Any], opset: int) -> list[Any]:
        if node.outputs[0] in self.emulation.values and node.attributes.get("written_as", node.op) == node.op:
            operator = FLOAT16_FUNCTIONS.get(node.op, operator)
        taken = [_single(self.given(node, name, value)) for name, value in zip(node.inputs, inputs, strict=True)]
        result = operator(node, taken, opset)
        outputs = result if isinstance(result, list) else [result]
        return [
            value if isinstance(value, tuple) else self.given(node, name, np.asarray(value))
            for name, value in zip(node.outputs, outputs, strict=False)
        ]

    def given(self, node: Node, name: str, value: Any) -> Any:
        """What a node that runs in float16 takes or gives.

        Between the pieces of one that was taken apart nothing is rounded, except that ONNX's own Attention rounds
        each step: scores once they are scaled.
        """
        inside = name in self.graph.synthetic
        if inside and node.attributes.get("written_as") == "Attention":
            inside = any(c.op in ("Mul", "Div") for c in self.graph.consumers(name))
        if id(node) in self.emulation.nodes and not inside and _is(value, np.float32):
            return value.astype(np.float16)
        return value
