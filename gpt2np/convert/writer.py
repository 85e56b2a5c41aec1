"""Write a GPT-2 as model.onnx: the ONNX Model Zoo's own graph, or a modern one with past inputs.

The zoo's graph (opsets 10 to 16) repeats, node by node and name by name, what PyTorch's exporter made of
transformers 2.x for gpt2-10.onnx and gpt2-lm-head-10.onnx. The modern graph (opset 17 and newer) takes the inputs
that Hugging Face's Optimum gives its exports.

Weights are asked for one at a time and streamed to the disk, so that writing needs room for one of them only.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import __version__
from ..arguments import as_path, whole_number
from ..config import GPT2Config
from ..errors import InputError, UnsupportedModelError
from ..onnx.read.wire import encode_varint
from ..weights import check_sources
from .builder import FIRST_MODERN_OPSET, GraphBuilder, Initializer, Weights
from .modern_graph import ModernBuilder
from .zoo_graph import ZooBuilder

MAX_SINGLE_FILE = (1 << 31) - 1  # bytes; protobuf reads no larger message
PAGE = 4096  # external data starts on pages, so that runtimes can map it

NUMPY_TO_ONNX = {"float32": 1, "uint8": 2}  # onnx.TensorProto.FLOAT, UINT8


def write_model(
    path: str | os.PathLike[str],
    config: GPT2Config,
    weights: Weights,
    *,
    opset: int = 10,
    lm_head: bool = False,
    with_past: bool = False,
    external_data: bool = False,
    max_file_size: int | None = None,
) -> tuple[Path, ...]:
    """Write a GPT-2 as an ONNX file that takes the place of `path` only when it is complete.

    Parameters
    ----------
    path : str or path
        The file to write, customarily model.onnx. Its folder must exist.
    config : GPT2Config
        `mask.value` is what the graph masks with; the zoo's -1e4 suits opset 10, float32's minimum a modern file.
    weights : mapping
        Every name of `weights.weight_shapes(config)` to an array, or to a WeightSource that is loaded when its
        turn comes; float16 and other types become float32. "lm_head.bias" (V,) may be among them.
    opset : int
        10 to 16 give the zoo's graph: input1 (d1, d2, T) -> output1, then output2 .. (2, B, H, T, D) per layer.
        17 and newer give input_ids, attention_mask and position_ids -> last_hidden_state or logits.
    lm_head : bool
        Put out logits instead of the last hidden state.
    with_past : bool
        Take past_key_values.i.key/value and return present.i.key/value; needs lm_head and opset 17 or newer.
    external_data : bool
        Keep the weights in files beside the model, `path` with "_data" added.
    max_file_size : int, optional
        Begin another file with external data (`..._data_1`, ...) when one would grow beyond so many bytes.

    Returns
    -------
    tuple of Path
        The files written, `path` first.

    Raises
    ------
    InputError
        If the options contradict each other, or one file cannot hold the model (2 GB) without external data.
    WeightError
        If a weight is missing or has the wrong shape.
    UnsupportedModelError
        If the graph of that opset cannot say what the configuration asks for.
    """
    path = as_path(path)
    graph = build_graph(config, weights, opset=opset, lm_head=lm_head, with_past=with_past)
    if not external_data and graph_nbytes(graph) > MAX_SINGLE_FILE:
        raise InputError(
            f"the model takes {graph_nbytes(graph) / 1e9:.1f} GB, but a single ONNX file holds 2.1 GB at most: "
            "ask for external data"
        )
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        target = Path(folder) / path.name
        names = []
        if external_data:
            places = _write_external(target, graph, max_file_size)
            names = list(dict.fromkeys(location for location, _ in places.values()))
            tensors = [_external_tensor(i, *places[i.name]) for i in graph.initializers.values()]
        else:
            tensors = [_raw_tensor_head(i) for i in graph.initializers.values()]
        with target.open("wb") as file:
            _write_model_proto(file, graph, tensors, raw=not external_data)
        for name in (*names, path.name):  # the model last: it must never point at missing data
            os.replace(Path(folder) / name, path.parent / name)
    return (path, *(path.parent / name for name in names))


def graph_nbytes(graph: GraphBuilder) -> int:
    """Bytes of the single file, without external data, give or take the few in front of the graph."""
    nodes = sum(node.ByteSize() + 6 for node in graph.nodes)
    return int(nodes) + sum(initializer.nbytes + 256 for initializer in graph.initializers.values())


def build_graph(
    config: GPT2Config, weights: Weights, *, opset: int = 10, lm_head: bool = False, with_past: bool = False
) -> GraphBuilder:
    """The graph that `write_model` writes; the options are the same."""
    from onnx import defs

    newest = defs.onnx_opset_version()
    if not 10 <= whole_number("opset", opset, 1) <= newest:
        raise InputError(f"opset {opset} is not between 10 and {newest}, the newest that the installed onnx knows")
    if with_past and (opset < FIRST_MODERN_OPSET or not lm_head):
        raise InputError(f"past inputs need opset {FIRST_MODERN_OPSET} or newer, and the LM head")
    check_sources(config, weights)
    if config.mask.kind == "none":
        raise UnsupportedModelError("its queries see later keys: the graphs that are written hide those")
    builder = ModernBuilder if opset >= FIRST_MODERN_OPSET else ZooBuilder
    return builder(config, weights, opset, lm_head, with_past).build()


def _write_blocks(file: BinaryIO, initializer: Initializer) -> None:
    for block in initializer.blocks():
        file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)


def _write_external(target: Path, graph: GraphBuilder, max_file_size: int | None) -> dict[str, tuple[str, int]]:
    """Write all initializers to files beside `target`; (file name, offset) of each."""
    places: dict[str, tuple[str, int]] = {}
    names = [f"{target.name}_data"]
    file: BinaryIO = (target.parent / names[0]).open("wb")
    try:
        for initializer in graph.initializers.values():
            offset = -(-file.tell() // PAGE) * PAGE
            if max_file_size is not None and offset and offset + initializer.nbytes > max_file_size:
                file.close()
                names.append(f"{target.name}_data_{len(names)}")
                file, offset = (target.parent / names[-1]).open("wb"), 0
            file.seek(offset)
            _write_blocks(file, initializer)
            places[initializer.name] = names[-1], offset
    finally:
        file.close()
    return places


def _external_tensor(initializer: Initializer, location: str, offset: int) -> bytes:
    """A TensorProto whose content lies in another file."""
    from onnx import TensorProto

    tensor = TensorProto(
        name=initializer.name,
        dims=initializer.shape,
        data_type=NUMPY_TO_ONNX[initializer.dtype.name],
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(initializer.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return bytes(tensor.SerializeToString())


def _raw_tensor_head(initializer: Initializer) -> bytes:
    """A TensorProto up to its content, which follows as the last field."""
    from onnx import TensorProto

    head = TensorProto(
        name=initializer.name, dims=initializer.shape, data_type=NUMPY_TO_ONNX[initializer.dtype.name]
    ).SerializeToString()
    return bytes(head) + encode_varint(9 << 3 | 2) + encode_varint(initializer.nbytes)  # raw_data


def _write_model_proto(file: BinaryIO, graph: GraphBuilder, tensors: list[bytes], raw: bool) -> None:
    """Write a ModelProto; with `raw`, the content of each initializer right after its head in `tensors`."""
    from onnx import GraphProto, ModelProto, helper

    opset = helper.make_opsetid("", graph.opset)
    model = ModelProto(
        ir_version=max(5, helper.find_min_ir_version_for([opset])),
        producer_name="gpt2np",
        producer_version=__version__,
        opset_import=[opset],
    )
    rest = GraphProto(name="main_graph", node=graph.nodes, input=graph.inputs, output=graph.outputs)
    start = rest.SerializeToString()
    heads = [
        encode_varint(5 << 3 | 2) + encode_varint(len(tensor) + (initializer.nbytes if raw else 0)) + tensor
        for initializer, tensor in zip(graph.initializers.values(), tensors, strict=True)
    ]
    content = sum(initializer.nbytes for initializer in graph.initializers.values()) if raw else 0
    length = len(start) + sum(map(len, heads)) + content
    file.write(model.SerializeToString() + encode_varint(7 << 3 | 2) + encode_varint(length) + start)
    for initializer, head in zip(graph.initializers.values(), heads, strict=True):
        file.write(head)
        if raw:
            _write_blocks(file, initializer)
