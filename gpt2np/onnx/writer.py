"""Write a GPT-2 as model.onnx: the ONNX Model Zoo's own graph, or a modern one with past inputs.

The zoo's graph (opsets 10 to 16) repeats, node by node and name by name, what PyTorch's exporter made of
transformers 2.x for gpt2-10.onnx and gpt2-lm-head-10.onnx. The modern graph (opset 17 and newer) takes the inputs
that Hugging Face's Optimum gives its exports.

Weights are asked for one at a time and streamed to the disk, so that writing needs room for one of them only.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .. import __version__
from ..activations import ACTIVATIONS
from ..config import GPT2Config
from ..errors import InputError, UnsupportedModelError, WeightError
from ..weights import Array, WeightSource, weight_shapes
from .read.wire import encode_varint

if TYPE_CHECKING:
    import onnx

FIRST_MODERN_OPSET = 17  # the first with LayerNormalization
MAX_SINGLE_FILE = (1 << 31) - 1  # bytes; protobuf reads no larger message
PAGE = 4096  # external data starts on pages, so that runtimes can map it
BLOCK = 1 << 24  # bytes converted or transposed at once

Weights = Mapping[str, "Array | WeightSource"]  # under the names of weights.weight_shapes, and "lm_head.bias"
NUMPY_TO_ONNX = {"float32": 1, "uint8": 2}  # onnx.TensorProto.FLOAT, UINT8


@dataclass(frozen=True)
class Initializer:
    """A tensor of the file to be, whose content is made when it is written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Array]]  # its content in order, in C-contiguous blocks of `dtype`

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Graph:
    """A graph under construction; values are named by their names, as in ONNX itself."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, Initializer] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._counts: dict[str, int] = {}

    def op(self, scope: str, op_type: str, *inputs: str, outputs: int = 1, output: str = "", **attributes: Any) -> Any:
        """Append a node; the name of its output, or a list of the names of several."""
        from onnx import helper

        name = f"{scope}/{op_type}"
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if count:  # PyTorch's numbering: Add, Add_1, Add_2 ...
            name += f"_{count}"
        names = [output] if output else [f"{name}_output_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name, **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, scope: str, value: Any, dtype: Any = np.int64) -> str:
        """A Constant node."""
        from onnx import numpy_helper

        return str(self.op(scope, "Constant", value=numpy_helper.from_array(np.array(value, dtype))))

    def unsqueeze(self, scope: str, value: str, axis: int) -> str:
        """Insert an axis; since opset 13 it is an input."""
        if self.opset < 13:
            return str(self.op(scope, "Unsqueeze", value, axes=[axis]))
        return str(self.op(scope, "Unsqueeze", value, self.constant(scope, [axis])))

    def split(self, scope: str, value: str, sizes: list[int], axis: int) -> list[str]:
        """Cut along an axis; since opset 13 the sizes are an input."""
        if self.opset < 13:
            return list(self.op(scope, "Split", value, outputs=len(sizes), axis=axis, split=sizes))
        return list(self.op(scope, "Split", value, self.constant(scope, sizes), outputs=len(sizes), axis=axis))

    def dim(self, scope: str, value: str, axis: int) -> str:
        """One dimension of a value, as a scalar."""
        shape = self.op(scope, "Shape", value)
        return str(self.op(scope, "Gather", shape, self.constant(scope, axis), axis=0))

    def concat(self, scope: str, *values: str, axis: int = 0) -> str:
        return str(self.op(scope, "Concat", *values, axis=axis))


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
    path = Path(path)
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


def graph_nbytes(graph: Graph) -> int:
    """Bytes of the single file, without external data, give or take the few in front of the graph."""
    nodes = sum(node.ByteSize() + 6 for node in graph.nodes)
    return int(nodes) + sum(initializer.nbytes + 256 for initializer in graph.initializers.values())


# --- the graph -----------------------------------------------------------------------------------------------


def build_graph(
    config: GPT2Config, weights: Weights, *, opset: int = 10, lm_head: bool = False, with_past: bool = False
) -> Graph:
    """The graph that `write_model` writes; the options are the same."""
    from onnx import defs

    newest = defs.onnx_opset_version()
    if not 10 <= opset <= newest:
        raise InputError(f"opset {opset} is not between 10 and {newest}, the newest that the installed onnx knows")
    if with_past and (opset < FIRST_MODERN_OPSET or not lm_head):
        raise InputError(f"past inputs need opset {FIRST_MODERN_OPSET} or newer, and the LM head")
    _check_weights(config, weights)
    if config.mask.kind == "none":
        raise UnsupportedModelError("its queries see later keys: the graphs that are written hide those")
    builder = _Modern if opset >= FIRST_MODERN_OPSET else _Zoo
    return builder(config, weights, opset, lm_head, with_past).build()


def _check_weights(config: GPT2Config, weights: Weights) -> None:
    """Raise WeightError unless all weights are there with the right shapes."""
    expected = weight_shapes(config)
    if "lm_head.bias" in weights:
        expected["lm_head.bias"] = (config.vocab_size,)
    for name, shape in expected.items():
        if name not in weights:
            raise WeightError(f"weight {name} is missing")
        if tuple(weights[name].shape) != shape:
            raise WeightError(f"weight {name} has shape {tuple(weights[name].shape)}, not {shape}")
    if unknown := set(weights) - set(expected):
        raise WeightError(f"{', '.join(sorted(unknown))}: no weight of a GPT-2 with this configuration")


class _Builder:
    """What both graphs share: the weights under the checkpoint's names."""

    def __init__(self, config: GPT2Config, weights: Weights, opset: int, lm_head: bool, with_past: bool) -> None:
        self.config = config
        self.weights = weights
        self.graph = Graph(opset)
        self.lm_head = lm_head
        self.with_past = with_past
        self.prefix = "transformer." if lm_head else ""  # as in the checkpoint: the LM model holds the other one
        self.scope = "/transformer" if lm_head else ""

    def weight(self, name: str, transposed: bool = False) -> str:
        """An initializer with a weight."""
        shape = tuple(self.weights[name].shape)
        out = name if name.startswith("lm_head.") else self.prefix + name
        if transposed:
            out, shape = "lm_head.weight_transposed", shape[::-1]
        return self.initializer(out, np.float32, shape, lambda: _blocks(self.weights[name], transposed))

    def initializer(self, name: str, dtype: Any, shape: tuple[int, ...], blocks: Callable[[], Iterator[Array]]) -> str:
        self.graph.initializers[name] = Initializer(name, np.dtype(dtype), shape, blocks)
        return name

    def build(self) -> Graph:
        raise NotImplementedError

    def value(self, name: str, dtype: Any, shape: list[int | str]) -> onnx.ValueInfoProto:
        from onnx import helper

        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    def activation(self, scope: str, x: str, layer: int) -> str:
        """(..., F) -> (..., F), in the pieces that PyTorch's exporter makes of it."""
        g, form = self.graph, ACTIVATIONS[self.config.layer_activation(layer)]
        if g.opset >= 20 and form.onnx_gelu:
            return str(g.op(scope, "Gelu", x, approximate=form.onnx_gelu))

        def op(op_type: str, *inputs: str | float) -> str:
            named = (i if isinstance(i, str) else g.constant(scope, i, np.float32) for i in inputs)
            return str(g.op(scope, op_type, *named))

        return form.onnx(op, x)

    def scaled(self, scope: str, scores: str, layer: int) -> str:
        """q·k times the scale, written as a division by sqrt(D) where it is that."""
        scale = self.config.layer_scale(layer)
        root = math.sqrt(self.config.head_size)
        if scale == 1:
            return scores
        if math.isclose(scale * root, 1, rel_tol=1e-6):
            return str(self.graph.op(scope, "Div", scores, self.graph.constant(scope, root, np.float32)))
        return str(self.graph.op(scope, "Mul", scores, self.graph.constant(scope, scale, np.float32)))

    def head(self, hidden: str, table: str, output: str) -> None:
        """logits = hidden @ table (+ bias)."""
        biased = "lm_head.bias" in self.weights
        logits = self.graph.op("/lm_head", "MatMul", hidden, table, output="" if biased else output)
        if biased:
            self.graph.op("/lm_head", "Add", logits, self.weight("lm_head.bias"), output=output)


class _Zoo(_Builder):
    """The graph of gpt2-10.onnx (hidden states) and gpt2-lm-head-10.onnx, operation by operation."""

    def build(self) -> Graph:
        g, c, top = self.graph, self.config, self.scope
        C, H, D = c.n_embd, c.n_head, c.head_size
        if not math.isfinite(c.mask.value):
            raise UnsupportedModelError("the zoo's graph multiplies with mask.value, which must therefore be finite")
        axes: list[int | str] = [f"input1_dynamic_axes_{i}" for i in (1, 2, 3)]
        g.inputs.append(self.value("input1", np.int64, axes))
        g.outputs.append(self.value("output1", np.float32, [*axes, c.vocab_size if self.lm_head else C]))

        dims = [g.dim(top, "input1", axis) for axis in range(3)]
        flat = [g.concat(top, g.constant(top, [-1]), g.unsqueeze(top, dims[2], 0)) for _ in range(2)]
        ids = g.op(top, "Reshape", "input1", flat[0])  # (d1, d2, T) -> (B, T)
        x = g.op(top, "Add", self.gather("wte", ids), self.gather("wpe", self.positions(dims[2], flat[1])))
        width = g.dim(top, x, 2)
        for i in range(c.n_layer):
            x = self.block(i, x, f"{top}/h.{i}")
            present: list[int | str] = [2, *(f"output{i + 2}_dim_{axis}" for axis in (1, 2, 3, 4))]
            present[2], present[4] = H, D
            g.outputs.append(self.value(f"output{i + 2}", np.float32, present))
        x = self.layer_norm(x, "ln_f", f"{top}/ln_f")
        shape = g.concat(top, *(g.unsqueeze(top, dim, 0) for dim in (*dims, width)))
        x = g.op(top, "Reshape", x, shape, output="" if self.lm_head else "output1")  # (B, T, C) -> (d1, d2, T, C)
        if self.lm_head:  # PyTorch's exporter folds the transposition, and so stores the tied matrix again, as (C, V)
            self.head(x, self.weight("wte.weight" if c.tied else "lm_head.weight", transposed=True), "output1")
        return g

    def gather(self, name: str, ids: str) -> str:
        return str(self.graph.op(f"{self.scope}/{name}", "Gather", self.weight(f"{name}.weight"), ids))

    def positions(self, length: str, shape: str) -> str:
        """0 .. T - 1 as (1, T), by the detour that PyTorch's exporter takes for arange at opset 10."""
        g, top = self.graph, self.scope
        past = g.constant(top, [0])
        first = g.constant(top, [self.config.position_offset]) if self.config.position_offset else past
        count = g.op(top, "Sub", g.unsqueeze(top, g.op(top, "Cast", length, to=7), 0), past)
        ones = g.op(top, "ConstantOfShape", count, value=_int64_one())
        steps = g.op(top, "Transpose", g.op(top, "NonZero", ones), perm=[1, 0])
        if g.opset < 13:
            steps = g.op(top, "Squeeze", steps, axes=[1])
        else:
            steps = g.op(top, "Squeeze", steps, g.constant(top, [1]))
        steps = g.op(top, "Cast", g.op(top, "Add", steps, first), to=7)
        return str(g.op(top, "Reshape", g.unsqueeze(top, steps, 0), shape))

    def layer_norm(self, x: str, name: str, scope: str) -> str:
        g = self.graph
        centred = g.op(scope, "Sub", x, g.op(scope, "ReduceMean", x, axes=[-1]))
        square = g.op(scope, "Pow", centred, g.constant(scope, 2, np.float32))
        variance = g.op(scope, "ReduceMean", square, axes=[-1])
        epsilon = g.constant(scope, self.config.epsilon(name), np.float32)
        root = g.op(scope, "Sqrt", g.op(scope, "Add", variance, epsilon))
        scaled = g.op(scope, "Mul", g.op(scope, "Div", centred, root), self.weight(f"{name}.weight"))
        return str(g.op(scope, "Add", scaled, self.weight(f"{name}.bias")))

    def linear(self, x: str, name: str, scope: str) -> str:
        """Conv1D of transformers: (B, T, inputs) -> (B * T, inputs) -> Gemm -> (B, T, outputs)."""
        g = self.graph
        batch, length, inputs = (g.dim(scope, x, axis) for axis in range(3))
        rows = g.op(scope, "Reshape", x, g.concat(scope, g.constant(scope, [-1]), g.unsqueeze(scope, inputs, 0)))
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        y = g.op(scope, "Gemm", rows, weight, bias, alpha=1.0, beta=1.0)
        outputs = g.constant(scope, list(self.weights[f"{name}.bias"].shape))
        shape = g.concat(scope, g.unsqueeze(scope, batch, 0), g.unsqueeze(scope, length, 0), outputs)
        return str(g.op(scope, "Reshape", y, shape))

    def heads(self, x: str, perm: list[int], scope: str) -> tuple[str, str]:
        """(B, T, HD) -> (B, T, H, D), and the same transposed."""
        g = self.graph
        H = self.config.n_head
        batch, length, width = (g.dim(scope, x, axis) for axis in range(3))
        size = g.op(scope, "Div", width, g.constant(scope, H))
        size = g.op(scope, "Cast", g.op(scope, "Cast", size, to=7), to=7)
        start = [g.unsqueeze(scope, batch, 0), g.unsqueeze(scope, length, 0), g.constant(scope, [H])]
        x = g.op(scope, "Reshape", x, g.concat(scope, *start, g.unsqueeze(scope, size, 0)))
        return x, str(g.op(scope, "Transpose", x, perm=perm))

    def mask(self, i: int, scores: str, scope: str) -> str:
        """Scores (B, H, T, S) with the future masked by the buffer attn.bias (1, 1, N, N)."""
        g, N = self.graph, self.config.n_ctx
        dtype = np.uint8 if self.lm_head else np.float32
        allowed = self.initializer(
            f"{self.prefix}h.{i}.attn.bias",
            dtype,
            (1, 1, N, N),
            lambda: iter([np.tri(N, N, self.config.mask.shift, dtype)]),
        )
        rows, columns = g.dim(scope, scores, 2), g.dim(scope, scores, 3)
        first = g.op(scope, "Sub", columns, rows)
        axis = g.constant(scope, [2])
        bounds = g.unsqueeze(scope, first, 0), g.unsqueeze(scope, columns, 0)
        allowed = g.op(scope, "Slice", allowed, *bounds, axis, g.constant(scope, [1]))
        axis, start = g.constant(scope, [3]), g.constant(scope, [0])
        end = g.unsqueeze(scope, columns, 0)
        allowed = g.op(scope, "Slice", allowed, start, end, axis, g.constant(scope, [1]))
        if self.lm_head:
            value = g.constant(scope, self.config.mask.value, np.float32)
            return str(g.op(scope, "Where", g.op(scope, "Cast", allowed, to=9), scores, value))
        kept = g.op(scope, "Mul", scores, allowed)
        forbidden = g.op(scope, "Sub", g.constant(scope, 1, np.float32), allowed)
        penalty = g.op(scope, "Mul", forbidden, g.constant(scope, -self.config.mask.value, np.float32))
        return str(g.op(scope, "Sub", kept, penalty))

    def attention(self, i: int, x: str, scope: str) -> str:
        g = self.graph
        HD = self.config.n_head * self.config.head_size
        x = self.linear(x, f"h.{i}.attn.c_attn", f"{scope}/c_attn")
        parts = g.split(scope, x, [HD] * 3, axis=2)
        _, q = self.heads(parts[0], [0, 2, 1, 3], scope)  # (B, H, T, D)
        k, k_transposed = self.heads(parts[1], [0, 2, 3, 1], scope)  # (B, H, D, T)
        _, v = self.heads(parts[2], [0, 2, 1, 3], scope)
        k = g.op(scope, "Transpose", k, perm=[0, 2, 1, 3])
        present = g.unsqueeze(scope, k, 0), g.unsqueeze(scope, v, 0)
        g.op(scope, "Concat", *present, axis=0, output=f"output{i + 2}")
        scores = self.scaled(scope, g.op(scope, "MatMul", q, k_transposed), i)
        probs = g.op(scope, "Softmax", self.mask(i, scores, scope), axis=3)
        x = g.op(scope, "Transpose", g.op(scope, "MatMul", probs, v), perm=[0, 2, 1, 3])
        batch, length, head, size = (g.dim(scope, x, axis) for axis in range(4))
        width = g.op(scope, "Mul", head, size)
        x = g.op(scope, "Reshape", x, g.concat(scope, *(g.unsqueeze(scope, d, 0) for d in (batch, length, width))))
        return self.linear(x, f"h.{i}.attn.c_proj", f"{scope}/c_proj")

    def block(self, i: int, x: str, scope: str) -> str:
        g = self.graph
        normed = self.layer_norm(x, f"h.{i}.ln_1", f"{scope}/ln_1")
        x = g.op(scope, "Add", x, self.attention(i, normed, f"{scope}/attn"))
        normed = self.layer_norm(x, f"h.{i}.ln_2", f"{scope}/ln_2")
        hidden = self.linear(normed, f"h.{i}.mlp.c_fc", f"{scope}/mlp/c_fc")
        hidden = self.activation(f"{scope}/mlp", hidden, i)
        return str(g.op(scope, "Add", x, self.linear(hidden, f"h.{i}.mlp.c_proj", f"{scope}/mlp/c_proj")))


class _Modern(_Builder):
    """LayerNormalization, an attention_mask, position_ids and, if wanted, keys and values of the past."""

    def build(self) -> Graph:
        g, c, top = self.graph, self.config, self.scope
        past, total = "past_sequence_length", "past_sequence_length + sequence_length"
        ids: list[int | str] = ["batch_size", "sequence_length"]
        if not self.with_past:
            total = "sequence_length"
        g.inputs.append(self.value("input_ids", np.int64, ids))
        g.inputs.append(self.value("attention_mask", np.int64, ["batch_size", total]))
        g.inputs.append(self.value("position_ids", np.int64, ids))
        output = "logits" if self.lm_head else "last_hidden_state"
        g.outputs.append(self.value(output, np.float32, [*ids, c.vocab_size if self.lm_head else c.n_embd]))
        if self.with_past:
            for i in range(c.n_layer):
                for part in ("key", "value"):
                    name, H, D = f"past_key_values.{i}.{part}", c.n_head, c.head_size
                    g.inputs.append(self.value(name, np.float32, ["batch_size", H, past, D]))
                    g.outputs.append(self.value(f"present.{i}.{part}", np.float32, ["batch_size", H, total, D]))

        positions = "position_ids"
        if c.position_offset:
            positions = g.op(top, "Add", positions, g.constant(top, c.position_offset))
        wte = self.weight("wte.weight")
        vectors = g.op(f"{top}/wte", "Gather", wte, "input_ids")
        x = g.op(top, "Add", vectors, g.op(f"{top}/wpe", "Gather", self.weight("wpe.weight"), positions))
        mask = self.mask(top)
        for i in range(c.n_layer):
            x = self.block(i, x, mask, f"{top}/h.{i}")
        x = self.layer_norm(x, "ln_f", f"{top}/ln_f", output="" if self.lm_head else output)
        if self.lm_head:
            table = wte if c.tied else self.weight("lm_head.weight")
            self.head(x, g.op("/lm_head", "Transpose", table, perm=[1, 0]), output)
        return g

    def mask(self, scope: str) -> str:
        """(B, 1, T, S), to be added to the scores: 0 where a key is neither in the future nor padding."""
        g = self.graph
        length, total = g.dim(scope, "input_ids", 1), g.dim(scope, "attention_mask", 1)
        zero, one = g.constant(scope, 0), g.constant(scope, 1)
        first = g.op(scope, "Sub", total, length)
        queries = g.op(scope, "Range", first, total, one)  # (T,) places in the whole sequence
        keys = g.op(scope, "Range", zero, total, one)  # (S,)
        if self.config.mask.shift:
            queries = g.op(scope, "Add", queries, g.constant(scope, self.config.mask.shift))
        causal = g.op(scope, "LessOrEqual", g.unsqueeze(scope, keys, 0), g.unsqueeze(scope, queries, 1))  # (T, S)
        real = g.op(scope, "Cast", "attention_mask", to=9)
        real = g.unsqueeze(scope, g.unsqueeze(scope, real, 1), 1)  # (B, S) -> (B, 1, 1, S)
        allowed = g.op(scope, "And", causal, real)
        values = (g.constant(scope, value, np.float32) for value in (0, self.config.mask.value))
        return str(g.op(scope, "Where", allowed, *values))

    def layer_norm(self, x: str, name: str, scope: str, output: str = "") -> str:
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        epsilon = self.config.epsilon(name)
        return str(self.graph.op(scope, "LayerNormalization", x, weight, bias, axis=-1, epsilon=epsilon, output=output))

    def linear(self, x: str, name: str, scope: str) -> str:
        y = self.graph.op(scope, "MatMul", x, self.weight(f"{name}.weight"))
        return str(self.graph.op(scope, "Add", y, self.weight(f"{name}.bias")))

    def attention(self, i: int, x: str, mask: str, scope: str) -> str:
        g = self.graph
        H, D = self.config.n_head, self.config.head_size
        qkv = g.split(scope, self.linear(x, f"h.{i}.attn.c_attn", f"{scope}/c_attn"), [H * D] * 3, axis=-1)
        shape = g.constant(scope, [0, 0, H, D])  # 0: as in the input
        q, k, v = (g.op(scope, "Transpose", g.op(scope, "Reshape", p, shape), perm=[0, 2, 1, 3]) for p in qkv)
        if self.with_past:
            k = g.op(scope, "Concat", f"past_key_values.{i}.key", k, axis=2, output=f"present.{i}.key")
            v = g.op(scope, "Concat", f"past_key_values.{i}.value", v, axis=2, output=f"present.{i}.value")
        scores = g.op(scope, "MatMul", q, g.op(scope, "Transpose", k, perm=[0, 1, 3, 2]))
        probs = g.op(scope, "Softmax", g.op(scope, "Add", self.scaled(scope, scores, i), mask), axis=-1)
        heads = g.op(scope, "Transpose", g.op(scope, "MatMul", probs, v), perm=[0, 2, 1, 3])
        heads = g.op(scope, "Reshape", heads, g.constant(scope, [0, 0, H * D]))
        return self.linear(heads, f"h.{i}.attn.c_proj", f"{scope}/c_proj")

    def block(self, i: int, x: str, mask: str, scope: str) -> str:
        g = self.graph
        normed = self.layer_norm(x, f"h.{i}.ln_1", f"{scope}/ln_1")
        x = g.op(scope, "Add", x, self.attention(i, normed, mask, f"{scope}/attn"))
        normed = self.layer_norm(x, f"h.{i}.ln_2", f"{scope}/ln_2")
        hidden = self.linear(normed, f"h.{i}.mlp.c_fc", f"{scope}/mlp/c_fc")
        hidden = self.activation(f"{scope}/mlp", hidden, i)
        return str(g.op(scope, "Add", x, self.linear(hidden, f"h.{i}.mlp.c_proj", f"{scope}/mlp/c_proj")))


def _int64_one() -> onnx.TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array([1], np.int64))


# --- the file ------------------------------------------------------------------------------------------------


def _blocks(weight: Array | WeightSource, transposed: bool) -> Iterator[Array]:
    """A weight in float32 and C order, a block of rows at a time."""
    array = weight if isinstance(weight, np.ndarray) else weight.load()
    array = array.T if transposed else array
    rows = max(1, BLOCK // max(1, 4 * math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows], np.float32)


def _write_blocks(file: BinaryIO, initializer: Initializer) -> None:
    for block in initializer.blocks():
        file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data)


def _write_external(target: Path, graph: Graph, max_file_size: int | None) -> dict[str, tuple[str, int]]:
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


def _write_model_proto(file: BinaryIO, graph: Graph, tensors: list[bytes], raw: bool) -> None:
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
