"""Tables whose rows are looked up: the embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..evaluate.evaluator import Evaluator
from ..graph import Graph, Node
from .linear import matrix
from .sources import Source, constant_shape, constant_source, scales_of

Array = np.ndarray


@dataclass(frozen=True)
class Lookup:
    """out = table[rows]."""

    out: str
    table: Source
    rows: str  # "" where the rows are not chosen by indices
    node: Node
    repeated: bool = False  # the rows are repeated on their way to `out`, for every sequence


def _slice(graph: Graph, name: str) -> Lookup | None:
    """Rows that follow each other."""
    node = graph.producers.get(name)
    if node is None or node.op != "Slice":
        return None
    table = matrix(graph, node.inputs[0])
    return None if table is None else Lookup(name, table, "", node)


def _gather(graph: Graph, name: str) -> Lookup | None:
    node = graph.producers.get(name)
    if node is None or node.op != "Gather" or node.attributes.get("axis", 0) != 0:
        return None
    table = matrix(graph, node.inputs[0])
    return None if table is None else Lookup(name, table, node.inputs[1], node)


def _dequantized_rows(graph: Graph, name: str) -> Lookup | None:
    """Rows of an integer table, then DequantizeLinear with one scale."""
    node = graph.producers.get(name)
    if node is None or node.op not in ("DequantizeLinear", "com.microsoft.DequantizeLinear"):
        return None
    found = _gather(graph, node.inputs[0]) or _slice(graph, node.inputs[0])
    rest = [i for i in node.inputs[1:] if i]
    if found is None or any(i not in graph.fixed or constant_shape(graph, i) not in ((), (1,)) for i in rest):
        return None

    def dequantized(table: Array) -> Array:
        return Evaluator(graph, {node.inputs[0]: table})(name)

    rows, table = node.inputs[0], found.table.then("DequantizeLinear", found.table.shape, dequantized)
    scales = scales_of(graph, name, lambda: {rows: found.table.read()})
    return Lookup(name, replace(table, origin=(*found.table.origin, *rest), scales=scales), found.rows, found.node)


def _repeated(graph: Graph, name: str) -> Lookup | None:
    """Rows that follow each other, repeated for every sequence by Expand: what is where, is found by running it."""
    node = graph.producers.get(name)
    if node is None or node.op != "Expand":
        return None
    found = _slice(graph, graph.strip(node.inputs[0])) or _gather(graph, graph.strip(node.inputs[0]))
    return None if found is None else replace(found, out=name, repeated=True)


def _folded(graph: Graph, name: str) -> Lookup | None:
    """Rows that were looked up when the file was made: positions of a fixed length, (T, C) or (B, T, C)."""
    if name not in graph.fixed or name not in graph.constants:
        return None
    table, shape = matrix(graph, name), graph.shape(name)
    if table is None and len(shape) == 3 and (held := graph.constant(name)).tobytes() == held[:1].tobytes() * len(held):
        table = constant_source(graph, name).then("the same for every sequence", shape[1:], lambda a: a[0])
    if table is None or table.shape[0] == 1:
        return None
    node = Node("Constant", "", "", (name,), (name,), {})
    return Lookup(name, table, "", node)


LOOKUP_PATTERNS: list[Callable[[Graph, str], Lookup | None]] = [_gather, _slice, _dequantized_rows, _repeated, _folded]


def match_lookup(graph: Graph, name: str) -> Lookup | None:
    """The table whose rows a value holds."""
    for pattern in LOOKUP_PATTERNS:
        if (found := pattern(graph, name)) is not None:
            return found
    return None
