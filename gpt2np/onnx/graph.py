"""A graph of an ONNX file as data: who computes which value, what is constant, and what only changes the view."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UnsupportedModelError
from .budget import Budget
from .read.tensors import Tensor

if TYPE_CHECKING:
    import onnx

Array = np.ndarray

# What hands its first input on, with at most another shape or float type.
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
SAME = frozenset({"Identity", "Cast", "CastLike", "Dropout"})
VIEWS = RESHAPES | SAME
# What moves the elements of its first input and leaves them as they are; and what moves elements of any type.
LAYOUTS = RESHAPES | {"Identity", "Transpose", "Slice", "Split", "Expand"}
MOVES = LAYOUTS | {"Concat", "Gather", "Shape"}

# Bytes of a constant that is kept once it is read; and of one that is kept until another is read.
KEPT, KEPT_ONCE = 1 << 16, 1 << 23

# Operators of our own, in the place of pieces of fused and quantised ones.
UNPACK = "gpt2np.UnpackBits"  # packed integers of a com.microsoft node -> float matrix
ROUND = "gpt2np.RoundBlocks"  # an activation rounded to 8 bits, each block of a row by its own scale
MASKED = "gpt2np.MaskedScores"  # what a fused attention does to scores before its softmax


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
    """Nodes and constants, seen by value names.

    Parameters
    ----------
    opsets : {domain: version}
        Which version of each domain's operators the file asks for; "" is ONNX's own domain.
    refusals : list, optional
        Collects what is no GPT-2's where the rest can be read without it; without a list that is an error.
    rounding : bool
        Nodes that round activations stay as they are (see `emulate`).
    """

    def __init__(
        self,
        opsets: Mapping[str, int],
        refusals: list[UnsupportedModelError] | None = None,
        rounding: bool = False,
    ) -> None:
        self.opsets = dict(opsets)
        self.refusals = refusals
        self.rounding = rounding
        self.budget: Budget | None = None  # of what nodes make, while strangers' nodes are looked at
        self.keep = rounding  # constants of any size, once they are read
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.synthetic: set[str] = set()  # values that the file does not hold
        self.lengths: dict[str, str] = {}  # values that fused attentions take lengths of the past from: their roles
        self.one_token = False  # a fused attention takes one new position at a time
        self.neutral: set[str] = set()  # constants that change nothing where they are added, or multiplied by
        self.roundings: dict[str, int] = {}  # the operators that round activations, and how often
        self.constants: dict[str, Tensor | Array] = {}  # initializers and Constant nodes, not yet read
        self.initializers: dict[str, Tensor] = {}
        self.computed: dict[str, Array] = {}  # small constants that nodes compute, once they are asked for
        self.nodes: list[Node] = []
        self.order: list[Node] = []  # the nodes, each behind those that it reads
        self.producers: dict[str, Node] = {}  # which node computes a value
        self._indices: dict[str, int] = {}  # which of its node's outputs a value is
        self._twice = ""  # a value that two nodes compute
        self._consumers: dict[str, list[Node]] = {}
        self.fixed: set[str] = set()  # values that follow from the file alone, once the graph is whole
        self._folded: dict[str, bool] = {}
        self.linears: dict[str, Any] = {}  # the linear maps and layer norms that were found, or None, by their values
        self.norms: dict[str, Any] = {}
        self.kept: dict[str, Array] = {}  # constants that have been read
        self._last = ""  # which large constant among those was read last
        self.input_names: set[str] = set()

    def ports(self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> None:
        """Set what the caller feeds and what is asked for."""
        self.inputs, self.outputs = inputs, outputs
        self.input_names = {i.name for i in inputs}

    def add(self, node: Node) -> None:
        """Append a node."""
        self.nodes.append(node)
        for index, output in enumerate(node.outputs):
            if output:
                self._twice = output if output in self.producers else self._twice
                self.producers[output], self._indices[output] = node, index
        for name in dict.fromkeys(node.inputs):
            self._consumers.setdefault(name, []).append(node)

    def override(self, name: str, value: Any) -> str:
        """Make a value a constant, whatever node computes it."""
        self.constants[name] = np.asarray(value)
        self.synthetic.add(name)
        self._folded[name] = True
        return name

    def object(self, error: UnsupportedModelError) -> None:
        """Raise an error that the search could go on after, or note it where they are collected."""
        if self.refusals is None:
            raise error
        self.refusals.append(error)

    def check_order(self) -> None:
        """Raise if values depend on each other in a circle: everything that walks the graph would hang."""
        if self._twice:
            raise UnsupportedModelError(f"the value {self._twice!r} is computed by two nodes")
        waiting = {id(n): len(self.producers.keys() & n.inputs) for n in self.nodes}
        ready = [n for n in self.nodes if not waiting[id(n)]]
        while ready:
            node = ready.pop()
            self.order.append(node)
            for output in node.outputs:
                for reader in self._consumers.get(output, ()) if output else ():
                    waiting[id(reader)] -= 1
                    if not waiting[id(reader)]:
                        ready.append(reader)
        if len(self.order) < len(self.nodes):
            node = next(n for n in self.nodes if waiting[id(n)])
            raise UnsupportedModelError(f"{node.describe()} depends on its own output, or on a value given twice")
        self._tell_constants()

    def _tell_constants(self) -> None:
        """Find out which values are constant, all of them in one walk."""
        folded, constants = self._folded, self.constants
        for node in self.order:
            constant = False
            for i in node.inputs:
                if i:
                    constant = i in constants or folded.get(i, False)
                    if not constant:
                        break
            for output in node.outputs:
                if output:
                    folded[output] = constant or output in constants
        self.fixed = {*constants, *(value for value, constant in folded.items() if constant)}

    def dependants(self, values: Iterable[str]) -> set[str]:
        """Some values and those that are made of them, not of their shapes alone."""
        found, constants = set(values), self.constants
        for node in self.order:
            if node.op not in ("Shape", "Size") and not found.isdisjoint(node.inputs):
                found.update({*node.outputs}.difference(constants))  # a rewrite may have replaced it
        return found

    def opset(self, domain: str = "") -> int:
        """Version of a domain's operators that the file asks for."""
        return self.opsets.get(domain, 1)

    def output_index(self, name: str) -> int:
        """Which of its node's outputs a value is."""
        return self._indices[name]

    def consumers(self, name: str) -> list[Node]:
        """The nodes that read a value."""
        return self._consumers.get(name, [])

    def is_constant(self, name: str) -> bool:
        """Whether a value can be computed from the file alone."""
        if name in self.constants:
            return True
        if name in self._folded:
            return self._folded[name]
        stack, waiting, folded, constants = [name], {name}, self._folded, self.constants
        while stack:
            current, height = stack[-1], len(stack)
            if current in folded:
                waiting.discard(stack.pop())
            elif current in constants or current not in self.producers:
                folded[current] = current in constants
            else:
                constant: bool | None = False  # None: an input that is not known yet comes first
                for i in self.producers[current].inputs:
                    if i:
                        constant = folded.get(i) if i not in constants else True
                        if constant is None and i not in waiting:
                            stack.append(i)  # one at a time: most values turn out not to be constant early
                            waiting.add(i)
                        if not constant:
                            break
                if constant is not None or len(stack) == height:
                    folded[current] = bool(constant)  # a circle, which `check_order` refuses, is not
        return self._folded[name]

    def constant(self, name: str) -> Array:
        """The array of an initializer or Constant node; small ones are kept after the first reading."""
        value = self.constants[name]
        if not isinstance(value, Tensor):
            return value
        if name in self.kept:
            return self.kept[name]
        array = value.load()
        if array.nbytes <= KEPT or self.keep:
            self.kept[name] = array
        elif array.nbytes <= KEPT_ONCE:  # a mask, which is read several times in a row
            self.kept.pop(self._last, None)
            self.kept[name], self._last = array, name
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an initializer or Constant node."""
        return tuple(self.constants[name].shape)

    def strip(self, name: str, through: frozenset[str] = VIEWS) -> str:
        """The value behind a chain of nodes that only change the view."""
        producers = self.producers
        while (node := producers.get(name)) is not None and node.op in through and node.outputs[0] == name:
            name = node.inputs[0]
        return name

    def chain(self, name: str, through: frozenset[str] = VIEWS) -> list[str]:
        """The values met by `strip`, from the given one to the one behind."""
        names, producers = [name], self.producers
        while (node := producers.get(name)) is not None and node.op in through and node.outputs[0] == name:
            name = node.inputs[0]
            names.append(name)
        return names

    def holds(self, name: str) -> bool:
        """Whether an integer value is (rows or parts of) a constant, not a rounded activation."""
        while name not in self.constants:
            node = self.producers.get(name)
            if node is None or node.op not in LAYOUTS | {"Gather"} or "written_as" in node.attributes:
                return False
            name = node.inputs[0]
        return True

    def ancestors(
        self,
        name: str,
        stop: Container[str] = frozenset(),
        ops: Container[str] | None = None,
        limit: int | None = None,
    ) -> Iterator[str]:
        """Values that a value depends on, nearest first, itself included; not past `stop`, Shape, or constants.

        Parameters
        ----------
        ops : container of str, optional
            Only values that such operators compute.
        limit : int, optional
            So many values are looked at.
        """
        seen, level, looked_at = {name}, [name], 0
        while level:
            following = []
            for current in level:
                node = self.producers.get(current)
                if ops is None or (node is not None and node.op in ops):
                    yield current
                looked_at += 1
                if looked_at == limit:
                    return
                if node is None or current in stop or node.op in ("Shape", "Size"):
                    continue
                for i in node.inputs:
                    if i and i not in seen and i not in self.constants:
                        seen.add(i)
                        following.append(i)
            level = following
