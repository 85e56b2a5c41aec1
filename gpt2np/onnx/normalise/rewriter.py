"""Nodes in the place of other nodes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..graph import Graph, Node


class Pieces:
    """Nodes in the place of one node."""

    def __init__(self, graph: Graph, origin: Node) -> None:
        self.graph, self.origin = graph, origin
        self.nodes: list[Node] = []

    def add(self, op: str, *inputs: str, out: str = "", count: int = 1, **attributes: Any) -> str:
        """Append a node and return its (first) output; further ones are named `...:1`, `...:2`."""
        if not out:
            out = f"{self.origin.outputs[0] or self.origin.name} [{len(self.nodes)}]"
            self.graph.synthetic.add(out)
        outputs = (out, *(f"{out}:{i}" for i in range(1, count)))
        self.graph.synthetic.update(outputs[1:])
        attributes["written_as"] = self.origin.op
        self.nodes.append(Node(op, op.rpartition(".")[0], self.origin.name, inputs, outputs, attributes))
        return out

    def constant(self, value: Any) -> str:
        """The name of a new constant."""
        name = f"{self.origin.outputs[0] or self.origin.name} constant {len(self.graph.synthetic)}"
        self.graph.synthetic.add(name)
        self.graph.constants[name] = np.asarray(value)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))


def rewritten(origin: Node, op: str, inputs: tuple[str, ...], output: str, **attributes: Any) -> Node:
    domain = op.rpartition(".")[0]
    attributes["written_as"] = origin.op
    return Node(op, domain, origin.name, inputs, (output,), attributes)


def inner(
    graph: Graph, origin: Node, op: str, inputs: tuple[str, ...], what: str, made: list[Node], **attributes: Any
) -> str:
    """Append a node whose output the file does not hold, and return that output's name."""
    out = f"{inputs[0]} {what} in {origin.outputs[0]}"
    graph.synthetic.add(out)
    made.append(rewritten(origin, op, inputs, out, **attributes))
    return out
