"""Values of a graph, computed on demand."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from ...errors import UnsupportedModelError
from ..budget import Budget
from ..graph import Graph, Node
from .growth import FEW, VALUED, most_bytes
from .operators import OPERATORS, Operator

Array = np.ndarray


class Evaluator:
    """Values of a graph, computed on demand from values that are given.

    Parameters
    ----------
    graph : Graph
    feeds : mapping of value name to array
        Taken as they are, whatever node would compute them: not only the graph's inputs.
    read : set, optional
        Collects the names of the constants that were needed.

    Floats given as float64 stay float64 through Cast nodes, so that what is probed is the function itself and
    not the rounding of the file's float type.
    """

    def __init__(self, graph: Graph, feeds: Mapping[str, Array], read: set[str] | None = None) -> None:
        self.graph = graph
        self.values: dict[str, Any] = dict(feeds)
        self.read = set() if read is None else read
        self.operators: Mapping[str, Operator] = OPERATORS

    def __call__(self, name: str) -> Array:
        """The value of that name.

        Raises
        ------
        UnsupportedModelError
            If it needs an operator that is not listed here, an input that was not given, or a node fails; or if
            the graph has a budget, and a node asks for more than is left of it.
        """
        with np.errstate(all="ignore"):
            return self.value(name)

    def value(self, name: str) -> Array:
        """The same where NumPy does not warn anyway (see `typed_errors`)."""
        values, constants, producers = self.values, self.graph.constants, self.graph.producers
        kept, short = self.graph.kept, self.short
        stack = [name]
        while stack:  # depth first without recursion: graphs are thousands of nodes deep
            current = stack[-1]
            if current in values:
                stack.pop()
                continue
            if current in constants:
                values[current] = kept[current] if current in kept else self.graph.constant(current)
                self.read.add(current)
                stack.pop()
                continue
            node = producers.get(current)
            if node is None:
                raise UnsupportedModelError(f"the value {current!r} is neither computed by a node nor given")
            height = len(stack)
            for i in node.inputs:
                if i and i not in values:
                    stack.append(i)  # noqa: PERF401  a frame for each node costs more
            if len(stack) == height:
                if node.op not in short or not self.shorten(node):
                    self.run(node)
                stack.pop()
        value: Array = values[name]
        return value

    short: Container[str] = ()  # operators for which `shorten` is asked

    def shorten(self, node: Node) -> bool:
        """Compute a node in another way than by its operator; False if it is not computed yet."""
        return False

    def run(self, node: Node) -> None:
        """Compute a node's outputs; its inputs are there."""
        values, budget = self.values, self.graph.budget
        operator = self.operators.get(node.op)
        if operator is None:
            raise UnsupportedModelError(f"{node.describe()}: gpt2np does not know what {node.op} means here")
        inputs, together = [], 1  # so many elements come out at most, unless values say how many
        for i in node.inputs:
            array = values[i] if i else None
            inputs.append(array)
            if array is not None:
                together *= FEW if isinstance(array, tuple) else array.size or 1
        if together < FEW and node.op not in VALUED:
            budget = None
        try:
            if budget is not None:
                budget.check(most_bytes(node, inputs), node.describe)
            result = operator(node, inputs, self.graph.opsets.get(node.domain, 1))
        except UnsupportedModelError:
            raise
        except Exception as error:
            shapes = ", ".join(
                f"{i.dtype}{list(i.shape)}" if isinstance(i, np.ndarray) else type(i).__name__ for i in inputs
            )
            raise UnsupportedModelError(f"{node.describe()} cannot be evaluated on {shapes}: {error}") from error
        outputs = result if isinstance(result, list) else [result]
        for output, value in zip(node.outputs, outputs, strict=False):
            if not isinstance(value, tuple):  # a sequence of arrays
                value = np.asarray(value)
                if budget is not None and value.size >= FEW:
                    _spend(budget, node, inputs, value)
            self.values[output] = value


def _spend(budget: Budget, node: Node, inputs: list[Any], value: Array) -> None:
    """Count what a node has made, unless it is a view."""
    if not any(np.may_share_memory(value, i) for i in inputs if isinstance(i, np.ndarray)):
        budget.spend(value.nbytes, node.describe)
