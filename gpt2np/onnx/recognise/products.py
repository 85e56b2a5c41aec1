"""Attention: two products of activations with a softmax between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..graph import Graph, Node
from .linear import PRODUCTS

Array = np.ndarray


@dataclass(frozen=True)
class Product:
    """alpha * a @ b, two activations, with (…, D, S) as b's last axes unless it is transposed."""

    a: str
    b: str
    transposed: bool
    alpha: float
    out: str
    node: Node


def match_product(graph: Graph, name: str) -> Product | None:
    """The product of two values neither of which is constant."""
    node = graph.producer(name)
    if node is None or len(node.inputs) < 2:
        return None
    a, b = node.inputs[:2]
    attributes = node.attributes
    if node.op not in PRODUCTS or attributes.get("transA", 0):
        return None
    transposed, alpha = bool(attributes.get("transB", 0)), attributes.get("alpha", 1.0)
    if graph.is_constant(a) or graph.is_constant(b):
        return None
    return Product(a, b, transposed, alpha, name, node)


@dataclass(frozen=True)
class AttentionCore:
    """Softmax attention written out as nodes."""

    scores: Product  # q @ k
    masked: str  # what goes into the softmax
    probs: str  # what comes out, after any guard
    heads: Product  # probs @ v
    guarded: bool  # NaN (a row without a key) becomes 0 after the softmax
    node: Node


def _nearest(graph: Graph, name: str, accept: Callable[[str], Any], limit: int = 400) -> Any:
    """What `accept` returns for the nearest ancestor that it accepts."""
    for count, ancestor in enumerate(graph.ancestors(name)):
        if (found := accept(ancestor)) is not None:
            return found
        if count > limit:
            break
    return None


def match_attention(graph: Graph, name: str) -> AttentionCore | None:
    """Attention, looked for behind the input of c_proj."""
    heads: Product | None = _nearest(graph, name, lambda n: match_product(graph, n), 40)
    if heads is None:
        return None

    def softmax(value: str) -> Node | None:
        node = graph.producer(value)
        return node if node is not None and node.op == "Softmax" else None

    node: Node | None = _nearest(graph, heads.a, softmax, 40)
    if node is None:
        return None
    between = []
    for ancestor in graph.ancestors(heads.a):
        if ancestor == node.outputs[0]:
            break
        between.append(graph.producer(ancestor))
    guarded = any(n is not None and n.op == "IsNaN" for n in between)
    scores: Product | None = _nearest(graph, node.inputs[0], lambda n: match_product(graph, n), 200)
    if scores is None:
        return None
    return AttentionCore(scores, node.inputs[0], heads.a, heads, guarded, node)
