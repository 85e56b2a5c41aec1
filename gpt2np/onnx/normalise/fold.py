"""What follows from the file alone: small constants, and nodes that do nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..evaluate.evaluator import Evaluator
from ..graph import Graph, Node
from .rewriter import rewritten

Array = np.ndarray


def small(graph: Graph, name: str) -> Array | None:
    """A constant of a few elements, computed if need be; else None."""
    if not name or not graph.is_constant(name) or (name in graph.constants and math.prod(graph.shape(name)) > 64):
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


def unmoved(graph: Graph, name: str) -> str:
    """The constant of the file that a value equals, where nodes take it there and back; else the value itself."""
    if name in graph.constants or not name or not graph.is_constant(name):
        return name
    value, pending = Evaluator(graph, {})(name), [name]
    while pending:
        current = pending.pop()
        if current in graph.constants:
            held = graph.constant(current)
            if (held.shape, held.dtype) == (value.shape, value.dtype) and np.array_equal(held, value):
                return current
        elif (node := graph.producers.get(current)) is not None:
            pending.extend(i for i in node.inputs if i)
    return name


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


# What a vector of zeros is added to, or to a Reshape of it, that is no bias: what adds, chooses, has a bias of its own.
BIAS_IS_THIRD = frozenset({"Gemm", "LayerNormalization"})  # among their inputs, and may be left out
UNBIASED = frozenset({"Add", "Sub", "Gather"}) | BIAS_IS_THIRD


def _without_effect(neutral: float, places: Sequence[int]) -> Callable[[Graph, Node], list[Node] | None]:
    """Arithmetic with the number that changes nothing is Identity.

    So is that with a vector of it, which the ledger admits where the result is no wider than the other operand.
    """

    def rule(graph: Graph, node: Node) -> list[Node] | None:
        for i in places:
            name, other = node.inputs[i], node.inputs[1 - i]
            value = graph.constants.get(name)
            if value is None or len(value.shape) > 1:
                continue
            if math.prod(value.shape) == 1:
                if graph.constant(name).flat[0] == neutral:
                    return [rewritten(node, "Identity", (other,), node.outputs[0])]
                continue
            maker = graph.producers.get(graph.strip(other))
            if maker is not None and maker.op == "Reshape":
                maker = graph.producers.get(graph.strip(maker.inputs[0]))
            if maker is None or maker.op not in UNBIASED or (maker.op in BIAS_IS_THIRD and not maker.input(2)):
                continue
            if value.dtype.kind == "f" and not graph.is_constant(other) and (graph.constant(name) == neutral).all():
                graph.neutral.add(name)
                return [rewritten(node, "Identity", (other,), node.outputs[0], beside=tuple(value.shape))]
        return None

    return rule


def _there_and_back(graph: Graph, node: Node) -> list[Node] | None:
    """A Transpose that undoes the one before it is Identity."""
    before = graph.producers.get(node.inputs[0])
    if before is None or before.op != "Transpose":
        return None
    first, second = before.attributes.get("perm"), node.attributes.get("perm")
    if first is None or second is None:
        undone = first is second  # both turn all axes round
    else:
        undone = len(first) == len(second) and [first[axis] for axis in second] == list(range(len(first)))
    return [rewritten(node, "Identity", before.inputs[:1], node.outputs[0])] if undone else None


RULES: dict[str, Callable[[Graph, Node], list[Node] | None]] = {
    "Slice": _whole_slice,
    "Transpose": _there_and_back,
    "Add": _without_effect(0, (0, 1)),
    "Sub": _without_effect(0, (1,)),
    "Mul": _without_effect(1, (0, 1)),
    "Div": _without_effect(1, (1,)),
}
