"""Edits of an onnx.ModelProto, in place: the values of initializers, who reads them, and new nodes.

What `edit`, `copy_of` and `rewire` return says, applied to a model, whether it has anything of that name.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper, numpy_helper

Array = np.ndarray
Model = onnx.ModelProto


def tensor_of(model: Model, suffix: str) -> onnx.TensorProto | None:
    found = [t for t in model.graph.initializer if t.name == suffix or t.name.endswith("." + suffix)]
    return found[0] if found else None


def edit(suffix: str, change: Callable[[Array], Array]) -> Callable[[Model], bool]:
    """Change the values of one initializer."""

    def apply(model: Model) -> bool:
        tensor = tensor_of(model, suffix)
        if tensor is None:
            return False
        value = np.array(numpy_helper.to_array(tensor))
        changed = np.ascontiguousarray(change(value), value.dtype)
        assert changed.shape == value.shape
        if np.array_equal(changed, value):
            return False
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        return True

    return apply


def copy_of(target: str, source: str) -> Callable[[Model], bool]:
    """Give one initializer the values of another."""

    def apply(model: Model) -> bool:
        a, b = tensor_of(model, target), tensor_of(model, source)
        if a is None or b is None:
            return False
        a.CopyFrom(numpy_helper.from_array(np.array(numpy_helper.to_array(b)), a.name))
        return True

    return apply


def rewire(target: str, source: str) -> Callable[[Model], bool]:
    """Let the consumers of one initializer read another; the first is left over."""

    def apply(model: Model) -> bool:
        a, b = tensor_of(model, target), tensor_of(model, source)
        if a is None or b is None:
            return False
        for node in model.graph.node:
            for i, name in enumerate(node.input):
                if name == a.name:
                    node.input[i] = b.name
        return True

    return apply


def scope(model: Model, pattern: str, op: str) -> list[onnx.NodeProto]:
    """Nodes of one kind whose output names match, in the graph's order."""
    return [n for n in model.graph.node if n.op_type == op and any(re.search(pattern, o) for o in n.output)]


def constant_of(model: Model, name: str) -> Array | None:
    for node in model.graph.node:
        if name in node.output and node.op_type == "Constant":
            return np.array(numpy_helper.to_array(node.attribute[0].t))
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return np.array(numpy_helper.to_array(tensor))
    return None


def insert_before(model: Model, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
    index = list(model.graph.node).index(node)
    for offset, n in enumerate(new):
        model.graph.node.insert(index + offset, n)


def insert_after(model: Model, node: onnx.NodeProto, *new: onnx.NodeProto) -> None:
    index = list(model.graph.node).index(node) + 1
    for offset, n in enumerate(new):
        model.graph.node.insert(index + offset, n)


def const(name: str, value: object, dtype: type = np.float32) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, dtype)))


def replace_input(model: Model, node: onnx.NodeProto, index: int, value: object, dtype: type = np.float32) -> None:
    name = f"mutated_{index}_{node.output[0]}"
    insert_before(model, node, const(name, value, dtype))
    node.input[index] = name


def prune(model: Model) -> None:
    """Take out nodes that nothing reads any more, as an exporter would."""
    outputs = {o.name for o in model.graph.output}
    while True:
        read = outputs | {i for n in model.graph.node for i in n.input}
        dead = [n for n in model.graph.node if not any(o in read for o in n.output)]
        if not dead:
            return
        for n in dead:
            model.graph.node.remove(n)
