"""Attention: two products of activations with a softmax between them."""

from __future__ import annotations

from dataclasses import dataclass

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
    node = graph.producers.get(name)
    if node is None or len(node.inputs) < 2:
        return None
    a, b = node.inputs[:2]
    attributes = node.attributes
    if node.op not in PRODUCTS or attributes.get("transA", 0):
        return None
    transposed, alpha = bool(attributes.get("transB", 0)), attributes.get("alpha", 1.0)
    if a in graph.fixed or b in graph.fixed:
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
    zeroed: bool  # probabilities of hidden keys become 0 after the softmax
    node: Node


def _nearest(graph: Graph, name: str, limit: int) -> Product | None:
    """The nearest product among so many values that a value depends on."""
    for ancestor in graph.ancestors(name, ops=PRODUCTS, limit=limit):
        if (found := match_product(graph, ancestor)) is not None:
            return found
    return None


def match_attention(graph: Graph, name: str) -> AttentionCore | None:
    """Attention, looked for behind the input of c_proj."""
    heads = _nearest(graph, name, 42)
    if heads is None:
        return None
    guarded = zeroed = False
    for value in graph.ancestors(heads.a, ops=("Softmax", "IsNaN", "Where"), limit=42):
        node = graph.producers[value]
        if node.op == "Softmax":
            break
        guarded |= node.op == "IsNaN"
        if node.op == "Where":
            asked = graph.producers.get(graph.strip(node.inputs[0]))
            zeroed |= asked is None or asked.op != "IsNaN"
    else:
        return None
    scores = _nearest(graph, node.inputs[0], 202)
    if scores is None:
        return None
    return AttentionCore(scores, node.inputs[0], heads.a, heads, guarded, zeroed, node)
