"""Which values of a file are float16, and which nodes ONNX Runtime runs in it."""

from __future__ import annotations

import numpy as np

from ..graph import MOVES, Graph, Node

FLOAT16_KERNELS = frozenset(
    {
        "Attention",
        "Clip",
        "DequantizeLinear",
        "IsNaN",
        "LayerNormalization",
        "Max",
        "Min",
        "Mod",
        "QuantizeLinear",
        "Relu",  # as Max
        "Round",
        "com.microsoft.GatherBlockQuantized",
        "com.microsoft.MatMulNBits",
        "com.microsoft.SkipLayerNormalization",
    }
)


NOT_FLOAT = frozenset({"Shape", "Size", "IsNaN", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})


def float16(graph: Graph) -> tuple[set[str], set[int]]:
    """The values that a file declares as float16, and the id of each node that ONNX Runtime runs in it on x86 CPUs.

    Few operators have float16 kernels there; the others run in float32, and so does what has a kernel but lies
    between nodes that have none. Between nodes in float32 nothing is rounded, not even by a Cast to float16.
    (insert_cast_transformer.cc in onnxruntime/core/optimizer)
    """
    import onnx

    def narrows(node: Node | None) -> bool:
        return node is not None and node.op == "Cast" and node.attributes["to"] == onnx.TensorProto.FLOAT16

    half = {n for n in (*graph.constants, *(i.name for i in graph.inputs)) if _is_float16(graph, n)}
    known = -1
    while known < len(half):  # nodes may stand in any order
        known = len(half)
        for node in graph.nodes:
            keeps = node.op not in NOT_FLOAT | {"Cast"} and any(i in half for i in node.inputs)
            if keeps or narrows(node):
                half.update(node.outputs)
    ends = {o.name for o in graph.outputs}

    def kernel(node: Node) -> str:
        return str(node.attributes.get("written_as", node.op))

    def in_float32(node: Node | None) -> bool:
        return node is not None and kernel(node) not in MOVES | FLOAT16_KERNELS | {"Cast"}

    found: set[int] = set()
    for node in graph.nodes:
        if node.op == "Cast" and not narrows(node) and narrows(graph.producers.get(node.inputs[0])):
            found.add(id(node))  # rounding that is written out
        if node.op == "Cast" or in_float32(node) or not any(o in half for o in node.outputs):
            continue
        sources = [i for i in node.inputs if i in half and i not in graph.constants]
        readers = [c for o in node.outputs for c in graph.consumers(o)]
        alone = all(in_float32(graph.producers.get(i)) for i in sources) and all(in_float32(c) for c in readers)
        alone = alone and any(graph.producers.get(i) for i in node.inputs)
        if not alone or ends & set(node.outputs):
            found.add(id(node))
    return half, found


def _is_float16(graph: Graph, name: str) -> bool:
    from onnx import TensorProto

    if name in graph.constants:
        return graph.constants[name].dtype == np.float16
    return any(i.name == name and i.type.tensor_type.elem_type == TensorProto.FLOAT16 for i in graph.inputs)
