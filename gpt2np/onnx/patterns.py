"""The shapes in which exporters write GPT-2's parts, each part a list of patterns.

A pattern looks at one value of the graph and answers what computes it, or None. It only finds the part's
borders and its weights; what happens between the borders is run, not read (see evaluate.py). A new exporter is
a new function in one of the lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError
from .evaluate import Evaluator
from .graph import MOVES, SAME, VIEWS, Graph, Node
from .sources import Source, constant_shape, constant_source

Array = np.ndarray


# ------------------------------------------------------------------------------------------------------ outputs
def match_last_position(graph: Graph, name: str) -> str | None:
    """What a value is the last position of, (B, T, C) -> (B, 1, C) or (B, C)."""
    node = graph.producer(name)
    if node is None:
        return None
    if node.op == "Gather" and node.attributes.get("axis", 0) in (1, -2):
        index = graph.small(node.inputs[1])
        return node.inputs[0] if index is not None and index.size == 1 and int(index.flat[0]) == -1 else None
    if node.op == "Slice" and len(node.inputs) > 3:
        bounds = [graph.small(node.inputs[i]) for i in (1, 2, 3)]
        start, end, axis = (int(b.flat[0]) if b is not None and b.size == 1 else 0 for b in bounds)
        if start == -1 and end >= 2**31 - 1 and axis in (1, -2):
            return node.inputs[0]
    return None


# ---------------------------------------------------------------------------------------------- linear maps
@dataclass(frozen=True)
class Linear:
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


def _matrix(graph: Graph, name: str) -> Source | None:
    """A constant matrix (inputs, outputs); leading axes of one are dropped."""
    if not name or not graph.is_constant(name):
        return None
    source = constant_source(graph, name)
    if len(source.shape) < 2 or int(np.prod(source.shape[:-2])) != 1:
        return None
    return source.reshaped(source.shape[-2:])


def vector(graph: Graph, name: str, size: int) -> Source | None:
    """A constant vector of that size; axes of one are dropped."""
    if not name or not graph.is_constant(name):
        return None
    source = constant_source(graph, name)
    if source.shape and source.shape[-1] == size and int(np.prod(source.shape)) == size:
        return source.reshaped((size,))
    return None


def _gemm(graph: Graph, name: str) -> Linear | None:
    node = graph.producer(name)
    if node is None or node.op not in ("Gemm", "com.microsoft.FusedGemm") or node.attributes.get("transA", 0):
        return None
    if node.attributes.get("activation"):
        return None
    weight = _matrix(graph, node.inputs[1])
    if weight is None:
        return None
    if node.attributes.get("transB", 0):
        weight = weight.transposed("Gemm transB")
    weight = weight.scaled(node.attributes.get("alpha", 1.0), "Gemm alpha")
    bias = vector(graph, node.input(2), weight.shape[1])
    if node.input(2) and bias is None:
        scalar = graph.scalar(node.input(2))
        if scalar != 0:
            raise UnsupportedModelError(f"{node.describe()} adds {node.input(2)!r}, which is not a bias vector")
    if bias is not None:
        bias = bias.scaled(node.attributes.get("beta", 1.0), "Gemm beta")
    return Linear(node.inputs[0], name, weight, bias, node)


def _matmul(graph: Graph, name: str) -> Linear | None:
    node = graph.producer(name)
    if node is None or node.op not in (
        "MatMul",
        "com.microsoft.FusedMatMul",
        "com.microsoft.TransposeMatMul",
    ):
        return None
    weight = _matrix(graph, node.inputs[1])
    if weight is None or node.attributes.get("transA", 0):
        return None
    if node.attributes.get("transB", 0):
        weight = weight.transposed(f"{node.op} transB")
    weight = weight.scaled(node.attributes.get("alpha", 1.0), f"{node.op} alpha")
    return Linear(node.inputs[0], name, weight, None, node)


def _biased(graph: Graph, name: str) -> Linear | None:
    """Any of the others, then Add with a vector."""
    node = graph.producer(name)
    if node is None or node.op != "Add":
        return None
    for product, added in (node.inputs, node.inputs[::-1]):
        if not graph.is_constant(added) or graph.is_constant(product):
            continue
        linear = match_linear(graph, graph.strip(product))
        if linear is None or linear.bias is not None:
            return None
        bias = vector(graph, added, linear.weight.shape[1])
        if bias is not None:
            return replace(linear, out=name, bias=bias)
    return None


def _scaled(graph: Graph, name: str) -> Linear | None:
    """A product, then Mul with one number or one per column: what is left of the scales of integer products."""
    node = graph.producer(name)
    if node is None or node.op != "Mul":
        return None
    for product, factors in (node.inputs, node.inputs[::-1]):
        if not graph.is_constant(factors) or graph.is_constant(product):
            continue
        linear = _matmul(graph, graph.strip(product, SAME))
        if linear is None:
            return None
        scale = constant_source(graph, factors)
        if int(np.prod(scale.shape)) not in (1, linear.weight.shape[1]):
            return None
        return replace(linear, out=name, weight=linear.weight.times(scale))
    return None


def _einsum(graph: Graph, name: str) -> Linear | None:
    """Sums over the last axes of x, with a weight of any rank: "btc,chd->bthd"."""
    node = graph.producer(name)
    if node is None or node.op != "Einsum" or len(node.inputs) != 2:
        return None
    terms, _, out = node.attributes["equation"].replace(" ", "").replace("...", "").partition("->")
    both = list(zip(terms.split(","), node.inputs, strict=True))
    for (x, value), (letters, weight) in (both, both[::-1]):
        new = [c for c in out if c not in x]
        summed = [c for c in x if c not in out]
        order = [*summed, *new]
        shape = constant_shape(graph, weight) if graph.is_constant(weight) else ()
        plain = x[len(x) - len(summed) :] == "".join(summed) and out == x[: len(x) - len(summed)] + "".join(new)
        if not plain or sorted(order) != sorted(letters) or len(shape) != len(letters) or graph.is_constant(value):
            continue
        sizes = [shape[letters.index(c)] for c in order]
        flat = int(np.prod(sizes[: len(summed)])), int(np.prod(sizes[len(summed) :]))
        axes = [letters.index(c) for c in order]
        matrix = constant_source(graph, weight).then("Einsum", flat, lambda a: a.transpose(axes).reshape(flat))  # noqa: B023
        return Linear(value, name, matrix, None, node, summed=len(summed), sizes=tuple(sizes[len(summed) :]))
    return None


LINEAR_PATTERNS: list[Callable[[Graph, str], Linear | None]] = [_gemm, _matmul, _scaled, _einsum, _biased]


def match_linear(graph: Graph, name: str) -> Linear | None:
    """The linear map that computes a value."""
    for pattern in LINEAR_PATTERNS:
        if (found := pattern(graph, name)) is not None:
            return found
    return None


# ------------------------------------------------------------------------------------------ layer normalisation
@dataclass(frozen=True)
class LayerNorm:
    """out = (x - mean) / sqrt(variance + epsilon) * weight + bias."""

    x: str
    out: str
    weight: Source | None
    bias: Source | None
    epsilon: float
    node: Node


def _constant_vector(graph: Graph, name: str) -> Source | None:
    if not name or not graph.is_constant(name):
        return None
    source = constant_source(graph, name)
    return source.reshaped(source.shape[-1:]) if source.shape and source.shape[-1] == np.prod(source.shape) else None


def _fused_norm(graph: Graph, name: str) -> LayerNorm | None:
    node = graph.producer(name)
    if node is None or node.op not in ("LayerNormalization", "com.microsoft.LayerNormalization"):
        return None
    if graph.output_index(name) != 0:
        return None
    weight, bias = _constant_vector(graph, node.input(1)), _constant_vector(graph, node.input(2))
    return LayerNorm(node.inputs[0], name, weight, bias, node.attributes.get("epsilon", 1e-5), node)


def _written_out_norm(graph: Graph, name: str) -> LayerNorm | None:
    """Mean, difference, square, mean, root, quotient as nodes; then gain and bias."""
    value, node = name, graph.producer(name)
    parts: dict[str, Source | None] = {"Add": None, "Mul": None}
    for op in ("Add", "Mul"):
        node = graph.producer(value)
        if node is not None and node.op == op:
            for rest, vector in (node.inputs, node.inputs[::-1]):
                source = _constant_vector(graph, vector)
                if source is not None and not graph.is_constant(rest):
                    parts[op] = source
                    value = graph.strip(rest, SAME)
                    break
    node = graph.producer(value)
    if node is None or node.op not in ("Div", "Mul", "SimplifiedLayerNormalization", "RMSNormalization"):
        return None
    if node.op in ("Div", "Mul") and any(graph.is_constant(i) for i in node.inputs):
        return None  # a scale, as of a quantised head
    means = []
    for depth, ancestor in enumerate(graph.ancestors(value)):
        inner = graph.producer(ancestor)
        if inner is not None and inner.op == "ReduceMean":
            means.append(inner)
        if depth > 40:
            break
    if not means:
        return None
    x = next((m.inputs[0] for m in means if _is_mean_of_centred_input(graph, m, value)), None)
    if x is None:
        return None
    gain, x = parts["Mul"] or parts["Add"], graph.strip(x, SAME)
    given = _vectors(gain.shape[0] if gain else 8)
    epsilon, outside = _epsilon(given, Evaluator(graph, {x: given[None]})(value)[0])
    if epsilon is None:
        if (other := _rearranged_norm(graph, name)) is not None:
            return other
        what = f"{node.describe()} looks like the end of a layer norm, but does not compute one"
        if np.allclose(outside, outside[0], rtol=1e-6):
            what = (
                f"{node.describe()}: the layer norm adds epsilon {outside[0]:.3g} to the root of the variance, "
                "not to the variance under it"
            )
        graph.object(UnsupportedModelError(what))
        epsilon = 1e-5
    return LayerNorm(x, name, parts["Mul"], parts["Add"], epsilon, node)


def _is_mean_of_centred_input(graph: Graph, mean: Node, value: str) -> bool:
    """Whether this is the mean that is taken off (not the mean of squares): its input reaches `value` by Sub."""
    minuend = graph.strip(mean.inputs[0], SAME)
    for ancestor in list(zip(range(40), graph.ancestors(value), strict=False)):
        node = graph.producer(ancestor[1])
        if node is not None and node.op == "Sub" and graph.strip(node.inputs[0], SAME) == minuend:
            return graph.strip(node.inputs[1], SAME) in mean.outputs
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


def _rearranged_norm(graph: Graph, name: str) -> LayerNorm | None:
    """The same operations in another order, as x * (gain / root) + (bias - mean * gain / root) in TensorFlow.

    Gain and bias are those vectors with which a layer norm comes out.
    """
    node = graph.producer(name)
    if node is None or node.op not in ("Add", "Sub", "Mul"):
        return None
    near = [graph.producer(a) for _, a in zip(range(25), graph.ancestors(name), strict=False)]
    for x in dict.fromkeys(graph.strip(n.inputs[0], SAME) for n in near if n is not None and n.op == "ReduceMean"):
        between = [graph.producer(a) for _, a in zip(range(40), graph.ancestors(name, {x}), strict=False) if a != x]
        inputs = dict.fromkeys(i for n in between if n is not None for i in n.inputs if i)
        found = {i: _constant_vector(graph, i) for i in inputs}
        vectors = {i: source for i, source in found.items() if source is not None and source.shape[0] > 1}
        if any(n is None or match_linear(graph, n.outputs[0]) is not None for n in between) or len(vectors) > 4:
            continue
        numbers: dict[str | None, Any] = {i: Evaluator(graph, {})(i).ravel().astype(np.float64) for i in vectors}
        given = _vectors(next(iter(vectors.values())).shape[0] if vectors else 8)
        got = Evaluator(graph, {x: given[None]})(name)[0]
        for gain in (None, *vectors):
            for bias in (None, *vectors):
                with np.errstate(invalid="ignore", divide="ignore"):
                    normed = (got - numbers.get(bias, 0)) / numbers.get(gain, 1)
                if (epsilon := _epsilon(given, normed)[0]) is not None:
                    return LayerNorm(x, name, vectors.get(gain or ""), vectors.get(bias or ""), epsilon, node)
    return None


LAYER_NORM_PATTERNS: list[Callable[[Graph, str], LayerNorm | None]] = [
    _fused_norm,
    _written_out_norm,
    _rearranged_norm,
]


def match_layer_norm(graph: Graph, name: str) -> LayerNorm | None:
    """The layer norm that computes a value."""
    for pattern in LAYER_NORM_PATTERNS:
        if (found := pattern(graph, name)) is not None:
            return found
    return None


# ------------------------------------------------------------------------------------------------ embeddings
@dataclass(frozen=True)
class Lookup:
    """out = table[rows]."""

    out: str
    table: Source
    rows: str  # "" where the rows are not chosen by indices
    node: Node


def _slice(graph: Graph, name: str) -> Lookup | None:
    """Rows that follow each other."""
    node = graph.producer(name)
    if node is None or node.op != "Slice":
        return None
    table = _matrix(graph, node.inputs[0])
    return None if table is None else Lookup(name, table, "", node)


def _gather(graph: Graph, name: str) -> Lookup | None:
    node = graph.producer(name)
    if node is None or node.op != "Gather" or node.attributes.get("axis", 0) != 0:
        return None
    table = _matrix(graph, node.inputs[0])
    return None if table is None else Lookup(name, table, node.inputs[1], node)


def _dequantized_rows(graph: Graph, name: str) -> Lookup | None:
    """Rows of an integer table, then DequantizeLinear with one scale."""
    node = graph.producer(name)
    if node is None or node.op not in ("DequantizeLinear", "com.microsoft.DequantizeLinear"):
        return None
    found = _gather(graph, node.inputs[0]) or _slice(graph, node.inputs[0])
    rest = [i for i in node.inputs[1:] if i]
    if found is None or any(not graph.is_constant(i) or constant_shape(graph, i) not in ((), (1,)) for i in rest):
        return None

    def dequantized(table: Array) -> Array:
        return Evaluator(graph, {node.inputs[0]: table})(name)

    table = found.table.then("DequantizeLinear", found.table.shape, dequantized)
    return Lookup(name, replace(table, origin=(*found.table.origin, *rest)), found.rows, found.node)


def _folded(graph: Graph, name: str) -> Lookup | None:
    """Rows that were looked up when the file was made: positions of a fixed length, (T, C) or (1, T, C)."""
    if not graph.is_constant(name) or name not in graph.constants:
        return None
    table = _matrix(graph, name)
    if table is None or table.shape[0] == 1:
        return None
    node = Node("Constant", "", "", (name,), (name,), {})
    return Lookup(name, table, "", node)


LOOKUP_PATTERNS: list[Callable[[Graph, str], Lookup | None]] = [_gather, _slice, _dequantized_rows, _folded]


def match_lookup(graph: Graph, name: str) -> Lookup | None:
    """The table whose rows a value holds."""
    for pattern in LOOKUP_PATTERNS:
        if (found := pattern(graph, name)) is not None:
            return found
    return None


# ------------------------------------------------------------------------------------------- residual stream
@dataclass(frozen=True)
class Addend:
    """One term of the residual stream."""

    value: str  # behind all views
    seen: str  # as it is added, with batch and time axes


def addends(graph: Graph, name: str) -> list[Addend]:
    """The terms that a value is the sum of, whatever the order of the additions."""
    found: list[Addend] = []
    pending = [(name, name)]
    while pending:
        current, seen = pending.pop()
        node = graph.producer(current)
        if node is None:
            found.append(Addend(current, seen))
        elif node.op in VIEWS:
            pending.append((node.inputs[0], seen))
        elif node.op in ("Add", "Sum") and match_linear(graph, current) is None:
            pending.extend((i, i) for i in reversed(node.inputs) if graph.scalar(i) != 0)
        else:
            found.append(Addend(current, seen))
    return found


# ------------------------------------------------------------------------------------------------- attention
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
    if node.op in ("MatMul", "com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul"):
        if attributes.get("transA", 0):
            return None
        transposed, alpha = bool(attributes.get("transB", 0)), attributes.get("alpha", 1.0)
    else:
        return None
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


def nearest_linears(graph: Graph, name: str) -> tuple[list[Linear], list[str]]:
    """The linear maps that a value is made of, and the graph inputs (a cache) beside them."""
    linears: dict[str, Linear] = {}
    inputs: list[str] = []
    seen, pending = {name}, [name]
    while pending:
        current = pending.pop(0)
        if graph.is_input(current):
            inputs.append(current)
            continue
        linear = match_linear(graph, current)
        if linear is not None:
            linears[linear.out] = linear
            continue
        node = graph.producer(current)
        if node is None or node.op in ("Shape", "Size"):
            continue
        for i in node.inputs[:1] if node.op in MOVES - {"Concat"} else node.inputs:  # not where it is cut
            if i and i not in seen and not graph.is_constant(i):
                seen.add(i)
                pending.append(i)
    return list(linears.values()), inputs
