"""Files that search: old_past.onnx inside ONNX Runtime's search nodes, and inside a Loop as the zoo's bs-12 has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from runtime import DATA

DECODER = DATA / "old_past.onnx"
EOS, WIDTH = 33, 4  # a token that these weights often choose
INT32, INT64, FLOAT, BOOL = TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL


def value(name: str, kind: int, *shape: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def decoder() -> onnx.ModelProto:
    """old_past.onnx, with the name for its logits that ONNX Runtime's search nodes ask for."""
    model = onnx.load(DECODER)
    for node in model.graph.node:
        node.output[:] = ["logits" if name == "out" else name for name in node.output]
    model.graph.output[0].name = "logits"
    return model


def node_file(path: Path, kind: str, outer_weights: bool = False, outputs: int = 1, **attributes: Any) -> Path:
    """A BeamSearch, GreedySearch or Sampling node around the GPT-2; its weights may be those of the outer graph."""
    model = decoder()
    graph = model.graph
    for port in list(graph.input)[:3]:  # ONNX Runtime feeds int32
        name, type_ = port.name, port.type.tensor_type.elem_type
        for node in graph.node:
            node.input[:] = [f"{name}_cast" if i == name else i for i in node.input]
        graph.node.insert(0, helper.make_node("Cast", [name], [f"{name}_cast"], to=type_))
        port.type.tensor_type.elem_type = INT32
    weights = list(graph.initializer)
    if outer_weights:
        del graph.initializer[:]
    beams = ["num_beams", "num_return_sequences", "length_penalty"] if kind == "BeamSearch" else []
    names = ["input_ids", "max_length", "min_length", *beams, "repetition_penalty", "vocab_mask"]
    floats = {"length_penalty", "repetition_penalty"}
    inputs = [value("input_ids", INT32, "B", "T")]
    inputs += [value(n, FLOAT if n in floats else INT32, 1) for n in names[1:-1]] + [value("vocab_mask", INT32, 64)]
    if kind == "Sampling":
        names += ["", "", "", "seed"]
        inputs.append(value("seed", INT32, 1))
    rows = ["B", "R", "S"] if kind == "BeamSearch" else ["B", "S"]
    ends = [value("sequences", INT32, *rows), value("sequences_scores", FLOAT, "B", "R")]
    ends += [value("scores", FLOAT, "N", "B", "W", 64)]
    node = helper.make_node(
        kind, names, [e.name for e in ends[:outputs]], "search", domain="com.microsoft", decoder=graph,
        **{"eos_token_id": EOS, "pad_token_id": EOS, "model_type": 0, "no_repeat_ngram_size": 0, **attributes},
    )  # fmt: skip
    outer = helper.make_graph([node], "search", inputs, ends[:outputs], weights if outer_weights else [])
    opsets = [*model.opset_import, helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(outer, opset_imports=opsets, ir_version=8), path)
    return path


def node_feeds(kind: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs of such a file, its settings included."""
    B, T, W = (int(rng.integers(1, n)) for n in (4, 6, 6))
    numbers: dict[str, Any] = {
        "max_length": T + int(rng.integers(1, 10)),
        "min_length": int(rng.integers(0, T + 1)),
        "num_beams": W,
        "num_return_sequences": int(rng.integers(1, W + 1)),
        "length_penalty": float(rng.choice([1, 0.5, 2, 0])),
        "repetition_penalty": float(rng.choice([1, 1.3, 0.8])),
    }
    if kind != "BeamSearch":
        for name in ("num_beams", "num_return_sequences", "length_penalty"):
            del numbers[name]
    feeds = {n: np.array([v], np.float32 if isinstance(v, float) else np.int32) for n, v in numbers.items()}
    feeds["input_ids"] = rng.integers(0, 64, (B, T)).astype(np.int32)
    if rng.random() < 0.3 and T > 1:
        feeds["input_ids"][0, 0] = EOS  # padding on the left
    feeds["vocab_mask"] = (rng.random(64) < 0.9).astype(np.int32)
    return feeds


class _Body:
    """Nodes under construction, opset 12."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []

    def op(self, op: str, *inputs: str, out: str = "", outputs: int = 1, **attributes: Any) -> str:
        names = [out or f"{op}_{len(self.nodes)}", *(f"{op}_{len(self.nodes)}_{k}" for k in range(1, outputs))]
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[0]

    def constant(self, given: Any, dtype: Any = np.int64) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(given, dtype), f"constant_{len(self.tensors)}"))
        return self.tensors[-1].name


def _loop_nodes() -> _Body:
    """One turn of a beam search of width 4."""
    model = decoder()
    b = _Body()
    flat = b.op("Reshape", "beam", b.constant([-1]))
    renamed = {"input_ids": "ids", "position_ids": "positions", "attention_mask": "mask"}
    renamed |= {f"past_{i}": b.op("Gather", f"past_{i}", flat, axis=1) for i in (0, 1)}
    for node in model.graph.node:
        copy = NodeProto.FromString(node.SerializeToString())
        copy.input[:] = [renamed.get(i, f"og_{i}") if i else "" for i in node.input]
        copy.output[:] = [f"og_{o}" for o in node.output]
        b.nodes.append(copy)
    for tensor in model.graph.initializer:
        tensor.name = f"og_{tensor.name}"
        b.tensors.append(tensor)
    eos, zero, low = b.constant(EOS), b.constant(0, np.float32), b.constant(-np.inf, np.float32)
    last = b.op("Gather", "og_logits", b.constant(-1), axis=1)
    log_probs = b.op("LogSoftmax", b.op("Unsqueeze", last, axes=[0]), axis=2)
    top = b.op("TopK", log_probs, b.constant([WIDTH]), outputs=2, axis=-1)
    over = b.op("Unsqueeze", b.op("Not", "unfinished"), axes=[-1])
    tokens = b.op("Where", over, eos, f"{top}_1")
    values = b.op("Where", over, low, top)
    first = b.op("Slice", values, b.constant([0]), b.constant([1]), b.constant([2]))
    rest = b.op("Slice", values, b.constant([1]), b.constant([WIDTH]), b.constant([2]))
    values = b.op("Concat", b.op("Where", over, zero, first), rest, axis=2)
    total = b.op("Add", b.op("Unsqueeze", "totals", axes=[-1]), values)
    best = b.op("TopK", b.op("Reshape", total, b.constant([1, -1])), b.constant([WIDTH]), outputs=2, axis=-1)
    chosen = b.op("Div", f"{best}_1", b.constant(WIDTH), out="beam_next")
    token = b.op("GatherElements", b.op("Reshape", tokens, b.constant([1, -1])), f"{best}_1", axis=1)
    running = b.op("And", b.op("GatherElements", "unfinished", chosen, axis=1), b.op("Not", b.op("Equal", token, eos)))
    rows = b.op("Reshape", chosen, b.constant([-1]))
    column = b.op("Reshape", token, b.constant([WIDTH, 1]))
    b.op("Identity", column, out="ids_next")
    b.op("Concat", b.op("Gather", "results", rows, axis=0), column, out="results_next", axis=1)
    ones = b.op("Cast", b.op("Equal", column, column), to=FLOAT)
    b.op("Concat", b.op("Gather", "mask", rows, axis=0), ones, out="mask_next", axis=1)
    length = b.op("Gather", b.op("Shape", "mask"), b.constant([1]))
    b.op("Expand", length, b.op("Shape", column), out="positions_next")
    b.op("Identity", best, out="totals_next")
    b.op("Identity", running, out="unfinished_next")
    for i in (0, 1):
        b.op("Identity", f"og_present_{i}", out=f"past_{i}_next")
    left = b.op("ReduceSum", b.op("Cast", running, to=INT64), keepdims=0)
    b.op("Greater", left, b.constant(0), out="go_on")
    return b


def loop_file(path: Path, change: Any = None) -> Path:
    """A beam search of width 4 as one Loop; `change` may alter its body."""
    b = _loop_nodes()
    past = [2, "B", 2, "P", 8]
    kinds = {
        "ids": (INT64, "B", "T"), "positions": (INT64, "B", "T"), "mask": (FLOAT, "B", "S"), "beam": (INT64, 1, "B"),
        "totals": (FLOAT, 1, "B"), "unfinished": (BOOL, 1, "B"), "results": (INT64, "B", "S"),
        "past_0": (FLOAT, *past), "past_1": (FLOAT, *past),
    }  # fmt: skip
    inputs = [value("turn", INT64), value("going", BOOL), *(value(n, *k) for n, k in kinds.items())]
    ends = [value("go_on", BOOL), *(value(f"{n}_next", k[0], *["?"] * (len(k) - 1)) for n, k in kinds.items())]
    body = helper.make_graph(b.nodes, "body", inputs, ends, b.tensors)
    if change is not None:
        change(body)

    o = _Body()
    count = o.op("CumSum", o.op("Cast", "attention_mask", to=INT64), o.constant(-1, np.int32))
    starts = {
        "ids": "input_ids", "positions": o.op("Sub", count, o.constant(1)), "mask": "attention_mask",
        "beam": o.constant([[0]]), "totals": o.constant([[0]], np.float32), "unfinished": o.constant([[True]], bool),
        "results": o.op("Identity", "input_ids"),
        "past_0": o.constant(np.zeros((2, 1, 2, 0, 8)), np.float32),
        "past_1": o.constant(np.zeros((2, 1, 2, 0, 8)), np.float32),
    }  # fmt: skip
    names = [f"last_{n}" for n in kinds]
    loop = helper.make_node(
        "Loop", ["new_tokens", o.constant(True, bool), *starts.values()], names, "search", body=body
    )
    o.nodes.append(loop)
    ports = [value("input_ids", INT64, 1, "T"), value("attention_mask", FLOAT, 1, "T"), value("new_tokens", INT64)]
    graph = helper.make_graph(o.nodes, "search", ports, [value("last_results", INT64, WIDTH, "S")], o.tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=7), path)
    return path
