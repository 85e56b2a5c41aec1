"""An ONNX graph under construction, and what both kinds of GPT-2 graphs have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..activations import ACTIVATIONS
from ..config import GPT2Config
from ..weights import Array, WeightSource

if TYPE_CHECKING:
    import onnx

FIRST_MODERN_OPSET = 17  # the first with LayerNormalization
BYTES_AT_ONCE = 1 << 24  # bytes converted or transposed at once

Weights = Mapping[str, "Array | WeightSource"]  # under the names of weights.weight_shapes, and "lm_head.bias"


@dataclass(frozen=True)
class Initializer:
    """A tensor of the file to be, whose content is made when it is written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Array]]  # its content in order, in C-contiguous blocks of `dtype`

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class GraphBuilder:
    """A graph under construction; values are named by their names, as in ONNX itself."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, Initializer] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._counts: dict[str, int] = {}

    def op(self, scope: str, op_type: str, *inputs: str, outputs: int = 1, output: str = "", **attributes: Any) -> Any:
        """Append a node; the name of its output, or a list of the names of several."""
        from onnx import helper

        name = f"{scope}/{op_type}"
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if count:  # PyTorch's numbering: Add, Add_1, Add_2 ...
            name += f"_{count}"
        names = [output] if output else [f"{name}_output_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name, **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, scope: str, value: Any, dtype: Any = np.int64) -> str:
        """A Constant node."""
        from onnx import numpy_helper

        return str(self.op(scope, "Constant", value=numpy_helper.from_array(np.array(value, dtype))))

    def unsqueeze(self, scope: str, value: str, axis: int) -> str:
        """Insert an axis; since opset 13 it is an input."""
        if self.opset < 13:
            return str(self.op(scope, "Unsqueeze", value, axes=[axis]))
        return str(self.op(scope, "Unsqueeze", value, self.constant(scope, [axis])))

    def split(self, scope: str, value: str, sizes: list[int], axis: int) -> list[str]:
        """Cut along an axis; since opset 13 the sizes are an input."""
        if self.opset < 13:
            return list(self.op(scope, "Split", value, outputs=len(sizes), axis=axis, split=sizes))
        return list(self.op(scope, "Split", value, self.constant(scope, sizes), outputs=len(sizes), axis=axis))

    def dim(self, scope: str, value: str, axis: int) -> str:
        """One dimension of a value, as a scalar."""
        shape = self.op(scope, "Shape", value)
        return str(self.op(scope, "Gather", shape, self.constant(scope, axis), axis=0))

    def concat(self, scope: str, *values: str, axis: int = 0) -> str:
        return str(self.op(scope, "Concat", *values, axis=axis))


class GPT2Builder:
    """What both graphs share: the weights under the checkpoint's names."""

    def __init__(self, config: GPT2Config, weights: Weights, opset: int, lm_head: bool, with_past: bool) -> None:
        self.config = config
        self.weights = weights
        self.graph = GraphBuilder(opset)
        self.lm_head = lm_head
        self.with_past = with_past
        self.prefix = "transformer." if lm_head else ""  # as in the checkpoint: the LM model holds the other one
        self.scope = "/transformer" if lm_head else ""

    def weight(self, name: str, transposed: bool = False) -> str:
        """An initializer with a weight."""
        shape = tuple(self.weights[name].shape)
        out = name if name.startswith("lm_head.") else self.prefix + name
        if transposed:
            out, shape = "lm_head.weight_transposed", shape[::-1]
        return self.initializer(out, np.float32, shape, lambda: float32_blocks(self.weights[name], transposed))

    def initializer(self, name: str, dtype: Any, shape: tuple[int, ...], blocks: Callable[[], Iterator[Array]]) -> str:
        self.graph.initializers[name] = Initializer(name, np.dtype(dtype), shape, blocks)
        return name

    def build(self) -> GraphBuilder:
        raise NotImplementedError

    def value(self, name: str, dtype: Any, shape: list[int | str]) -> onnx.ValueInfoProto:
        from onnx import helper

        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    def activation(self, scope: str, x: str, layer: int) -> str:
        """(..., F) -> (..., F), in the pieces that PyTorch's exporter makes of it."""
        g, form = self.graph, ACTIVATIONS[self.config.layer_activation(layer)]
        if g.opset >= 20 and form.onnx_gelu:
            return str(g.op(scope, "Gelu", x, approximate=form.onnx_gelu))

        def op(op_type: str, *inputs: str | float) -> str:
            named = (i if isinstance(i, str) else g.constant(scope, i, np.float32) for i in inputs)
            return str(g.op(scope, op_type, *named))

        return form.onnx(op, x)

    def scaled(self, scope: str, scores: str, layer: int) -> str:
        """q·k times the scale, written as a division by sqrt(D) where it is that."""
        scale = self.config.layer_scale(layer)
        root = math.sqrt(self.config.head_size)
        if scale == 1:
            return scores
        if math.isclose(scale * root, 1, rel_tol=1e-6):
            return str(self.graph.op(scope, "Div", scores, self.graph.constant(scope, root, np.float32)))
        return str(self.graph.op(scope, "Mul", scores, self.graph.constant(scope, scale, np.float32)))

    def head(self, hidden: str, table: str, output: str) -> None:
        """logits = hidden @ table (+ bias)."""
        biased = "lm_head.bias" in self.weights
        logits = self.graph.op("/lm_head", "MatMul", hidden, table, output="" if biased else output)
        if biased:
            self.graph.op("/lm_head", "Add", logits, self.weight("lm_head.bias"), output=output)


def float32_blocks(weight: Array | WeightSource, transposed: bool) -> Iterator[Array]:
    """A weight in float32 and C order, a block of rows at a time."""
    array = weight if isinstance(weight, np.ndarray) else weight.load()
    array = array.T if transposed else array
    rows = max(1, BYTES_AT_ONCE // max(1, 4 * math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows], np.float32)
