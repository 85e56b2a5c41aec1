"""Files that no exporter writes: changed in their bytes, or in the structure that protobuf gives them.

Each change takes the parsed model (or the bytes) and a random generator, and need not make sense: what matters is
that gpt2np answers in time, in bounded memory, and with an error of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

Random = np.random.Generator
SIZES = (0, 1, 2, 3, 7, 20, 1000, 10**5, 10**6, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -1, -2, -(2**31), -(2**63))
# Operators that exporters use, and ONNX Runtime's own.
_OPERATORS = """
Add Mul Sub Div Pow Sqrt Gather GatherND GatherElements ScatterND Concat Split Slice Reshape Flatten Squeeze Unsqueeze
Transpose Expand Tile Range ConstantOfShape Shape Size Where Cast CastLike Equal Less Greater And Or Not MatMul Gemm
Einsum Softmax LayerNormalization ReduceMean ReduceSum ReduceMax Tanh Erf Gelu Clip Mod Trilu EyeLike CumSum NonZero
Identity Dropout Constant DequantizeLinear QuantizeLinear Attention If Loop Scan SequenceAt SplitToSequence
RotaryEmbedding RMSNormalization Nonsense
"""
_CONTRIB = """
Attention MultiHeadAttention GroupQueryAttention SkipLayerNormalization EmbedLayerNormalization FastGelu BiasGelu
QuickGelu FusedGemm FusedMatMul MatMulNBits MatMulBnb4 GatherBlockQuantized DynamicQuantizeMatMul QGemm
MatMulIntegerToFloat DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention BeamSearch GreedySearch Sampling
"""
_ATTRIBUTES = """
axis axes perm epsilon to value num_heads kv_num_heads alpha beta transA transB keepdims equation num_outputs scale
unidirectional block_size bits K N split then_branch decoder
"""
OPERATORS, CONTRIB, ATTRIBUTES = (text.split() for text in (_OPERATORS, _CONTRIB, _ATTRIBUTES))


def pick(rng: Random, things: Sequence[Any]) -> Any:
    return things[int(rng.integers(len(things)))]


def size(rng: Random) -> int:
    return int(pick(rng, SIZES))


def values(model: ModelProto) -> list[str]:
    graph = model.graph
    return [
        *(o for n in graph.node for o in n.output),
        *(t.name for t in graph.initializer),
        *(i.name for i in graph.input),
        "",
        "nowhere",
    ]


def any_node(model: ModelProto, rng: Random) -> NodeProto:
    bodies = [b for n in model.graph.node for a in n.attribute for b in (a.g, *a.graphs) if b.node]
    graph = pick(rng, [model.graph, *bodies]) if bodies and rng.random() < 0.3 else model.graph
    return pick(rng, graph.node) if graph.node else NodeProto()


# ------------------------------------------------------------------------------------------------ nodes and wiring
def drop_node(model: ModelProto, rng: Random) -> None:
    del model.graph.node[int(rng.integers(len(model.graph.node)))]


def repeat_node(model: ModelProto, rng: Random) -> None:
    copy = model.graph.node.add()
    copy.CopyFrom(any_node(model, rng))
    if rng.random() < 0.5:
        for i, output in enumerate(copy.output):
            copy.output[i] = f"{output} again"


def rewire_input(model: ModelProto, rng: Random) -> None:
    node = any_node(model, rng)
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = pick(rng, values(model))


def change_inputs(model: ModelProto, rng: Random) -> None:
    node = any_node(model, rng)
    if node.input and rng.random() < 0.5:
        del node.input[int(rng.integers(len(node.input))) :]
    else:
        node.input.extend(pick(rng, values(model)) for _ in range(int(rng.integers(1, 12))))


def change_outputs(model: ModelProto, rng: Random) -> None:
    node = any_node(model, rng)
    if node.output and rng.random() < 0.5:
        del node.output[int(rng.integers(len(node.output)))]
    else:
        node.output.append(pick(rng, [*values(model), "new"]))


def other_operator(model: ModelProto, rng: Random) -> None:
    node = any_node(model, rng)
    if rng.random() < 0.3:
        node.op_type, node.domain = pick(rng, CONTRIB), "com.microsoft"
    else:
        node.op_type, node.domain = pick(rng, OPERATORS), pick(rng, ["", "", "", "ai.onnx", "com.microsoft", "x"])


# ------------------------------------------------------------------------------------------------------ attributes
def random_attribute(name: str, rng: Random, model: ModelProto) -> AttributeProto:
    made = AttributeProto(name=name, type=int(rng.integers(0, 16)))
    ints = [size(rng) for _ in range(int(rng.integers(0, 5)))]
    made.i, made.f, made.s = size(rng), float(pick(rng, [0, -1, 1e-5, 1e38, float("inf"), float("nan")])), b"x\xff"
    made.ints.extend(ints)
    made.floats.extend(float(i) for i in ints)
    made.strings.append(b"ij,jk->ik")
    if rng.random() < 0.5 and model.graph.initializer:
        made.t.CopyFrom(pick(rng, model.graph.initializer))
    made.g.node.add(op_type="Add", input=["a", "b"], output=["c"])
    if rng.random() < 0.2:
        made.ref_attr_name = "outer"
    return made


def change_attribute(model: ModelProto, rng: Random) -> None:
    nodes = [n for n in model.graph.node if n.attribute] or model.graph.node
    node = pick(rng, nodes)
    what = int(rng.integers(4))
    if what == 0 or not node.attribute:
        node.attribute.append(random_attribute(pick(rng, ATTRIBUTES), rng, model))
    elif what == 1:
        del node.attribute[int(rng.integers(len(node.attribute)))]
    elif what == 2:
        i = int(rng.integers(len(node.attribute)))
        node.attribute[i].CopyFrom(random_attribute(node.attribute[i].name, rng, model))
    else:  # of its own type, but odd
        attribute = pick(rng, node.attribute)
        if attribute.type == AttributeProto.INT:
            attribute.i = size(rng)
        elif attribute.type == AttributeProto.INTS:
            del attribute.ints[:]
            attribute.ints.extend(size(rng) for _ in range(int(rng.integers(0, 6))))
        elif attribute.type == AttributeProto.FLOAT:
            attribute.f = float(pick(rng, [0, -1, float("inf"), float("nan"), 1e38, 1e-45]))
        elif attribute.type == AttributeProto.STRING:
            attribute.s = pick(rng, [b"", b"->", b"...ij,jk", b"a,b->c,d", b"\xff", b"i" * 100 + b",i->", b"tanh"])
        else:
            attribute.ref_attr_name = "outer"


# ---------------------------------------------------------------------------------------------------------- tensors
def some_tensor(model: ModelProto, rng: Random) -> TensorProto | None:
    tensors = [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))]
    return pick(rng, tensors) if tensors else None


def change_dims(model: ModelProto, rng: Random) -> None:
    tensor = some_tensor(model, rng)
    if tensor is None:
        return
    what = int(rng.integers(4))
    if what == 0 and tensor.dims:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = size(rng)
    elif what == 1:
        tensor.dims.append(size(rng))
    elif what == 2 and tensor.dims:
        del tensor.dims[int(rng.integers(len(tensor.dims)))]
    else:
        flipped = list(tensor.dims)[::-1]
        del tensor.dims[:]
        tensor.dims.extend(flipped)


def change_payload(model: ModelProto, rng: Random) -> None:
    tensor = some_tensor(model, rng)
    if tensor is None:
        return
    what = int(rng.integers(6))
    if what == 0:
        tensor.raw_data = tensor.raw_data[: int(rng.integers(len(tensor.raw_data) + 1))]
    elif what == 1:
        tensor.raw_data += bytes(int(rng.integers(1, 64)))
    elif what == 2:
        tensor.data_type = int(rng.integers(0, 32))
    elif what == 3:
        getattr(tensor, pick(rng, ["float_data", "int32_data", "int64_data", "double_data"])).extend([1, 2, 3])
    elif what == 4:
        tensor.data_location = TensorProto.EXTERNAL
        places = [
            "model.onnx",
            "none.bin",
            "../up.bin",
            "/dev/zero",
            "",
            ".",
            "a\0b",
            "\ud800".encode("utf-16", "ignore"),
        ]
        place = pick(rng, places)
        tensor.external_data.add(key="location", value=place if isinstance(place, str) else "x")
        for key in ("offset", "length"):
            if rng.random() < 0.5:
                tensor.external_data.add(key=key, value=str(size(rng)))
        if rng.random() < 0.5:
            tensor.ClearField("raw_data")
    elif tensor.data_type == TensorProto.INT64 and len(tensor.raw_data) == 8 * int(np.prod(tensor.dims)):
        numbers = [size(rng) for _ in range(len(tensor.raw_data) // 8)]
        tensor.raw_data = np.array(numbers, np.int64).tobytes()


def make_sparse(model: ModelProto, rng: Random) -> None:
    """An initializer becomes a sparse one, with places that may lie anywhere."""
    if not model.graph.initializer:
        return
    i = int(rng.integers(len(model.graph.initializer)))
    tensor = model.graph.initializer[i]
    count = int(rng.integers(0, 5))
    found = onnx.SparseTensorProto()
    found.values.CopyFrom(numpy_helper.from_array(np.ones(count, np.float32), tensor.name))
    rank = len(tensor.dims) if rng.random() < 0.3 else 0
    places = np.array([size(rng) if rng.random() < 0.2 else j for j in range(count * max(rank, 1))], np.int64)
    found.indices.CopyFrom(numpy_helper.from_array(places.reshape((count, rank) if rank else (count,))))
    found.dims.extend(size(rng) if rng.random() < 0.2 else d for d in tensor.dims)
    del model.graph.initializer[i]
    model.graph.sparse_initializer.append(found)


def constants_of_any_size(model: ModelProto, rng: Random) -> None:
    """Small integers, by which shapes and positions are made, become others."""
    small = [
        t for t in (some_tensor(model, rng) for _ in range(20)) if t is not None and t.data_type == TensorProto.INT64
    ]
    for tensor in small[:2]:
        numbers = numpy_helper.to_array(tensor).copy().reshape(-1)
        if 0 < numbers.size < 16:
            numbers[int(rng.integers(numbers.size))] = size(rng)
            tensor.raw_data = numbers.tobytes()
            del tensor.int64_data[:]


# ------------------------------------------------------------------------------------------- inputs, outputs, opsets
def change_port(model: ModelProto, rng: Random) -> None:
    ports = [*model.graph.input, *model.graph.output]
    if not ports:
        return
    port = pick(rng, ports)
    kind, what = port.type.tensor_type, int(rng.integers(8))
    if what == 0:
        kind.elem_type = int(rng.integers(0, 32))
    elif what == 1:
        port.type.Clear()
    elif what == 2:
        port.name = pick(rng, values(model))
    elif what == 3:
        kind.ClearField("shape")
    elif what == 4:
        kind.shape.dim.add(dim_value=size(rng))
    elif what == 5 and kind.shape.dim:
        del kind.shape.dim[int(rng.integers(len(kind.shape.dim)))]
    elif what == 6:
        port.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind.shape.dim:
        pick(rng, kind.shape.dim).dim_value = size(rng)


def add_or_drop_port(model: ModelProto, rng: Random) -> None:
    ports = pick(rng, [model.graph.input, model.graph.output])
    if ports and rng.random() < 0.5:
        del ports[int(rng.integers(len(ports)))]
    else:
        ports.append(helper.make_tensor_value_info(pick(rng, values(model)), 7, [size(rng), "T"]))


def change_opset(model: ModelProto, rng: Random) -> None:
    what = int(rng.integers(4))
    if what == 0 and model.opset_import:
        del model.opset_import[:]
    elif what == 1 or not model.opset_import:
        model.opset_import.append(helper.make_opsetid(pick(rng, ["", "ai.onnx", "com.microsoft", "x"]), size(rng)))
    elif what == 2:
        pick(rng, model.opset_import).version = size(rng)
    else:
        pick(rng, model.opset_import).version = int(rng.integers(1, 25))


# ------------------------------------------------------------------------------------- what multiplies, and functions
def _spliced(model: ModelProto, rng: Random, nodes: list[NodeProto], out: str) -> None:
    """Put nodes before the others and let some reader take their result."""
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])
    readers = [n for n in rest if n.input]
    if readers:
        node = pick(rng, readers)
        node.input[int(rng.integers(len(node.input)))] = out


def multiply(model: ModelProto, rng: Random) -> None:
    """A value of a few bytes becomes a large one."""
    start = pick(rng, values(model))
    nodes, tensors = [], {"n": np.array([size(rng), pick(rng, [1, 2, 1000])], np.int64), "one": np.array(1, np.int64)}
    tensors["n1"], tensors["big"] = tensors["n"][:1], np.array(size(rng), np.int64)
    kind = int(rng.integers(7))
    if kind == 0:
        nodes.append(helper.make_node("ConstantOfShape", ["n"], ["grown"]))
    elif kind == 1:
        nodes.append(helper.make_node("Range", ["one", "big", "one"], ["grown"]))
    elif kind == 2:
        nodes.append(helper.make_node("Expand", [start, "n"], ["wide"]))
        nodes.append(helper.make_node("Add", ["wide", "wide"], ["grown"]))
    elif kind == 3:
        nodes.append(helper.make_node("Tile", [start, "n"], ["grown"]))
    elif kind == 4:
        nodes.append(helper.make_node("ConstantOfShape", ["n1"], ["long"]))
        nodes.append(helper.make_node("Unsqueeze", ["long", "one"], ["column"]))
        nodes.append(helper.make_node("Mul", ["long", "column"], ["grown"]))
    else:
        operator, times = ("Concat", 40) if kind == 5 else ("Add", int(pick(rng, [30, 3000])))
        for i in range(times):
            how = {"axis": 0} if kind == 5 else {}
            last = start if i == 0 else f"doubled {i - 1}"
            nodes.append(helper.make_node(operator, [last, last], [f"doubled {i}"], **how))
        nodes.append(helper.make_node("Identity", [nodes[-1].output[0]], ["grown"]))
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in tensors.items())
    _spliced(model, rng, nodes, "grown")


def functions(model: ModelProto, rng: Random) -> None:
    """Local functions: that call themselves, each other many times, or refer to attributes that are not given."""
    opsets = [
        helper.make_opsetid("", model.opset_import[0].version if model.opset_import else 18),
        helper.make_opsetid("f", 1),
    ]
    depth, last = int(pick(rng, [1, 3, 12, 22, 60])), int(rng.integers(3))
    model.opset_import.append(opsets[1])
    for i in range(depth):
        if i + 1 < depth:
            callees = [(f"F{i + 1}", "f")] * 2
        else:
            callees = [[("Neg", "")], [("F0", "f")], [("LeakyRelu", "")]][last]
        nodes = [
            helper.make_node(op, ["x" if j == 0 else f"t{j - 1}"], [f"t{j}"], domain=domain)
            for j, (op, domain) in enumerate(callees)
        ]
        if last == 2 and i + 1 == depth:
            nodes[0].attribute.append(AttributeProto(name="alpha", type=AttributeProto.FLOAT, ref_attr_name="alpha"))
        model.functions.append(
            helper.make_function("f", f"F{i}", ["x"], [f"t{len(nodes) - 1}"], nodes, opsets, ["alpha"])
        )
    start = pick(rng, values(model))
    _spliced(model, rng, [helper.make_node("F0", [start], ["called"], domain="f")], "called")


def bodies(model: ModelProto, rng: Random) -> None:
    """A node moves into the body of an If or a Loop, perhaps many deep."""
    node = NodeProto()
    node.CopyFrom(any_node(model, rng))
    for depth in range(int(pick(rng, [1, 2, 10, 28]))):
        outputs = [helper.make_tensor_value_info(o, 1, None) for o in node.output]
        body = helper.make_graph([node], f"body {depth}", [], outputs)
        operator = pick(rng, ["If", "If", "Loop"])
        condition = pick(rng, [i.name for i in model.graph.input] or [""])
        if operator == "If":
            node = helper.make_node("If", [condition], list(node.output), then_branch=body, else_branch=body)
            if depth > 3:
                del node.attribute[1]
        else:
            node = helper.make_node("Loop", ["", condition], list(node.output), body=body)
    for i, old in enumerate(model.graph.node):
        if list(old.output) == list(node.output):
            model.graph.node[i].CopyFrom(node)
            return


CHANGES: tuple[Callable[[ModelProto, Random], None], ...] = (
    drop_node, repeat_node, rewire_input, change_inputs, change_outputs, other_operator, change_attribute,
    change_attribute, change_dims, change_payload, make_sparse, constants_of_any_size, change_port, change_port,
    add_or_drop_port, change_opset, multiply, functions, bodies,
)  # fmt: skip


def change_bytes(data: bytes, rng: Random) -> bytes:
    """Some bytes changed, cut out, doubled or added; most often in the structure at both ends."""
    content = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        region = min(int(pick(rng, [64, 600, 1 << 30])), len(content))
        at = int(rng.integers(max(region, 1)))
        at = at if rng.random() < 0.5 else max(len(content) - 1 - at, 0)
        length = int(pick(rng, [1, 1, 2, 8, 100]))
        what = int(rng.integers(4))
        if what == 0:
            content[at : at + 1] = bytes([int(rng.integers(256))])
        elif what == 1:
            del content[at : at + length]
        elif what == 2:
            content[at:at] = content[at : at + length]
        else:
            content[at:at] = pick(rng, [b"\xff" * 10, b"\0" * length, b"\x80" * 9 + b"\x01"])
    return bytes(content)


def mutant(data: bytes, rng: Random) -> tuple[str, bytes]:
    """A changed file, and what was done to it: three in four by structure, the others by bytes."""
    if rng.random() < 0.25:
        return "bytes", change_bytes(data, rng)
    model = ModelProto.FromString(data)
    done = []
    for _ in range(int(pick(rng, [1, 1, 1, 2, 3]))):
        change = pick(rng, CHANGES)
        try:
            change(model, rng)
        except Exception:  # nothing there to be changed so, or more than protobuf can nest
            continue
        done.append(change.__name__)
    return " + ".join(done), model.SerializeToString()
