"""Linear maps, in the shapes in which exporters write them, each a pattern.

A pattern looks at one value of the graph and answers what computes it, or None. It only finds the part's
borders and its weights; what happens between the borders is run, not read (see evaluate/). A new exporter is
a new function in one of the lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ...errors import UnsupportedModelError
from ..graph import MOVES, SAME, Graph, Node
from ..normalise.fold import scalar
from .sources import Source, constant_shape, constant_source, zeros

Array = np.ndarray
GEMMS = ("Gemm", "com.microsoft.FusedGemm")
PRODUCTS = ("MatMul", "com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul")


@dataclass(frozen=True)
class LinearFound:
    """out = x @ weight + bias."""

    x: str  # value names
    out: str
    weight: Source  # (inputs, outputs)
    bias: Source | None  # (outputs,)
    node: Node
    rounds: str = ""  # how the node rounds its activations on the fly, "" if it does not
    bias_later: str = ""  # the bias is not in `out` yet; it is added to the residual stream under this name
    # Of an Einsum: how many axes of x are summed over, and the sizes of the axes that take their place.
    summed: int = 1
    sizes: tuple[int, ...] = ()
    low_rank: bool = False  # a branch of low rank beside the map is merged into it

    def sources(self, name: str) -> dict[str, Source]:
        """Weight and bias under the names of `weights.weight_shapes`."""
        bias = self.bias or zeros(self.weight.shape[1:], "no bias in the file")
        return {f"{name}.weight": self.weight, f"{name}.bias": bias}


def matrix(graph: Graph, name: str) -> Source | None:
    """A constant matrix (inputs, outputs); leading axes of one are dropped."""
    if not name or name not in graph.fixed:
        return None
    source = constant_source(graph, name)
    if len(source.shape) < 2 or math.prod(source.shape[:-2]) != 1:
        return None
    return source.reshaped(source.shape[-2:])


def vector(graph: Graph, name: str, size: int) -> Source | None:
    """A constant vector of that size; axes of one are dropped."""
    if not name or name not in graph.fixed:
        return None
    source = constant_source(graph, name)
    if source.shape and source.shape[-1] == size and math.prod(source.shape) == size:
        return source.reshaped((size,))
    return None


def _gemm(graph: Graph, name: str) -> LinearFound | None:
    node = graph.producers.get(name)
    if node is None or node.op not in GEMMS or node.attributes.get("transA", 0):
        return None
    if node.attributes.get("activation"):
        return None
    weight = matrix(graph, node.inputs[1])
    if weight is None:
        return None
    if node.attributes.get("transB", 0):
        weight = weight.transposed("Gemm transB")
    weight = weight.scaled(node.attributes.get("alpha", 1.0), "Gemm alpha")
    bias = vector(graph, node.input(2), weight.shape[1])
    if node.input(2) and bias is None and scalar(graph, node.input(2)) != 0:
        raise UnsupportedModelError(f"{node.describe()} adds {node.input(2)!r}, which is not a bias vector")
    if bias is not None:
        bias = bias.scaled(node.attributes.get("beta", 1.0), "Gemm beta")
    return LinearFound(node.inputs[0], name, weight, bias, node)


def _matmul(graph: Graph, name: str) -> LinearFound | None:
    node = graph.producers.get(name)
    if node is None or node.op not in PRODUCTS:
        return None
    weight = matrix(graph, node.inputs[1])
    if weight is None or node.attributes.get("transA", 0):
        return None
    if node.attributes.get("transB", 0):
        weight = weight.transposed(f"{node.op} transB")
    weight = weight.scaled(node.attributes.get("alpha", 1.0), f"{node.op} alpha")
    return LinearFound(node.inputs[0], name, weight, None, node)


def _biased(graph: Graph, name: str) -> LinearFound | None:
    """Any of the others, then Add with a vector."""
    node = graph.producers.get(name)
    if node is None or node.op != "Add":
        return None
    for product, added in (node.inputs, node.inputs[::-1]):
        if added not in graph.fixed or product in graph.fixed:
            continue
        linear = match_linear(graph, graph.strip(product))
        if linear is None:
            return None
        bias = vector(graph, added, linear.weight.shape[1])
        if bias is not None:
            return replace(linear, out=name, bias=bias if linear.bias is None else linear.bias.plus(bias))
    return None


def _scaled(graph: Graph, name: str) -> LinearFound | None:
    """A product, then Mul with one number or one per column: what is left of the scales of integer products."""
    node = graph.producers.get(name)
    if node is None or node.op != "Mul":
        return None
    for product, factors in (node.inputs, node.inputs[::-1]):
        if factors not in graph.fixed or product in graph.fixed:
            continue
        linear = _matmul(graph, graph.strip(product, SAME))
        if linear is None or len(graph.consumers(product)) > 1:  # 0.5 * x of a GELU, whose x is read elsewhere too
            return None
        scale = constant_source(graph, factors)
        if math.prod(scale.shape) not in (1, linear.weight.shape[1]):
            return None
        return replace(linear, out=name, weight=linear.weight.times(scale))
    return None


def _einsum(graph: Graph, name: str) -> LinearFound | None:
    """Sums over the last axes of x, with a weight of any rank: "btc,chd->bthd"."""
    node = graph.producers.get(name)
    if node is None or node.op != "Einsum" or len(node.inputs) != 2:
        return None
    terms, _, out = node.attributes["equation"].replace(" ", "").replace("...", "").partition("->")
    both = list(zip(terms.split(","), node.inputs, strict=True))
    for (x, value), (letters, weight) in (both, both[::-1]):
        new = [c for c in out if c not in x]
        summed = [c for c in x if c not in out]
        order = [*summed, *new]
        shape = constant_shape(graph, weight) if weight in graph.fixed else ()
        plain = x[len(x) - len(summed) :] == "".join(summed) and out == x[: len(x) - len(summed)] + "".join(new)
        if not plain or sorted(order) != sorted(letters) or len(shape) != len(letters) or value in graph.fixed:
            continue
        sizes = [shape[letters.index(c)] for c in order]
        flat = math.prod(sizes[: len(summed)]), math.prod(sizes[len(summed) :])
        axes = [letters.index(c) for c in order]
        matrix = constant_source(graph, weight).then("Einsum", flat, lambda a: a.transpose(axes).reshape(flat))  # noqa: B023
        return LinearFound(value, name, matrix, None, node, summed=len(summed), sizes=tuple(sizes[len(summed) :]))
    return None


def _low_rank(graph: Graph, name: str) -> LinearFound | None:
    """A map and a branch of low rank beside it: x @ W + b + s * (x @ A) @ B is x @ (W + s * A @ B) + b.

    LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685), exported before it was merged.
    """
    node = graph.producers.get(name)
    if node is None or node.op != "Add" or any(i in graph.fixed for i in node.inputs):
        return None
    for whole, branch in (node.inputs, node.inputs[::-1]):
        value = graph.strip(branch)
        up = _scaled(graph, value) or _matmul(graph, value)
        down = None if up is None else _matmul(graph, graph.strip(up.x)) or _scaled(graph, graph.strip(up.x))
        if up is None or down is None:
            continue
        base = match_linear(graph, graph.strip(whole))
        if base is None or graph.strip(down.x) != graph.strip(base.x):
            continue
        return replace(base, out=name, weight=base.weight.with_product(down.weight, up.weight), low_rank=True)
    return None


LINEAR_PATTERNS: dict[str, tuple[Callable[[Graph, str], LinearFound | None], ...]] = {
    **dict.fromkeys(GEMMS, (_gemm,)),
    **dict.fromkeys(PRODUCTS, (_matmul,)),
    "Mul": (_scaled,),
    "Einsum": (_einsum,),
    "Add": (_biased, _low_rank),
}  # by the operator that gives the value


def match_linear(graph: Graph, name: str) -> LinearFound | None:
    """The linear map that computes a value."""
    if name not in graph.linears:
        node, found = graph.producers.get(name), None
        for pattern in () if node is None else LINEAR_PATTERNS.get(node.op, ()):
            if (found := pattern(graph, name)) is not None:
                break
        graph.linears[name] = found
    linear: LinearFound | None = graph.linears[name]
    return linear


def nearest_linears(graph: Graph, name: str) -> tuple[list[LinearFound], list[str]]:
    """The linear maps that a value is made of, and the graph inputs (a cache) beside them."""
    linears: dict[str, LinearFound] = {}
    inputs: list[str] = []
    seen, pending = {name}, [name]
    while pending:
        current = pending.pop(0)
        if current in graph.input_names:
            inputs.append(current)
            continue
        linear = match_linear(graph, current)
        if linear is not None:
            linears[linear.out] = linear
            continue
        node = graph.producers.get(current)
        if node is None or node.op in ("Shape", "Size"):
            continue
        for i in node.inputs[:1] if node.op in MOVES - {"Concat"} else node.inputs:  # not where it is cut
            if i and i not in seen and i not in graph.fixed:
                seen.add(i)
                pending.append(i)
    return list(linears.values()), inputs
