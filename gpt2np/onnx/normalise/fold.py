"""What follows from the file alone: small constants, and nodes that do nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..evaluate.evaluator import Evaluator
from ..graph import Graph, Node
from .rewriter import rewritten

Array = np.ndarray


def small(graph: Graph, name: str) -> Array | None:
    """A constant of a few elements, computed if need be; else None."""
    if not name or not graph.is_constant(name) or (name in graph.constants and np.prod(graph.shape(name)) > 64):
        return None
    if name in graph.constants:
        return graph.constant(name)
    if name not in graph.computed:
        graph.computed[name] = Evaluator(graph, {})(name)
    return graph.computed[name]


def scalar(graph: Graph, name: str) -> float | None:
    """A constant of one element as a number, else None."""
    value = small(graph, name)
    return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


def _whole_slice(graph: Graph, node: Node) -> list[Node] | None:
    """A Slice that takes everything is Identity."""
    if len(node.inputs) < 3:
        return None
    starts, ends, steps = (small(graph, node.input(i)) for i in (1, 2, 4))
    if starts is None or ends is None or (node.input(4) and steps is None):
        return None
    if starts.any() or (ends < 2**31 - 1).any() or (steps is not None and (steps != 1).any()):
        return None
    return [rewritten(node, "Identity", node.inputs[:1], node.outputs[0])]


RULES: dict[str, Callable[[Graph, Node], list[Node] | None]] = {"Slice": _whole_slice}
