"""Ways of exporters to write what others write plainly: means, and constants that are repeated before they are used."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..graph import Graph, Node
from .fold import scalar, small
from .rewriter import Pieces, rewritten

Rule = Callable[[Graph, Node], list[Node] | None]
SUMS = ("ReduceSum", "ReduceSumSquare")


def _pooled_mean(graph: Graph, node: Node) -> list[Node]:
    """GlobalAveragePool of (B, T, C) is the mean over C: tf2onnx writes it for TensorFlow's moments."""
    return [rewritten(node, "ReduceMean", node.inputs[:1], node.outputs[0], axes=[2], keepdims=1)]


def _declared(graph: Graph) -> list[int]:
    """The sizes of a file's first input, where they are fixed."""
    dims = graph.inputs[0].type.tensor_type.shape.dim if graph.inputs else []
    return [int(d.dim_value) for d in dims] if all(d.dim_value > 0 for d in dims) else []


def _sum_in_its_place(graph: Graph, node: Node) -> list[Node] | None:
    """JAX's mean, a sum (B, T) that Reshape and Expand make (B, T, 1) before it is divided, with keepdims instead."""
    before = graph.producers.get(node.inputs[0])
    if before is None or before.op not in ("Reshape", "Expand") or scalar(graph, node.inputs[1]) is None:
        return None
    lead = _declared(graph)
    if not lead:
        return None
    value, moved = node.inputs[0], False
    while (maker := graph.producers.get(value)) is not None and maker.op in ("Reshape", "Expand"):
        shape = small(graph, maker.inputs[1])
        if shape is None or shape.tolist() != [*lead, 1]:
            return None
        value, moved = maker.inputs[0], True
    if not moved or maker is None or maker.op not in SUMS or maker.attributes.get("keepdims", 1):
        return None
    axes = small(graph, maker.input(1)) if maker.input(1) else np.asarray(maker.attributes.get("axes", ()))
    if axes is None or axes.tolist() not in ([len(lead)], [-1]):
        return None
    made = Pieces(graph, node)
    total = made.add(maker.op, maker.inputs[0], axes=[-1], keepdims=1)
    made.add("Div", total, node.inputs[1], out=node.outputs[0])
    return made.nodes


def _repeated_constant(graph: Graph, node: Node) -> list[Node] | None:
    """Arithmetic with a constant that is repeated along the batch first, as the other operand's batch would do it."""
    for k, name in enumerate(node.inputs):
        maker = graph.producers.get(name)
        if (
            maker is None
            or maker.op != "Expand"
            or not graph.is_constant(name)
            or graph.is_constant(node.inputs[1 - k])
        ):
            continue
        shape, before = small(graph, maker.inputs[1]), graph.producers.get(maker.inputs[0])
        own = graph.shape(maker.inputs[0]) if maker.inputs[0] in graph.constants else None
        if own is None and before is not None and before.op == "Reshape":
            given = small(graph, before.inputs[1])
            own = None if given is None or (given < 1).any() else tuple(int(n) for n in given)
        if shape is None or own is None or len(own) != len(shape):
            continue
        lead, sizes = _declared(graph), enumerate(zip(shape.tolist(), own, strict=True))
        fits = [new == old or (axis < len(lead) and new == lead[axis]) for axis, (new, old) in sizes]
        if all(fits):
            inputs = (*node.inputs[:k], maker.inputs[0], *node.inputs[k + 1 :])
            return [rewritten(node, node.op, inputs, node.outputs[0], **node.attributes)]
    return None


RULES: dict[str, Rule] = {
    "GlobalAveragePool": _pooled_mean,
    "Div": _sum_in_its_place,
    "Add": _repeated_constant,
    "Mul": _repeated_constant,
    "Sub": _repeated_constant,
}
