"""From the file to the graph that is searched: functions inlined, a branch taken, nodes rewritten as plain ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UnsupportedModelError
from ..graph import Graph, Node
from ..read.reader import ModelFile
from ..read.sparse import sparse_tensor
from ..read.tensors import Tensor
from . import fold, fused, quantised

if TYPE_CHECKING:
    import onnx

Array = np.ndarray
Rules = Mapping[str, Callable[[Graph, Node], "list[Node] | None"]]


def build_graph(
    file: ModelFile,
    branch: str = "",
    objections: list[UnsupportedModelError] | None = None,
    rounding: bool = False,
    more: Rules | None = None,
) -> Graph:
    """The graph of a file, in plain operators.

    Parameters
    ----------
    file : ModelFile
    branch : "" or "then" or "else"
        Which branch of an If on a graph input (as in merged decoders) is taken for the graph itself.
    objections, rounding
        See `Graph`.
    more : {operator: rule}
        Rules beside those of this package, applied last.
    """
    proto = file.proto
    if proto.functions:
        import onnx.inliner

        proto = onnx.inliner.inline_local_functions(proto)
    graph = Graph({_domain(o.domain): o.version for o in proto.opset_import}, objections, rounding)
    builder = _Builder(file, graph, [fused.RULES, fold.RULES, more or {}])
    builder.add(proto.graph, branch)
    graph.ports([i for i in proto.graph.input if i.name not in graph.initializers], list(proto.graph.output))
    graph.check_order()
    return graph


class _Builder:
    def __init__(self, file: ModelFile, graph: Graph, rules: Sequence[Rules]) -> None:
        self.file, self.graph, self.rules = file, graph, rules

    def add(self, proto: onnx.GraphProto, branch: str) -> None:
        self.add_initializers(proto)
        for node in proto.node:
            body = self._taken(node, branch)
            if body is not None:
                self.add(body, branch)
                for inner, outer in zip(body.output, node.output, strict=True):
                    if inner.name != outer:
                        self.graph.add(Node("Identity", "", node.name, (inner.name,), (outer,), {}))
                continue
            attributes = {a.name: self._attribute(node, a) for a in node.attribute}
            if node.op_type == "Constant":
                self.graph.constants[node.output[0]] = _constant_value(attributes)
                continue
            domain = _domain(node.domain)
            op = f"{domain}.{node.op_type}" if domain else node.op_type
            made = Node(op, domain, node.name, tuple(node.input), tuple(node.output), attributes)
            self._check_inputs(made)
            self._rewrite(made)

    def add_initializers(self, proto: onnx.GraphProto) -> None:
        for tensor in proto.initializer:
            self.graph.constants[tensor.name] = self.graph.initializers[tensor.name] = self.file.tensor(tensor)
        for sparse in proto.sparse_initializer:
            name = sparse.values.name
            self.graph.constants[name] = self.graph.initializers[name] = sparse_tensor(self.file, sparse)

    def _rewrite(self, node: Node) -> None:
        """The nodes that a quantised or fused one stands for, or the node itself."""
        exact = {} if self.graph.rounding and node.op not in quantised.LITERAL else quantised.RULES
        for rules in (exact, *self.rules):
            rule = rules.get(node.op)
            pieces = rule(self.graph, node) if rule else None
            if pieces is not None:
                if node.op in quantised.ROUNDING or node.attributes.get("accuracy_level", 0) == 4:
                    self.graph.roundings[node.op] = self.graph.roundings.get(node.op, 0) + 1
                for piece in pieces:
                    if piece.op == node.op:
                        self.graph.add(piece)
                    else:
                        self._rewrite(piece)
                return
        self.graph.add(node)

    def _check_inputs(self, node: Node) -> None:
        """Raise if a node has fewer inputs than its operator needs."""
        needed = _inputs_needed(node.op, self.graph.opset()) if not node.domain else None
        if needed is None:
            return
        if len(node.inputs) < needed or not all(node.inputs[:needed]) or not node.outputs:
            raise UnsupportedModelError(f"{node.describe()} has {len(node.inputs)} inputs, and needs {needed}")

    @staticmethod
    def _taken(node: onnx.NodeProto, branch: str) -> onnx.GraphProto | None:
        if node.op_type != "If" or not branch:
            return None
        return next((a.g for a in node.attribute if a.name == f"{branch}_branch"), None)

    def _attribute(self, node: onnx.NodeProto, proto: onnx.AttributeProto) -> Any:
        import onnx

        kinds = onnx.AttributeProto
        if proto.type == kinds.TENSOR:
            tensor = self.file.tensor(proto.t, node.output[0])
            return tensor if node.op_type == "Constant" else tensor.load()
        if proto.type == kinds.SPARSE_TENSOR:
            return sparse_tensor(self.file, proto.sparse_tensor, node.output[0])
        if proto.type in (kinds.GRAPH, kinds.GRAPHS):
            return proto.g
        value = onnx.helper.get_attribute_value(proto)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


@cache
def _inputs_needed(op: str, opset: int) -> int | None:
    """How many inputs an operator of ONNX's own takes at least; None where the opset has none of that name."""
    from onnx import defs

    try:
        return int(defs.get_schema(op, opset, "").min_input)
    except defs.SchemaError:
        return None


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _constant_value(attributes: dict[str, Any]) -> Tensor | Array:
    for name in ("value", "sparse_value"):
        if name in attributes:
            value: Tensor | Array = attributes[name]
            return value
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32)):
        if name in attributes:
            return np.asarray(attributes[name], dtype)
    for name in ("value_int", "value_ints"):
        if name in attributes:
            return np.asarray(attributes[name], np.int64)
    raise UnsupportedModelError(f"a Constant node holds {', '.join(attributes) or 'nothing'}, not numbers")
