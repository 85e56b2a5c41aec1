"""Layer norms, fused or written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import UnsupportedModelError
from ..evaluate.evaluator import Evaluator
from ..graph import SAME, Graph, Node
from .linear import match_linear
from .sources import Source, constant_source, ones, zeros

Array = np.ndarray
MEANS = {"ReduceMean", "ReduceSum"}


@dataclass(frozen=True)
class LayerNormFound:
    """out = (x - mean) / sqrt(variance + epsilon) * weight + bias."""

    x: str
    out: str
    weight: Source | None
    bias: Source | None
    epsilon: float
    node: Node
    read: frozenset[str] = frozenset()  # the constants that were met where it was found by running it

    def sources(self, name: str, width: int) -> dict[str, Source]:
        """Gain and bias under the names of `weights.weight_shapes`."""
        return {
            f"{name}.weight": self.weight or ones((width,), "no gain in the file"),
            f"{name}.bias": self.bias or zeros((width,), "no bias in the file"),
        }


def _constant_vector(graph: Graph, name: str) -> Source | None:
    if not name or name not in graph.fixed:
        return None
    source = constant_source(graph, name)
    return source.reshaped(source.shape[-1:]) if source.shape and source.shape[-1] == math.prod(source.shape) else None


def _fused_norm(graph: Graph, name: str) -> LayerNormFound | None:
    node = graph.producers.get(name)
    if node is None or node.op not in ("LayerNormalization", "com.microsoft.LayerNormalization"):
        return None
    if graph.output_index(name) != 0:
        return None
    weight, bias = _constant_vector(graph, node.input(1)), _constant_vector(graph, node.input(2))
    return LayerNormFound(node.inputs[0], name, weight, bias, node.attributes.get("epsilon", 1e-5), node)


def _written_out_norm(graph: Graph, name: str) -> LayerNormFound | None:
    """Mean, difference, square, mean, root, quotient as nodes; then gain and bias."""
    value, bias = _without_vector(graph, name, "Add")
    value, weight = _without_vector(graph, value, "Mul")
    node = graph.producers.get(value)
    if node is None or node.op not in ("Div", "Mul", "SimplifiedLayerNormalization", "RMSNormalization"):
        return None
    if node.op in ("Div", "Mul") and any(i in graph.fixed for i in node.inputs):
        return None  # a scale, as of a quantised head
    means = [graph.producers[ancestor] for ancestor in graph.ancestors(value, ops=MEANS, limit=42)]
    if not means:
        return None
    x = next((m.inputs[0] for m in means if _is_mean_of_centred_input(graph, m, value)), None)
    if x is None:
        return None
    vector, x = weight or bias, graph.strip(x, SAME)
    given = _vectors(vector.shape[0] if vector else 8)
    read: set[str] = set()
    epsilon, outside = _epsilon(given, Evaluator(graph, {x: given[None]}, read)(value)[0])
    if epsilon is None:
        if (other := _rearranged_norm(graph, name)) is not None:
            return other
        graph.object(_no_norm(node, outside))
        epsilon = 1e-5
    return LayerNormFound(x, name, weight, bias, epsilon, node, frozenset(read))


def _without_vector(graph: Graph, name: str, op: str) -> tuple[str, Source | None]:
    """What a constant vector is added to or multiplied with to make a value, and the vector; else the value itself."""
    node = graph.producers.get(name)
    if node is not None and node.op == op:
        for rest, vector in (node.inputs, node.inputs[::-1]):
            source = _constant_vector(graph, vector)
            if source is not None and rest not in graph.fixed:
                return graph.strip(rest, SAME), source
    return name, None


def _no_norm(node: Node, outside: Array) -> UnsupportedModelError:
    """What to say of nodes that look like a layer norm whose results are none; outside: what is beside each root."""
    if np.allclose(outside, outside[0], rtol=1e-6):
        return UnsupportedModelError(
            f"{node.describe()}: the layer norm adds epsilon {outside[0]:.3g} to the root of the variance, "
            "not to the variance under it"
        )
    return UnsupportedModelError(f"{node.describe()} looks like the end of a layer norm, but does not compute one")


def _is_mean_of_centred_input(graph: Graph, mean: Node, value: str) -> bool:
    """Whether this is the mean that is taken off (not the mean of squares): its input reaches `value` by Sub."""
    minuend = graph.strip(mean.inputs[0], SAME)
    for ancestor in graph.ancestors(value, ops=("Sub",), limit=40):
        node = graph.producers[ancestor]
        if graph.strip(node.inputs[0], SAME) == minuend:
            taken = graph.strip(node.inputs[1], SAME)
            by = graph.producers.get(taken)
            if mean.op == "ReduceSum" and by is not None and by.op in ("Div", "Mul"):  # a sum, then 1 / C
                taken = graph.strip(by.inputs[0], SAME)
            return taken in mean.outputs
    return False


def _vectors(width: int) -> Array:
    """Vectors of several sizes, (6, width)."""
    spread = 10.0 ** np.arange(-4, 2)[:, None]
    vectors: Array = np.random.default_rng(0).standard_normal((len(spread), width)) * spread
    return vectors


def _epsilon(given: Array, got: Array) -> tuple[float | None, Array]:
    """Which epsilon explains that `got` are `given` vectors normalised, None if none; and what is beside each root."""
    centred = given - given.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1)
    pick = np.abs(centred).argmax(-1)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (np.take_along_axis(centred, pick, -1) / np.take_along_axis(got, pick, -1))[:, 0]
        inside = ratio**2 - variance
        expected = centred / np.sqrt(variance + inside[0])[:, None]
    if np.allclose(got, expected, rtol=1e-6, atol=0) and inside[0] > -1e-12:
        return max(float(np.float32(inside[0])), 0.0), ratio
    return None, ratio - np.sqrt(variance)


def _rearranged_norm(graph: Graph, name: str) -> LayerNormFound | None:
    """The same operations in another order, as x * (gain / root) + (bias - mean * gain / root) in TensorFlow.

    Gain and bias are those vectors with which a layer norm comes out.
    """
    node = graph.producers.get(name)
    if node is None or node.op not in ("Add", "Sub", "Mul"):
        return None
    near = [graph.producers[a].inputs[0] for a in graph.ancestors(name, ops=MEANS, limit=25)]
    for x in dict.fromkeys(graph.strip(n, SAME) for n in near):
        between = [graph.producers.get(a) for a in graph.ancestors(name, {x}, limit=40) if a != x]
        inputs = dict.fromkeys(i for n in between if n is not None for i in n.inputs if i)
        found = {i: _constant_vector(graph, i) for i in inputs}
        vectors = {i: source for i, source in found.items() if source is not None and source.shape[0] > 1}
        if any(n is None or match_linear(graph, n.outputs[0]) is not None for n in between) or len(vectors) > 4:
            continue
        numbers: dict[str | None, Any] = {i: Evaluator(graph, {})(i).ravel().astype(np.float64) for i in vectors}
        given = _vectors(next(iter(vectors.values())).shape[0] if vectors else 8)
        read: set[str] = set()
        got = Evaluator(graph, {x: given[None]}, read)(name)[0]
        for gain in (None, *vectors):
            for bias in (None, *vectors):
                with np.errstate(invalid="ignore", divide="ignore"):
                    normed = (got - numbers.get(bias, 0)) / numbers.get(gain, 1)
                if (epsilon := _epsilon(given, normed)[0]) is not None:
                    both = vectors.get(gain or ""), vectors.get(bias or "")
                    return LayerNormFound(x, name, *both, epsilon, node, frozenset(read))
    return None


def _changed_norm(graph: Graph, name: str) -> LayerNormFound | None:
    """Any of the others, then one more bias."""
    node = graph.producers.get(name)
    if node is None or node.op != "Add":
        return None
    for value, added in (node.inputs, node.inputs[::-1]):
        bias = _constant_vector(graph, added)
        if bias is None or value in graph.fixed:
            continue
        norm = match_layer_norm(graph, graph.strip(value, SAME))
        if norm is not None and (norm.weight or norm.bias or bias).shape == bias.shape:
            return replace(norm, out=name, bias=bias if norm.bias is None else norm.bias.plus(bias))
    return None


LAYER_NORM_PATTERNS: list[Callable[[Graph, str], LayerNormFound | None]] = [
    _fused_norm,
    _written_out_norm,
    _changed_norm,
    _rearranged_norm,
]


def match_layer_norm(graph: Graph, name: str) -> LayerNormFound | None:
    """The layer norm that computes a value."""
    if name not in graph.norms:
        found = (pattern(graph, name) for pattern in LAYER_NORM_PATTERNS)
        graph.norms[name] = next((norm for norm in found if norm is not None), None)
    norm: LayerNormFound | None = graph.norms[name]
    return norm
