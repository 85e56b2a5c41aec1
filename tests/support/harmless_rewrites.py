"""The same function in other words: what a front end must go on loading, whatever it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from semantic_mutants import Array, Editor, Rng


def _float_value(e: Editor) -> str:
    return e.pick(n for n, v in e.values.items() if v.dtype == np.float32 and v.ndim > 1 and v.size)


def _put(what: str, build: Callable[[Editor, str, Array], str | None]) -> Callable[[Editor], str | None]:
    def rewrite(e: Editor) -> str | None:
        name = _float_value(e)
        readers = e.consumers(name)
        reader = e.pick(readers) if readers and e.rng.random() < 0.4 else None
        return f"{what} on {name}" if e.insert(name, lambda x: build(e, x, e.values[name]), reader) else None

    return rewrite


def _zeros_added(e: Editor, x: str, v: Array) -> str:
    """A vector of zeros where the last axis is as wide as a weight; one zero where it may be a number of positions."""
    widths = {t.dims[-1] for t in e.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 1}
    return e.op("Add", x, e.constant(np.zeros(v.shape[-1] if v.shape[-1] in widths else 1), v.dtype))


def _transposed_back(e: Editor, x: str, v: Array) -> str:
    perm = [int(p) for p in e.rng.permutation(v.ndim)]
    return e.op("Transpose", e.op("Transpose", x, perm=perm), perm=[int(p) for p in np.argsort(perm)])


def _reshaped_back(e: Editor, x: str, v: Array) -> str | None:
    if e.opset >= 14:  # so that a size of 0, as of an empty past, is one
        return e.op("Reshape", e.op("Reshape", x, e.constant([-1], np.int64)), e.op("Shape", x), allowzero=1)
    past = any("past" in i.name for i in e.graph.input)
    return None if past else e.op("Reshape", e.op("Reshape", x, e.constant([-1], np.int64)), e.op("Shape", x))


def _unsqueezed_back(e: Editor, x: str, v: Array) -> str:
    axis = int(e.rng.integers(v.ndim + 1))
    if e.opset < 13:
        return e.op("Squeeze", e.op("Unsqueeze", x, axes=[axis]), axes=[axis])
    return e.op("Squeeze", e.op("Unsqueeze", x, e.constant([axis], np.int64)), e.constant([axis], np.int64))


def gemm(e: Editor) -> str | None:
    """x W + b of one MatMul and one Add as Reshape, Gemm, Reshape."""
    constants = {t.name: t for t in e.graph.initializer}
    pairs = []
    for node in e.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in constants or len(constants[node.input[1]].dims) != 2:
            continue
        readers = e.consumers(node.output[0])
        if len(readers) == 1 and readers[0].op_type == "Add":
            bias = next(i for i in readers[0].input if i != node.output[0])
            if bias in constants and len(constants[bias].dims) == 1:
                pairs.append((node, readers[0], bias))
    if not pairs:
        return None
    product, add, bias = e.pick(pairs)
    rows, width = constants[product.input[1]].dims
    e.new = []
    flat = e.op("Reshape", product.input[0], e.constant([-1, rows], np.int64))
    made = e.op("Gemm", flat, product.input[1], bias)
    leading = e.slice(e.op("Shape", product.input[0]), 0, -1, 0)
    shape = e.op("Concat", leading, e.constant([width], np.int64), axis=0)
    e.new.append(helper.make_node("Reshape", [made, shape], [add.output[0]]))
    at = list(e.graph.node).index(add)
    del e.graph.node[at]
    for k, node in enumerate(e.new):
        e.graph.node.insert(at + k, node)
    e.graph.node.remove(product)
    return f"Gemm for {product.output[0]}"


def renamed(e: Editor) -> str:
    """Every value inside, every initializer and every node under another name."""
    ends = {i.name for i in e.graph.input} | {o.name for o in e.graph.output} | {""}
    names: dict[str, str] = {}

    def other(name: str) -> str:
        return name if name in ends else names.setdefault(name, f"r{len(names)}")

    for tensor in e.graph.initializer:
        tensor.name = other(tensor.name)
    for k, node in enumerate(e.graph.node):
        node.input[:] = [other(i) for i in node.input]
        node.output[:] = [other(o) for o in node.output]
        node.name = f"n{k}"
    del e.graph.value_info[:]
    return "renamed"


def reordered(e: Editor) -> str:
    """Nodes in another order in which each follows what it reads."""
    waiting = list(e.graph.node)
    made = {i.name for i in e.graph.input} | {t.name for t in e.graph.initializer} | {""}
    made |= {t.values.name for t in e.graph.sparse_initializer}
    order = []
    while waiting:
        ready = [k for k, n in enumerate(waiting) if made.issuperset(n.input)]
        node = waiting.pop(int(e.rng.choice(ready)))
        made |= set(node.output)
        order.append(node)
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in order]
    del e.graph.node[:]
    e.graph.node.extend(copies)
    return "reordered"


def constants_as_initializers(e: Editor) -> str:
    """Constant nodes become initializers, or initializers of few elements Constant nodes."""
    if e.rng.random() < 0.5:
        kept = []
        for node in e.graph.node:
            value = next((a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None)
            if value is None:
                kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            else:
                e.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(value), node.output[0]))
        del e.graph.node[:]
        e.graph.node.extend(kept)
        return "Constant nodes as initializers"
    for tensor in [t for t in e.graph.initializer if np.prod(t.dims) < 2**16]:
        e.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        e.graph.initializer.remove(tensor)
    return "initializers as Constant nodes"


def another_opset(e: Editor) -> str | None:
    """The file in another opset, by onnx's own converter."""
    later = [v for v in (11, 12, 13, 14, 17, 18, 20, 21) if v > e.opset]
    if not later or {o.domain for o in e.model.opset_import} - {"", "ai.onnx"}:
        return None
    target = e.pick(later)
    e.model = version_converter.convert_version(e.model, target)
    return f"opset {e.opset} as {target}"


def optimised(e: Editor) -> str | None:
    """The file as ONNX Runtime's basic optimisations leave it: constants folded, what does nothing dropped."""
    import os
    import tempfile

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, "model.onnx")
        onnxruntime.InferenceSession(e.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        e.model = onnx.load(options.optimized_model_filepath)
    return "optimised by ONNX Runtime, basic"


REWRITES: list[Callable[[Editor], str | None]] = [
    _put("Identity", lambda e, x, v: e.op("Identity", x)),
    _put("Add 0", lambda e, x, v: e.op("Add", x, e.constant(0, v.dtype))),
    _put("Add zeros", _zeros_added),
    _put("Mul 1", lambda e, x, v: e.op("Mul", e.constant(1, v.dtype), x)),
    _put("Cast double and back", lambda e, x, v: e.cast(e.cast(x, np.float64), v.dtype)),
    _put("Cast to its own type", lambda e, x, v: e.cast(x, v.dtype)),
    _put("Dropout", lambda e, x, v: e.op("Dropout", x)),
    _put("Transpose and back", _transposed_back),
    _put("Reshape and back", _reshaped_back),
    _put("Unsqueeze and Squeeze", _unsqueezed_back),
    gemm,
    renamed,
    reordered,
    constants_as_initializers,
    another_opset,
    optimised,
]


def rewrite(model: onnx.ModelProto, values: Mapping[str, Array], rng: Rng) -> tuple[str, onnx.ModelProto] | None:
    """A random rewrite that changes no number, and what it is, or None where this file cannot have it."""
    e = Editor(model, values, rng)
    what = e.pick(REWRITES)(e)
    return None if what is None else (what, e.model)
