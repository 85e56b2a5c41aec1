"""A small NumPy interpreter for the parts of a graph that surround the weights.

Exporters spell a mask, the rows of wpe, a head split or a GELU in endless ways, but all of them compute the same
few functions. So those parts are not matched node by node: they are run, on inputs chosen so that the result
tells which function it is. Only operators that appear there are listed; the meaning of each is that of
https://onnx.ai/onnx/operators/ and, for com.microsoft,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UnsupportedModelError
from . import integers, mlas
from .dequantize import UNPACK
from .expand import MASKED

if TYPE_CHECKING:
    from .graph import Graph, Node

Array = np.ndarray
Operator = Callable[["Node", Sequence[Any], int], Any]  # (node, inputs, opset) -> array or list of arrays


class Evaluator:
    """Values of a graph, computed on demand from values that are given.

    Parameters
    ----------
    graph : Graph
    feeds : mapping of value name to array
        Taken as they are, whatever node would compute them: not only the graph's inputs.
    read : set, optional
        Collects the names of the constants that were needed.

    Floats given as float64 stay float64 through Cast nodes, so that what is probed is the function itself and
    not the rounding of the file's float type.
    """

    def __init__(self, graph: Graph, feeds: Mapping[str, Array], read: set[str] | None = None) -> None:
        self.graph = graph
        self.values: dict[str, Any] = dict(feeds)
        self.read = set() if read is None else read
        self.operators = literal_operators(graph.literal == "saturating") if graph.literal else OPERATORS
        self.float16, self.float16_nodes = graph.float16

    def __call__(self, name: str) -> Array:
        """The value of that name.

        Raises
        ------
        UnsupportedModelError
            If it needs an operator that is not listed here, an input that was not given, or a node fails.
        """
        stack = [name]
        while stack:  # depth first without recursion: graphs are thousands of nodes deep
            current = stack[-1]
            if current in self.values:
                stack.pop()
                continue
            if current in self.graph.constants:
                self.values[current] = self.graph.constant(current)
                self.read.add(current)
                stack.pop()
                continue
            node = self.graph.producer(current)
            if node is None:
                raise UnsupportedModelError(f"the value {current!r} is neither computed by a node nor given")
            missing = [i for i in node.inputs if i and i not in self.values]
            if missing:
                stack.extend(missing)
                continue
            self._run(node)
            stack.pop()
        value: Array = self.values[name]
        return value

    def _run(self, node: Node) -> None:
        operator = self.operators.get(node.op)
        if node.outputs[0] in self.float16 and node.attributes.get("written_as", node.op) == node.op:
            operator = FLOAT16_FUNCTIONS.get(node.op, operator)
        if operator is None:
            raise UnsupportedModelError(f"{node.describe()}: gpt2np does not know what {node.op} means here")
        inputs = [self.values[i] if i else None for i in node.inputs]
        try:
            if self.graph.literal:
                inputs = [_single(self._rounded(node, name, v)) for name, v in zip(node.inputs, inputs, strict=True)]
            with np.errstate(all="ignore"):
                result = operator(node, inputs, self.graph.opset(node.domain))
        except UnsupportedModelError:
            raise
        except Exception as error:
            shapes = ", ".join("-" if i is None else f"{i.dtype}{list(i.shape)}" for i in inputs)
            raise UnsupportedModelError(f"{node.describe()} cannot be evaluated on {shapes}: {error}") from error
        outputs = result if isinstance(result, list) else [result]
        for output, value in zip(node.outputs, outputs, strict=False):
            if not isinstance(value, tuple):  # a sequence of arrays
                value = self._rounded(node, output, np.asarray(value))
            self.values[output] = value

    def _rounded(self, node: Node, name: str, value: Any) -> Any:
        """What a node that runs in float16 takes or gives.

        Between the pieces of one that was taken apart nothing is rounded, except that ONNX's own Attention rounds
        each step: scores once they are scaled.
        """
        inside = name in self.graph.invented
        if inside and node.attributes.get("written_as") == "Attention":
            inside = any(c.op in ("Mul", "Div") for c in self.graph.consumers(name))
        if id(node) in self.float16_nodes and not inside and _is(value, np.float32):
            return value.astype(np.float16)
        return value


def _is(value: Any, dtype: type) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype


def _single(value: Any) -> Any:
    """float16 is computed in float32."""
    return value.astype(np.float32) if _is(value, np.float16) else value


def _ints(value: Any) -> list[int]:
    return [int(v) for v in np.asarray(value).reshape(-1)]


def _optional(inputs: Sequence[Any], index: int) -> Any:
    return inputs[index] if index < len(inputs) else None


def _axes(node: Node, inputs: Sequence[Any], index: int = 1) -> tuple[int, ...] | None:
    """Axes from the attribute (older opsets) or from an input (newer)."""
    given = _optional(inputs, index)
    axes = node.attributes.get("axes") if given is None else _ints(given)
    return None if axes is None or len(axes) == 0 else tuple(axes)


def is_float(array: Array) -> bool:
    """Of any floating-point type, ml_dtypes' bfloat16 and float8 included."""
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))


def _cast(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    import onnx

    to = onnx.helper.tensor_dtype_to_np_dtype(node.attributes["to"])
    return _as(inputs[0], to)


def _cast_unrounded(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    """`graph.float16` says which nodes round."""
    import onnx

    half = node.attributes["to"] == onnx.TensorProto.FLOAT16
    return np.asarray(inputs[0].astype(np.float32) if half else _cast(node, inputs, opset))


def _as(x: Array, to: np.dtype[Any]) -> Array:
    if x.dtype == np.float64 and is_float(np.empty(0, to)):
        return x
    return x.astype(to)


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":  # towards zero, as in C
        quotient = np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)
        return np.asarray(quotient, np.result_type(a, b))
    return np.asarray(a / b)


def _reshape(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x = inputs[0]
    shape = _ints(inputs[1]) if len(inputs) > 1 else list(node.attributes["shape"])
    if not node.attributes.get("allowzero", 0):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return np.asarray(x.reshape(shape))


def _flatten(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x, axis = inputs[0], node.attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return np.asarray(x.reshape(math.prod(x.shape[:axis]), -1))


def _unsqueeze(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    return np.expand_dims(inputs[0], _axes(node, inputs) or ())


def _slice(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x = inputs[0]
    if len(inputs) > 1:
        starts, ends = _ints(inputs[1]), _ints(inputs[2])
        axes_in, steps_in = _optional(inputs, 3), _optional(inputs, 4)
        axes = list(range(len(starts))) if axes_in is None else _ints(axes_in)
        steps = [1] * len(starts) if steps_in is None else _ints(steps_in)
    else:
        starts, ends = list(node.attributes["starts"]), list(node.attributes["ends"])
        axes = list(node.attributes.get("axes", range(len(starts))))
        steps = [1] * len(starts)
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        # a negative end below -size means "to the very beginning" when stepping backwards
        cut[axis] = slice(start, None if step < 0 and end < -size else end, step)
    return np.asarray(x[tuple(cut)])


def _split(node: Node, inputs: Sequence[Any], opset: int) -> list[Array]:
    x, axis = inputs[0], node.attributes.get("axis", 0)
    given = _optional(inputs, 1)
    sizes = node.attributes.get("split") if given is None else _ints(given)
    if sizes is None:
        parts = node.attributes.get("num_outputs", len(node.outputs))
        size = -(-x.shape[axis] // parts)
        sizes = [size] * (parts - 1) + [x.shape[axis] - size * (parts - 1)]
    if sum(sizes) != x.shape[axis]:
        raise ValueError(f"split {list(sizes)} of an axis of {x.shape[axis]}")
    return list(np.split(x, np.cumsum(sizes)[:-1], axis))


def _split_sizes(node: Node, inputs: Sequence[Any]) -> list[Any]:
    """One size given once means parts of that size, the last perhaps smaller."""
    x, size = inputs[0], _optional(inputs, 1)
    if size is None or size.ndim:
        return list(inputs)
    whole, rest = divmod(x.shape[node.attributes.get("axis", 0)], int(size))
    return [x, np.array([int(size)] * whole + [rest] * bool(rest))]


def _range(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    start, limit, delta = inputs
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _constant_of_shape(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    value = node.attributes.get("value", np.zeros(1, np.float32))
    return np.full(_ints(inputs[0]), value.reshape(-1)[0])


def _expand(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    return np.broadcast_to(inputs[0], np.broadcast_shapes(inputs[0].shape, tuple(_ints(inputs[1]))))


def _shape(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    shape = np.array(inputs[0].shape, np.int64)
    return shape[node.attributes.get("start", 0) : node.attributes.get("end", len(shape))]


def _gather_nd(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x, indices = inputs
    if node.attributes.get("batch_dims", 0):
        raise ValueError("batch_dims")
    return np.asarray(x[tuple(np.moveaxis(indices, -1, 0))])


def _scatter_nd(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x, indices, updates = inputs
    out = np.array(x)
    out[tuple(np.moveaxis(indices, -1, 0))] = updates
    return out


def _cumsum(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x, axis = inputs[0], _ints(inputs[1])[0]
    if node.attributes.get("reverse", 0):
        x = np.flip(x, axis)
    out = np.cumsum(x, axis, dtype=x.dtype)
    if node.attributes.get("exclusive", 0):
        out = out - x
    return np.flip(out, axis) if node.attributes.get("reverse", 0) else out


def _trilu(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    given = _optional(inputs, 1)
    k = 0 if given is None else _ints(given)[0]
    return (np.triu if node.attributes.get("upper", 1) else np.tril)(inputs[0], k)


def _eye_like(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    rows, columns = inputs[0].shape
    return np.eye(rows, columns, node.attributes.get("k", 0), inputs[0].dtype)


def _clip(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    low = node.attributes.get("min") if len(inputs) < 2 else inputs[1]
    high = node.attributes.get("max") if len(inputs) < 3 else inputs[2]
    out = inputs[0] if low is None else np.maximum(inputs[0], low)
    return np.asarray(out if high is None else np.minimum(out, high))


def _reduce(function: Callable[..., Any]) -> Operator:
    def run(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        axes = _axes(node, inputs)
        if axes is None and node.attributes.get("noop_with_empty_axes", 0):
            return np.asarray(inputs[0])
        return np.asarray(function(inputs[0], axis=axes, keepdims=bool(node.attributes.get("keepdims", 1))))

    return run


def _softmax(over_last_axis: Callable[[Array], Array]) -> Operator:
    def run(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        x, axis = inputs[0], node.attributes.get("axis", 1 if opset < 13 else -1)
        axis = axis + x.ndim if axis < 0 else axis
        if opset < 13:  # flattened from `axis` on
            return over_last_axis(x.reshape(*x.shape[:axis], -1)).reshape(x.shape)
        return np.moveaxis(over_last_axis(np.moveaxis(x, axis, -1)), -1, axis)

    return run


def _plain_softmax(x: Array) -> Array:
    exps = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(exps / exps.sum(-1, keepdims=True))


def _mean_of_last_axis(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    last = inputs[0].ndim - 1
    if _axes(node, inputs) in ((-1,), (last,)) and node.attributes.get("keepdims", 1):
        return mlas.mean(inputs[0])
    return np.asarray(_reduce(np.mean)(node, inputs, opset))


def _dequantize(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    return integers.dequantize(inputs[0], inputs[1], _optional(inputs, 2), axis, block)


# What the 16 values of bitsandbytes' 4-bit types stand for, as fractions of a block's largest element: FP4, NF4
# (onnxruntime/contrib_ops/cpu/quantization/blockwise_quant_block_bnb4.h)
BNB4 = (
    (
        0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
        -0.0, -5.208333333e-03, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
    ),
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip


def _unpack_bits(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    """com.microsoft.MatMulNBits' weights (K, N), or GatherBlockQuantized's table (N, K): blocks along K.

    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    """
    packed, scales, zeros = inputs[0], inputs[1], _optional(inputs, 2)
    K, N, block = (int(node.attributes[k]) for k in ("K", "N", "block_size"))
    if "quant_type" in node.attributes:  # MatMulBnb4: blocks go on from row to row; the first of a pair is the high one
        pairs = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: N * K]
        levels = np.array(BNB4[node.attributes["quant_type"]], np.float32)
        spread = scales.astype(np.float32).reshape(-1)[np.arange(N * K) // block]
        return np.asarray((levels[pairs] * spread).reshape(N, K).T)
    bits = int(node.attributes["bits"])
    of_block = np.arange(K) // block

    def unpacked(array: Array) -> Array:
        """(N, more or less) integers from whole numbers or from `bits` bits each, the lowest first; rows are padded."""
        array = array.reshape(N, -1)
        if array.dtype.name in ("int4", "uint4", "int2", "uint2"):
            return array.astype(np.int16)
        if bits == 8 or not array.dtype.name.startswith(("uint8", "int8")):
            return array
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((array.view(np.uint8)[:, :, None] >> shifts) & (2**bits - 1)).reshape(N, -1)

    table = unpacked(packed)[:, :K].astype(np.float32)
    if zeros is not None:
        table -= unpacked(zeros).astype(np.float32)[:, of_block]
    elif packed.dtype.name not in ("int4", "int8"):
        table -= np.float32(2 ** (bits - 1))
    table *= scales.astype(np.float32).reshape(N, -1)[:, of_block]
    return np.asarray(table if node.attributes.get("rows_first", 0) else table.T)


def _masked_scores(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    """Scores, mask and bias of a fused attention, as ONNX Runtime's CPU kernels combine them."""
    scores, mask, bias = inputs[0], _optional(inputs, 1), _optional(inputs, 2)
    T, S = scores.shape[-2:]
    low = node.attributes["filter"]
    added = np.zeros(scores.shape[-2:], np.float64)
    if mask is not None:
        if mask.ndim == 1:
            raise ValueError("a mask of lengths")
        keep = (
            mask[:, None, None, :]
            if mask.ndim == 2
            else (mask[:, None] if mask.ndim == 3 else mask[..., S - T : S, :S])
        )
        added = added + np.where(keep > 0, 0.0, low)
    if bias is not None:
        added = added + (np.where(bias, 0.0, low) if bias.dtype == bool else bias)
    if node.attributes["causal"]:
        later = np.arange(S) > np.arange(S - T, S)[:, None]
        added = np.where(later, np.finfo(np.float32).min if np.isfinite(low) else low, added)
    return np.asarray(scores + added)


def _erf(x: Array) -> Array:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x)).astype(x.dtype)


def _gelu_erf(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + _erf(x * math.sqrt(0.5))))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    return (_gelu_tanh if node.attributes.get("approximate", "none") == "tanh" else _gelu_erf)(inputs[0])


def _biased(function: Callable[[Array], Array]) -> Operator:
    def run(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        bias = _optional(inputs, 1)
        return function(inputs[0] if bias is None else inputs[0] + bias)

    return run


def _quick_gelu(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    return np.asarray(inputs[0] * _sigmoid(node.attributes.get("alpha", 1.702) * inputs[0]))


def _layer_normalization(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x = inputs[0]
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + node.attributes.get("epsilon", 1e-5)) * inputs[1]
    bias = _optional(inputs, 2)
    return np.asarray(scaled if bias is None else scaled + bias)


def _rms_normalization(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x = inputs[0]
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + node.attributes.get("epsilon", 1e-5)) * inputs[1])


def _gemm(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    a = inputs[0].T if node.attributes.get("transA", 0) else inputs[0]
    b = inputs[1].T if node.attributes.get("transB", 0) else inputs[1]
    c = _optional(inputs, 2)
    out = node.attributes.get("alpha", 1.0) * (a @ b)
    return np.asarray(out if c is None else out + node.attributes.get("beta", 1.0) * c)


def _one(function: Callable[[Any], Any]) -> Operator:
    return lambda node, inputs, opset: np.asarray(function(inputs[0]))


def _two(function: Callable[[Any, Any], Any]) -> Operator:
    return lambda node, inputs, opset: np.asarray(function(inputs[0], inputs[1]))


def _fold(function: Callable[[Any, Any], Any]) -> Operator:
    def run(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        out = inputs[0]
        for other in inputs[1:]:
            out = function(out, other)
        return np.asarray(out)

    return run


OPERATORS: dict[str, Operator] = {
    # moving data
    "Identity": _one(lambda x: x),
    "Dropout": _one(lambda x: x),  # does nothing in inference
    "Cast": _cast,
    "CastLike": lambda node, inputs, opset: _as(inputs[0], inputs[1].dtype),
    "Shape": _shape,
    "Size": lambda node, inputs, opset: np.asarray(inputs[0].size, np.int64),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": lambda node, inputs, opset: np.squeeze(inputs[0], _axes(node, inputs)),
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda node, inputs, opset: np.transpose(inputs[0], node.attributes.get("perm")),
    "Concat": lambda node, inputs, opset: np.concatenate(list(inputs), node.attributes["axis"]),
    "Split": _split,
    "SplitToSequence": lambda node, inputs, opset: tuple(_split(node, _split_sizes(node, inputs), opset)),
    "SequenceAt": _two(lambda sequence, index: sequence[int(index)]),
    "Slice": _slice,
    "Gather": lambda node, inputs, opset: np.take(inputs[0], inputs[1], node.attributes.get("axis", 0)),
    "GatherND": _gather_nd,
    "GatherElements": lambda node, inputs, opset: np.take_along_axis(
        inputs[0], inputs[1], node.attributes.get("axis", 0)
    ),
    "ScatterND": _scatter_nd,
    "Expand": _expand,
    "Tile": _two(lambda x, repeats: np.tile(x, _ints(repeats))),
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "EyeLike": _eye_like,
    "Trilu": _trilu,
    "NonZero": _one(lambda x: np.array(np.nonzero(x), np.int64)),
    "CumSum": _cumsum,
    # arithmetic
    "Add": _two(np.add),
    "Sub": _two(np.subtract),
    "Mul": _two(np.multiply),
    "Div": _two(_divide),
    "Mod": lambda node, inputs, opset: (np.fmod if node.attributes.get("fmod", 0) else np.mod)(*inputs),
    "Pow": _two(lambda x, y: np.power(x, y).astype(x.dtype)),
    "Neg": _one(np.negative),
    "Abs": _one(np.abs),
    "Sign": _one(np.sign),
    "Floor": _one(np.floor),
    "Ceil": _one(np.ceil),
    "Round": _one(np.rint),
    "Sqrt": _one(np.sqrt),
    "Reciprocal": _one(lambda x: 1 / x),
    "Exp": _one(np.exp),
    "Log": _one(np.log),
    "Min": _fold(np.minimum),
    "Max": _fold(np.maximum),
    "Sum": _fold(np.add),
    "Mean": lambda node, inputs, opset: sum(inputs) / len(inputs),
    "Clip": _clip,
    "MatMul": _two(np.matmul),
    "Einsum": lambda node, inputs, opset: np.einsum(node.attributes["equation"], *inputs),
    "Gemm": _gemm,
    "DequantizeLinear": _dequantize,
    "com.microsoft.DequantizeLinear": _dequantize,
    **integers.OPERATORS,
    UNPACK: _unpack_bits,
    MASKED: _masked_scores,
    "ReduceMean": _reduce(np.mean),
    "ReduceSum": _reduce(np.sum),
    "ReduceProd": _reduce(np.prod),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceSumSquare": _reduce(lambda x, **how: np.sum(x * x, **how)),
    "ReduceL2": _reduce(lambda x, **how: np.sqrt(np.sum(x * x, **how))),
    # logic
    "Equal": _two(np.equal),
    "Less": _two(np.less),
    "LessOrEqual": _two(np.less_equal),
    "Greater": _two(np.greater),
    "GreaterOrEqual": _two(np.greater_equal),
    "Not": _one(np.logical_not),
    "And": _two(np.logical_and),
    "Or": _two(np.logical_or),
    "Xor": _two(np.logical_xor),
    "BitwiseAnd": _two(np.bitwise_and),
    "BitwiseOr": _two(np.bitwise_or),
    "BitwiseNot": _one(np.bitwise_not),
    "IsNaN": _one(np.isnan),
    "IsInf": _one(np.isinf),
    "Where": lambda node, inputs, opset: np.where(*inputs),
    # activations and normalisations
    "Tanh": _one(np.tanh),
    "Erf": _one(_erf),
    "Sigmoid": _one(_sigmoid),
    "Relu": _one(lambda x: np.maximum(x, 0)),
    "Softmax": _softmax(_plain_softmax),
    "Gelu": _gelu,
    "com.microsoft.Gelu": _one(_gelu_erf),
    "com.microsoft.BiasGelu": _biased(_gelu_erf),
    "com.microsoft.FastGelu": _biased(_gelu_tanh),
    "com.microsoft.QuickGelu": _quick_gelu,
    "LayerNormalization": _layer_normalization,
    "SimplifiedLayerNormalization": _rms_normalization,
    "RMSNormalization": _rms_normalization,
}


def literal_operators(saturating: bool) -> dict[str, Operator]:
    """As ONNX Runtime's kernels for an x86 CPU with AVX-512 and VNNI round, or for one with AVX2 and no more."""
    return {
        **OPERATORS,
        "Cast": _cast_unrounded,
        "Tanh": _one(mlas.tanh),
        "Pow": _two(mlas.power),
        "ReduceMean": _mean_of_last_axis,
        "Softmax": _softmax(partial(mlas.softmax, lanes=8 if saturating else 16)),
        **(integers.SATURATING if saturating else {}),
    }


def _rounded_constant(value: float) -> np.float32:
    return np.float32(np.float16(value))


def _float16_fast_gelu(x: Array) -> Array:
    inner = x * (_rounded_constant(math.sqrt(2 / math.pi)) + _rounded_constant(0.035677408136300125) * (x * x))
    return np.asarray(np.float32(0.5) * (x * (1 + mlas.tanh(inner))))


# In float16 these have no kernels: ONNX Runtime takes them apart, with constants in float16, and runs the pieces in
# float32.
FLOAT16_FUNCTIONS: dict[str, Operator] = {
    "com.microsoft.FastGelu": _biased(_float16_fast_gelu),
    "com.microsoft.Gelu": _one(lambda x: 0.5 * (x * (1 + _erf(_rounded_constant(math.sqrt(0.5)) * x)))),
    "com.microsoft.QuickGelu": lambda node, inputs, opset: (
        inputs[0] * _sigmoid(_rounded_constant(node.attributes.get("alpha", 1.702)) * inputs[0])
    ),
}
