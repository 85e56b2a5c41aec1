"""From the file to the graph that is searched: functions inlined, a branch taken, nodes rewritten as plain ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UnsupportedModelError
from ..budget import Budget
from ..graph import Graph, Node
from ..guard import typed_errors
from ..read.reader import ModelFile
from ..read.sparse import sparse_tensor
from ..read.tensors import Tensor
from . import fold, fused, quantised, spellings

if TYPE_CHECKING:
    import onnx

Array = np.ndarray
Rules = Mapping[str, Callable[[Graph, Node], "list[Node] | None"]]


# What an operator takes: inputs at least, types of attributes, attributes that it needs.
_Signature = tuple[int, dict[str, int], frozenset[str]]
_NOTHING: _Signature = (0, {}, frozenset())
_INT, _TENSOR, _INTS = 2, 4, 7  # of onnx.AttributeProto.AttributeType
# Attributes that say yes or no.
SWITCHES = frozenset(
    {
        "allowzero", "causal", "exclusive", "fmod", "is_causal", "keepdims", "noop_with_empty_axes", "reverse",
        "transA", "transB", "transBatchA", "transBatchB", "unidirectional", "upper",
    }
)  # fmt: skip
# Nodes that a file may become when its functions are inlined: so many, and so many times those that it has.
FREE_NODES, NODE_FACTOR = 20_000, 64


@typed_errors()
def build_graph(
    file: ModelFile,
    branch: str = "",
    refusals: list[UnsupportedModelError] | None = None,
    rounding: bool = False,
    more: Rules | None = None,
) -> Graph:
    """The graph of a file, in plain operators.

    Parameters
    ----------
    file : ModelFile
    branch : "" or "then" or "else"
        Which branch of an If on a graph input (as in merged decoders) is taken for the graph itself.
    refusals, rounding
        See `Graph`.
    more : {operator: rule}
        Rules beside those of this package, applied last.
    """
    proto = file.proto
    if proto.functions:
        import onnx.inliner

        _check_functions(proto)
        proto = onnx.inliner.inline_local_functions(proto)
    graph = Graph({_domain(o.domain): o.version for o in proto.opset_import}, refusals, rounding)
    graph.budget = Budget(file.nbytes)
    builder = _Builder(file, graph, [fused.RULES, spellings.RULES, fold.RULES, more or {}])
    constants = {t.name for t in proto.graph.initializer} | {t.values.name for t in proto.graph.sparse_initializer}
    graph.ports([i for i in proto.graph.input if i.name not in constants], list(proto.graph.output))
    builder.add(proto.graph, branch, file.tensors)
    graph.check_order()
    return graph


class _Builder:
    def __init__(self, file: ModelFile, graph: Graph, rules: Sequence[Rules]) -> None:
        self.file, self.graph, self.rules = file, graph, rules
        self.aliases: dict[str, str] = {}  # constants under other names
        self.rewritten = quantised.RULES.keys() | {op for some in rules for op in some}

    def add(self, proto: onnx.GraphProto, branch: str, tensors: Mapping[str, Tensor]) -> None:
        """Add a graph's nodes, and its initializers, as far as `tensors` does not hold these already."""
        self.add_initializers(proto, tensors)
        opset = self.graph.opset()
        for node in proto.node:
            body = self._taken(node, branch) if branch else None
            if body is not None:
                self.add(body, branch, {})
                for inner, outer in zip(body.output, node.output, strict=True):
                    if inner.name != outer:
                        self.graph.add(Node("Identity", "", node.name, (inner.name,), (outer,), {}))
                continue
            domain = "" if node.domain == "ai.onnx" else node.domain
            inputs, attributes = (
                tuple(node.input),
                self._attributes(node, _NOTHING if domain else _signature(node.op_type, opset)),
            )
            if node.op_type == "Constant":
                held = attributes.get("value")
                self.graph.constants[node.output[0]] = _constant_value(attributes) if held is None else held
                continue
            op = f"{domain}.{node.op_type}" if domain else node.op_type
            if not self.aliases.keys().isdisjoint(inputs):
                inputs = tuple(self.aliases.get(i, i) for i in inputs)
            if op == "Identity" and inputs[0] in self.graph.constants:
                self.aliases[node.output[0]] = inputs[0]
            if op in quantised.PACKED:
                inputs = tuple(fold.unmoved(self.graph, i) for i in inputs)
            made = Node(op, domain, node.name, inputs, tuple(node.output), attributes)
            if op in self.rewritten:
                self._rewrite(made)
            else:
                self.graph.add(made)

    def add_initializers(self, proto: onnx.GraphProto, tensors: Mapping[str, Tensor]) -> None:
        for tensor in proto.initializer:
            name = tensor.name
            held = tensors[name] if name in tensors else self.file.tensor(tensor)
            self.graph.constants[name] = self.graph.initializers[name] = held
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

    @staticmethod
    def _taken(node: onnx.NodeProto, branch: str) -> onnx.GraphProto | None:
        if node.op_type != "If":
            return None
        return next((a.g for a in node.attribute if a.name == f"{branch}_branch"), None)

    def _attributes(self, node: onnx.NodeProto, signature: _Signature) -> dict[str, Any]:
        """A node's attributes; raises unless it has the inputs and attributes that its operator needs."""
        needed, types, required = signature
        if not node.output:
            raise UnsupportedModelError(f"{_describe(node)} computes nothing")
        if len(node.input) < needed or not all(node.input[:needed]):
            raise UnsupportedModelError(f"{_describe(node)} has {len(node.input)} inputs, and needs {needed}")
        found: dict[str, Any] = {}
        for attribute in node.attribute:
            name, kind = attribute.name, attribute.type
            if name in found or attribute.ref_attr_name or kind != types.get(name, kind) or name in SWITCHES:
                _check_attribute(node, attribute, found, types)
            if kind == _INT:
                found[name] = attribute.i
            elif kind == _INTS:
                found[name] = list(attribute.ints)
            elif kind == _TENSOR:
                tensor = self.file.tensor(attribute.t, node.output[0])
                found[name] = tensor if node.op_type == "Constant" else tensor.load()
            else:
                found[name] = self._attribute(node, attribute)
        if not required <= found.keys():
            raise UnsupportedModelError(
                f"{_describe(node)} lacks its attribute {', '.join(sorted(required - found.keys()))}"
            )
        return found

    def _attribute(self, node: onnx.NodeProto, proto: onnx.AttributeProto) -> Any:
        import onnx

        kinds = onnx.AttributeProto
        if proto.type == kinds.SPARSE_TENSOR:
            return sparse_tensor(self.file, proto.sparse_tensor, node.output[0])
        if proto.type in (kinds.GRAPH, kinds.GRAPHS):
            return proto.g
        value = onnx.helper.get_attribute_value(proto)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _check_attribute(
    node: onnx.NodeProto, attribute: onnx.AttributeProto, before: Container[str], types: Mapping[str, int]
) -> None:
    """Raise unless an attribute is given once, as a value, of the right type, and a switch is 0 or 1."""
    name = attribute.name
    if name in before:
        raise UnsupportedModelError(f"{_describe(node)} has an attribute twice, {name}")
    if attribute.ref_attr_name:
        raise UnsupportedModelError(
            f"{_describe(node)}: its {name} is the attribute {attribute.ref_attr_name!r} of a function, "
            "but it stands in none"
        )
    if name in SWITCHES and attribute.i not in (0, 1):  # runtimes differ in what they take for yes
        raise UnsupportedModelError(f"{_describe(node)}: its {name} is {attribute.i}, neither 0 nor 1")
    if attribute.type != types.get(name, attribute.type):
        given, wanted = (attribute.AttributeType.Name(t) for t in (attribute.type, types[name]))
        raise UnsupportedModelError(f"{_describe(node)}: its {name} is of type {given}, not {wanted}")


def _describe(node: onnx.NodeProto) -> str:
    return Node(node.op_type, node.domain, node.name, (), tuple(node.output), {}).describe()


@cache
def _signature(op: str, opset: int) -> _Signature:
    """What an operator of ONNX's own takes: inputs at least, types of attributes, attributes that it needs.

    Nothing is known of an operator that the opset does not have.
    """
    from onnx import AttributeProto, defs

    try:
        schema = defs.get_schema(op, opset, "")
    except defs.SchemaError:
        return _NOTHING
    number = AttributeProto.AttributeType.Value
    types = {name: number(a.type.name) for name, a in schema.attributes.items()}  # type: ignore[attr-defined]
    required = frozenset(name for name, attribute in schema.attributes.items() if attribute.required)
    return int(schema.min_input), types, required


def _check_functions(proto: onnx.ModelProto) -> None:
    """Raise if the file's functions call themselves, or each other so often that the graph would be immense."""
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    own = {key: Counter((n.domain, n.op_type, n.overload) for n in _nodes(f.node)) for key, f in functions.items()}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(calls: Counter[tuple[str, str, str]]) -> int:
        return sum(times * sizes.get(key, 1) for key, times in calls.items())

    while len(sizes) < len(functions):  # those whose callees are all known
        ready = [key for key in own if key not in sizes and not any(c in own and c not in sizes for c in own[key])]
        if not ready:
            name = next(key[1] for key in own if key not in sizes)
            raise UnsupportedModelError(f"the function {name!r} calls itself, or one that does")
        sizes.update((key, size(own[key])) for key in ready)
    main = Counter((n.domain, n.op_type, n.overload) for n in _nodes(proto.graph.node))
    limit = FREE_NODES + NODE_FACTOR * (main.total() + sum(calls.total() for calls in own.values()))
    if size(main) > limit:
        raise UnsupportedModelError(
            f"with its functions inlined the graph would have {size(main):,} nodes; a file of this size gets {limit:,}"
        )


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those in their bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body.node)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _constant_value(attributes: dict[str, Any]) -> Tensor | Array:
    if "sparse_value" in attributes:
        value: Tensor | Array = attributes["sparse_value"]
        return value
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32)):
        if name in attributes:
            return np.asarray(attributes[name], dtype)
    for name in ("value_int", "value_ints"):
        if name in attributes:
            return np.asarray(attributes[name], np.int64)
    raise UnsupportedModelError(f"a Constant node holds {', '.join(attributes) or 'nothing'}, not numbers")
