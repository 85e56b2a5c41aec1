"""A canonical view of an ONNX graph: who computes which value, what is constant, and what only changes the view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import UnsupportedModelError
from . import dequantize, expand
from .read.reader import ModelFile
from .read.sparse import sparse_tensor
from .read.tensors import Tensor

if TYPE_CHECKING:
    import onnx

Array = np.ndarray
Literally = bool | Literal["saturating", "optimised", "unrounded"]

# What hands its first input on, with at most another shape or float type.
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
SAME = frozenset({"Identity", "Cast", "CastLike", "Dropout"})
VIEWS = RESHAPES | SAME
# What moves elements of any type, and what else takes float16 on x86 CPUs.
MOVES = RESHAPES | {"Identity", "Transpose", "Slice", "Split", "Expand", "Concat", "Gather", "Shape"}
FLOAT16_KERNELS = frozenset(
    {
        "Attention",
        "Clip",
        "DequantizeLinear",
        "IsNaN",
        "LayerNormalization",
        "Max",
        "Min",
        "Mod",
        "QuantizeLinear",
        "Relu",  # as Max
        "Round",
        "com.microsoft.GatherBlockQuantized",
        "com.microsoft.MatMulNBits",
        "com.microsoft.SkipLayerNormalization",
    }
)
NOT_FLOAT = frozenset({"Shape", "Size", "IsNaN", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})


@dataclass(frozen=True, eq=False)
class Node:
    """One node; `op` carries the domain unless it is ONNX's own: "MatMul", "com.microsoft.FastGelu"."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]  # "" where an optional one is left out
    outputs: tuple[str, ...]
    attributes: dict[str, Any]  # tensors as arrays; bodies as GraphProto

    def describe(self) -> str:
        """How error messages name it."""
        return f"{self.op} node {self.name or next(iter(self.outputs), '')!r}"

    def input(self, index: int) -> str:
        """An input's name, "" if it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


class Graph:
    """The graph of a file, functions inlined, seen by value names.

    Parameters
    ----------
    file : ModelFile
    branch : "" or "then" or "else"
        Which branch of an If on a graph input (as in merged decoders) is taken for the graph itself.
    literal : bool or a word
        Leave quantised nodes as they are, to be run with all their rounding (see `InferenceSession`); keep every
        constant that is read.
    objections : list, optional
        Collects what is no GPT-2's where the rest can be read without it; without a list that is an error.
    """

    # What moves the elements of its first input and leaves them as they are.
    LAYOUTS = RESHAPES | {"Identity", "Transpose", "Slice", "Split", "Expand"}

    def __init__(
        self,
        file: ModelFile,
        branch: str = "",
        literal: Literally = False,
        objections: list[UnsupportedModelError] | None = None,
    ) -> None:
        self.file = file
        self.literal = literal
        self.objections = objections
        self.invented: set[str] = set()  # values that the file does not hold
        self.lengths: dict[str, str] = {}  # values that fused attentions take lengths of the past from: their roles
        self.one_token = False  # a fused attention takes one new position at a time
        self.roundings: dict[str, int] = {}  # the operators that round activations, and how often
        proto = file.proto
        if proto.functions:
            import onnx.inliner

            proto = onnx.inliner.inline_local_functions(proto)
        self._opsets = {_domain(o.domain): o.version for o in proto.opset_import}
        self.constants: dict[str, Tensor | Array] = {}  # initializers and Constant nodes, not yet read
        self.initializers: dict[str, Tensor] = {}
        self.nodes: list[Node] = []
        self._producers: dict[str, tuple[Node, int]] = {}
        self._consumers: dict[str, list[Node]] = {}
        self._folded: dict[str, bool] = {}
        self._read: dict[str, Array] = {}
        outer = proto.graph
        graph = search_decoder(outer) or outer
        if graph is not outer:
            self._add_initializers(outer)  # a body may read the initializers around it
        self._add(graph, branch)
        self.inputs = [i for i in graph.input if i.name not in self.initializers]
        self.outputs = list(graph.output)
        self._input_names = {i.name for i in self.inputs}
        self._check_order()

    def override(self, name: str, value: Any) -> str:
        """Make a value a constant, whatever node computes it."""
        self.constants[name] = np.asarray(value)
        self.invented.add(name)
        self._folded[name] = True
        return name

    def object(self, error: UnsupportedModelError) -> None:
        """Raise an error that the search could go on after, or note it where they are collected."""
        if self.objections is None:
            raise error
        self.objections.append(error)

    def _add(self, proto: onnx.GraphProto, branch: str) -> None:
        self._add_initializers(proto)
        for node in proto.node:
            body = self._taken(node, branch)
            if body is not None:
                self._add(body, branch)
                for inner, outer in zip(body.output, node.output, strict=True):
                    if inner.name != outer:
                        self._add_node(Node("Identity", "", node.name, (inner.name,), (outer,), {}))
                continue
            attributes = {a.name: self._attribute(node, a) for a in node.attribute}
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _constant_value(attributes)
                continue
            domain = _domain(node.domain)
            op = f"{domain}.{node.op_type}" if domain else node.op_type
            made = Node(op, domain, node.name, tuple(node.input), tuple(node.output), attributes)
            self._check_inputs(made)
            self._add_canonical(made)

    def _add_initializers(self, proto: onnx.GraphProto) -> None:
        for tensor in proto.initializer:
            self.constants[tensor.name] = self.initializers[tensor.name] = self.file.tensor(tensor)
        for sparse in proto.sparse_initializer:
            name = sparse.values.name
            self.constants[name] = self.initializers[name] = sparse_tensor(self.file, sparse)

    def _add_canonical(self, node: Node) -> None:
        """The nodes that a quantised or fused one stands for, or the node itself."""
        optimised = dequantize.OPTIMISED if self.literal == "optimised" else {}
        exact = {} if self.rounding and node.op not in dequantize.LITERAL else dequantize.RULES
        for rules in (exact, expand.RULES, optimised):
            rule = rules.get(node.op)
            pieces = rule(self, node) if rule else None
            if pieces is not None:
                if node.op in dequantize.ROUNDING or node.attributes.get("accuracy_level", 0) == 4:
                    self.roundings[node.op] = self.roundings.get(node.op, 0) + 1
                for piece in pieces:
                    if piece.op == node.op:
                        self._add_node(piece)
                    else:
                        self._add_canonical(piece)
                return
        self._add_node(node)

    def _add_node(self, node: Node) -> None:
        self.nodes.append(node)
        for index, output in enumerate(node.outputs):
            if output:
                self._producers[output] = node, index
        for name in dict.fromkeys(node.inputs):
            self._consumers.setdefault(name, []).append(node)

    def _check_inputs(self, node: Node) -> None:
        """Raise if a node has fewer inputs than its operator needs."""
        needed = _inputs_needed(node.op, self.opset()) if not node.domain else None
        if needed is None:
            return
        if len(node.inputs) < needed or not all(node.inputs[:needed]) or not node.outputs:
            raise UnsupportedModelError(f"{node.describe()} has {len(node.inputs)} inputs, and needs {needed}")

    def _check_order(self) -> None:
        """Raise if values depend on each other in a circle: everything that walks the graph would hang."""
        twice = next((o for o, n in Counter(o for n in self.nodes for o in n.outputs if o).items() if n > 1), None)
        if twice is not None:
            raise UnsupportedModelError(f"the value {twice!r} is computed by two nodes")
        waiting = {id(n): sum(i in self._producers for i in set(n.inputs)) for n in self.nodes}
        ready = [n for n in self.nodes if not waiting[id(n)]]
        done = 0
        while ready:
            node = ready.pop()
            done += 1
            for reader in {id(c): c for o in node.outputs if o for c in self.consumers(o)}.values():
                waiting[id(reader)] -= sum(o in reader.inputs for o in node.outputs if o)
                if not waiting[id(reader)]:
                    ready.append(reader)
        if done < len(self.nodes):
            node = next(n for n in self.nodes if waiting[id(n)])
            raise UnsupportedModelError(f"{node.describe()} depends on its own output, or on a value given twice")

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

    @property
    def rounding(self) -> bool:
        """Whether nodes round as the file is run."""
        return self.literal not in (False, "unrounded")

    @cached_property
    def float16(self) -> tuple[set[str], set[int]]:
        """See `float16`; nothing where nothing is rounded."""
        return float16(self) if self.rounding else (set(), set())

    def opset(self, domain: str = "") -> int:
        """Version of a domain's operators that the file asks for."""
        return self._opsets.get(domain, 1)

    @property
    def opsets(self) -> dict[str, int]:
        """{domain: version}; "" is ONNX's own domain."""
        return dict(self._opsets)

    def producer(self, name: str) -> Node | None:
        """The node that computes a value; None for inputs, constants and unknown names."""
        found = self._producers.get(name)
        return found[0] if found else None

    def output_index(self, name: str) -> int:
        """Which of its node's outputs a value is."""
        return self._producers[name][1]

    def consumers(self, name: str) -> list[Node]:
        """The nodes that read a value."""
        return self._consumers.get(name, [])

    def is_input(self, name: str) -> bool:
        """Whether the caller feeds this value."""
        return name in self._input_names

    def is_constant(self, name: str) -> bool:
        """Whether a value can be computed from the file alone."""
        stack = [name]
        while stack:
            current = stack[-1]
            if current in self._folded:
                stack.pop()
            elif current in self.constants:
                self._folded[current] = True
            elif current not in self._producers:
                self._folded[current] = False
            else:
                inputs = [i for i in self._producers[current][0].inputs if i]
                unknown = [i for i in inputs if i not in self._folded]
                if any(self._folded.get(i) is False for i in inputs):
                    self._folded[current] = False
                elif unknown:
                    stack.extend(unknown[:1])  # one at a time: most values turn out not to be constant early
                else:
                    self._folded[current] = bool(inputs)
        return self._folded[name]

    def constant(self, name: str) -> Array:
        """The array of an initializer or Constant node; small ones are kept after the first reading."""
        value = self.constants[name]
        if not isinstance(value, Tensor):
            return value
        if name in self._read:
            return self._read[name]
        array = value.load()
        if array.nbytes <= 1 << 16 or self.literal:
            self._read[name] = array
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an initializer or Constant node."""
        return tuple(self.constants[name].shape)

    def scalar(self, name: str) -> float | None:
        """A constant of one element as a number, else None."""
        value = self.small(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def strip(self, name: str, through: frozenset[str] = VIEWS) -> str:
        """The value behind a chain of nodes that only change the view."""
        return self.chain(name, through)[-1]

    def chain(self, name: str, through: frozenset[str] = VIEWS) -> list[str]:
        """The values met by `strip`, from the given one to the one behind."""
        names = [name]
        while (node := self.producer(name)) is not None and self.output_index(name) == 0:
            if node.op not in through and not (through is VIEWS and self.is_whole(node)):
                break
            name = node.inputs[0]
            names.append(name)
        return names

    def is_whole(self, node: Node) -> bool:
        """A Slice that takes everything."""
        if node.op != "Slice" or len(node.inputs) < 3:
            return False
        starts, ends, steps = (self.small(node.input(i)) for i in (1, 2, 4))
        if starts is None or ends is None or (node.input(4) and steps is None):
            return False
        return bool(not starts.any() and (ends >= 2**31 - 1).all() and (steps is None or (steps == 1).all()))

    def small(self, name: str) -> Array | None:
        """A constant of a few elements, computed if need be; else None."""
        if not name or not self.is_constant(name) or (name in self.constants and np.prod(self.shape(name)) > 64):
            return None
        from .evaluate import Evaluator

        return Evaluator(self, {})(name)

    def holds(self, name: str) -> bool:
        """Whether an integer value is (rows or parts of) a constant, not a rounded activation."""
        while name not in self.constants:
            node = self.producer(name)
            if node is None or node.op not in self.LAYOUTS | {"Gather"} or "written_as" in node.attributes:
                return False
            name = node.inputs[0]
        return True

    def ancestors(self, name: str, stop: frozenset[str] | set[str] = frozenset()) -> Iterator[str]:
        """Values that a value depends on, nearest first, itself included; not past `stop`, Shape, or constants."""
        seen, level = {name}, [name]
        while level:
            following = []
            for current in level:
                yield current
                node = self.producer(current)
                if node is None or current in stop or node.op in ("Shape", "Size"):
                    continue
                for i in node.inputs:
                    if i and i not in seen and i not in self.constants:
                        seen.add(i)
                        following.append(i)
            level = following


@cache
def _inputs_needed(op: str, opset: int) -> int | None:
    """How many inputs an operator of ONNX's own takes at least; None where the opset has none of that name."""
    from onnx import defs

    try:
        return int(defs.get_schema(op, opset, "").min_input)
    except defs.SchemaError:
        return None


def search_decoder(graph: onnx.GraphProto) -> onnx.GraphProto | None:
    """The GPT-2 inside a node that searches for a continuation, as ONNX Runtime's tools make it."""
    for node in graph.node:
        if node.domain == "com.microsoft" and node.op_type in ("BeamSearch", "GreedySearch", "Sampling"):
            return next((a.g for a in node.attribute if a.name == "decoder"), None)
    return None


def float16(graph: Graph) -> tuple[set[str], set[int]]:
    """The values that a file declares as float16, and the id of each node that ONNX Runtime runs in it on x86 CPUs.

    Few operators have float16 kernels there; the others run in float32, and so does what has a kernel but lies
    between nodes that have none. Between nodes in float32 nothing is rounded, not even by a Cast to float16.
    (insert_cast_transformer.cc in onnxruntime/core/optimizer)
    """
    import onnx

    def narrows(node: Node | None) -> bool:
        return node is not None and node.op == "Cast" and node.attributes["to"] == onnx.TensorProto.FLOAT16

    half = {n for n in (*graph.constants, *(i.name for i in graph.inputs)) if _is_float16(graph, n)}
    known = -1
    while known < len(half):  # nodes may stand in any order
        known = len(half)
        for node in graph.nodes:
            keeps = node.op not in NOT_FLOAT | {"Cast"} and any(i in half for i in node.inputs)
            if keeps or narrows(node):
                half.update(node.outputs)
    ends = {o.name for o in graph.outputs}

    def kernel(node: Node) -> str:
        return str(node.attributes.get("written_as", node.op))

    def in_float32(node: Node | None) -> bool:
        return node is not None and kernel(node) not in MOVES | FLOAT16_KERNELS | {"Cast"}

    found: set[int] = set()
    for node in graph.nodes:
        if node.op == "Cast" and not narrows(node) and narrows(graph.producer(node.inputs[0])):
            found.add(id(node))  # rounding that is written out
        if node.op == "Cast" or in_float32(node) or not any(o in half for o in node.outputs):
            continue
        sources = [i for i in node.inputs if i in half and i not in graph.constants]
        readers = [c for o in node.outputs for c in graph.consumers(o)]
        alone = all(in_float32(graph.producer(i)) for i in sources) and all(in_float32(c) for c in readers)
        alone = alone and any(graph.producer(i) for i in node.inputs)
        if not alone or ends & set(node.outputs):
            found.add(id(node))
    return half, found


def _is_float16(graph: Graph, name: str) -> bool:
    from onnx import TensorProto

    if name in graph.constants:
        return graph.constants[name].dtype == np.float16
    return any(i.name == name and i.type.tensor_type.elem_type == TensorProto.FLOAT16 for i in graph.inputs)


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
