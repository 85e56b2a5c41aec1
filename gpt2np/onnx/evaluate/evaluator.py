"""Values of a graph, computed on demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...errors import UnsupportedModelError
from ..graph import Graph, Node
from .growth import GROWING, all_small, most_elements
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
        values, constants = self.values, self.graph.constants
        stack = [name]
        with np.errstate(all="ignore"):
            while stack:  # depth first without recursion: graphs are thousands of nodes deep
                current = stack[-1]
                if current in values:
                    stack.pop()
                    continue
                if current in constants:
                    values[current] = self.graph.constant(current)
                    self.read.add(current)
                    stack.pop()
                    continue
                node = self.graph.producer(current)
                if node is None:
                    raise UnsupportedModelError(f"the value {current!r} is neither computed by a node nor given")
                height = len(stack)
                for i in node.inputs:
                    if i and i not in values:
                        stack.append(i)  # noqa: PERF401  a frame for each node costs more
                if len(stack) == height:
                    self.run(node)
                    stack.pop()
        value: Array = values[name]
        return value

    def operator(self, node: Node) -> Operator | None:
        """What a node computes; None if it is not listed."""
        return self.operators.get(node.op)

    def taken(self, node: Node, inputs: list[Any]) -> list[Any]:
        """What a node takes of the values before it."""
        return inputs

    def given(self, node: Node, name: str, value: Any) -> Any:
        """What a node gives for what it has computed."""
        return value

    def run(self, node: Node) -> None:
        """Compute a node's outputs; its inputs are there."""
        operator = self.operator(node)
        if operator is None:
            raise UnsupportedModelError(f"{node.describe()}: gpt2np does not know what {node.op} means here")
        inputs = [self.values[i] if i else None for i in node.inputs]
        budget = None if node.op not in GROWING and all_small(inputs) else self.graph.budget
        try:
            inputs = self.taken(node, inputs)
            if budget is not None:
                budget.check(8 * most_elements(node, inputs), node.describe())
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
                value = self.given(node, output, np.asarray(value))
                if budget is not None and not any(np.may_share_memory(value, i) for i in inputs if i is not None):
                    budget.spend(value.nbytes, node.describe())  # it is no view
            self.values[output] = value
