"""A small NumPy interpreter for the parts of a graph that surround the weights.

Exporters spell a mask, the rows of wpe, a head split or a GELU in endless ways, but all of them compute the same
few functions. So those parts are not matched node by node: they are run, on inputs chosen so that the result
tells which function it is. Only operators that appear there are listed; the meaning of each is that of
https://onnx.ai/onnx/operators/ and, for com.microsoft,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..graph import MASKED, UNPACK, Node
from .packed import dequantize, steps, unpack_bits

Array = np.ndarray
Operator = Callable[[Node, Sequence[Any], int], Any]  # (node, inputs, opset) -> array or list of arrays


def _ints(value: Any) -> list[int]:
    return [int(v) for v in np.asarray(value).reshape(-1)]


def _optional(inputs: Sequence[Any], index: int) -> Any:
    return inputs[index] if index < len(inputs) else None


def axes(node: Node, inputs: Sequence[Any], index: int = 1) -> tuple[int, ...] | None:
    """Axes from the attribute (older opsets) or from an input (newer)."""
    given = inputs[index] if index < len(inputs) else None
    axes = node.attributes.get("axes") if given is None else given.reshape(-1).tolist()
    return None if axes is None or len(axes) == 0 else tuple(axes)


def is_float(array: Array) -> bool:
    """Of any floating-point type, ml_dtypes' bfloat16 and float8 included."""
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))


def cast(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    import onnx

    to = onnx.helper.tensor_dtype_to_np_dtype(node.attributes["to"])
    return _as(inputs[0], to)


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
    shape = inputs[1].reshape(-1).tolist() if len(inputs) > 1 else list(node.attributes["shape"])
    if 0 in shape and not node.attributes.get("allowzero", 0):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    if min(shape, default=0) < -1:  # NumPy takes any negative size for "what is left"; ONNX takes -1 alone
        raise ValueError(f"the sizes {shape}")
    return np.asarray(x.reshape(shape))


def _flatten(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x, axis = inputs[0], node.attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return np.asarray(x.reshape(math.prod(x.shape[:axis]), -1))


def _unsqueeze(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x, new = inputs[0], axes(node, inputs) or ()
    rank = x.ndim + len(new)
    places = set()
    for axis in new:
        if -rank <= axis < rank:
            places.add(axis % rank)
    if len(places) < len(new):
        raise ValueError(f"axes {list(new)} of {rank}")
    sizes = list(x.shape)
    for place in sorted(places):
        sizes.insert(place, 1)
    return np.asarray(x.reshape(sizes))


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


def reduced(function: Callable[..., Any]) -> Operator:
    def run(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        over = axes(node, inputs)
        if over is None and node.attributes.get("noop_with_empty_axes", 0):
            return np.asarray(inputs[0])
        return np.asarray(function(inputs[0], axis=over, keepdims=bool(node.attributes.get("keepdims", 1))))

    return run


def softmax(over_last_axis: Callable[[Array], Array]) -> Operator:
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


def _log_softmax(x: Array) -> Array:
    low = x - x.max(-1, keepdims=True)
    return np.asarray(low - np.log(np.exp(low).sum(-1, keepdims=True)))


def _top_k(node: Node, inputs: Sequence[Any], opset: int) -> list[Array]:
    """The k largest (or smallest) and their indices; of equal ones the first."""
    x, k = inputs[0], int(np.asarray(inputs[1]).reshape(-1)[0])
    axis = node.attributes.get("axis", -1)
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"k = {k} of {x.shape[axis]}")
    key = -x if node.attributes.get("largest", 1) else x
    index = np.take(np.argsort(key, axis, kind="stable"), np.arange(k), axis)
    return [np.take_along_axis(x, index, axis), index.astype(np.int64)]


def _dequantize(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    axis, block = node.attributes.get("axis", 1), node.attributes.get("block_size", 0)
    return dequantize(inputs[0], inputs[1], _optional(inputs, 2), axis, block)


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


def erf(x: Array) -> Array:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x)).astype(x.dtype)


def _gelu_erf(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + erf(x * math.sqrt(0.5))))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _gelu(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    return (_gelu_tanh if node.attributes.get("approximate", "none") == "tanh" else _gelu_erf)(inputs[0])


def biased(function: Callable[[Array], Array]) -> Operator:
    def run(node: Node, inputs: Sequence[Any], opset: int) -> Array:
        bias = _optional(inputs, 1)
        return function(inputs[0] if bias is None else inputs[0] + bias)

    return run


def _quick_gelu(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    return np.asarray(inputs[0] * sigmoid(node.attributes.get("alpha", 1.702) * inputs[0]))


def _layer_normalization(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x = inputs[0]
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + node.attributes.get("epsilon", 1e-5)) * inputs[1]
    bias = _optional(inputs, 2)
    return np.asarray(scaled if bias is None else scaled + bias)


def _rms_normalization(node: Node, inputs: Sequence[Any], opset: int) -> Array:
    x = inputs[0]
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + node.attributes.get("epsilon", 1e-5)) * inputs[1])


def _product_and_sum(a: Array, b: Array, c: Array | None) -> Array:
    return np.asarray(a @ b if c is None else a @ b + c)


def gemm(node: Node, inputs: Sequence[Any], opset: int, product: Callable[..., Array] = _product_and_sum) -> Array:
    a = inputs[0].T if node.attributes.get("transA", 0) else inputs[0]
    b = inputs[1].T if node.attributes.get("transB", 0) else inputs[1]
    c, alpha, beta = _optional(inputs, 2), node.attributes.get("alpha", 1.0), node.attributes.get("beta", 1.0)
    if alpha == 1:
        return product(a, b, c if c is None or beta == 1 else beta * c)
    out = alpha * product(a, b, None)
    return np.asarray(out if c is None else out + beta * c)


def one(function: Callable[[Any], Any]) -> Operator:
    return lambda node, inputs, opset: np.asarray(function(inputs[0]))


def two(function: Callable[[Any, Any], Any]) -> Operator:
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
    "Identity": one(lambda x: x),
    "Dropout": one(lambda x: x),  # does nothing in inference
    "Cast": cast,
    "CastLike": lambda node, inputs, opset: _as(inputs[0], inputs[1].dtype),
    "Shape": _shape,
    "Size": lambda node, inputs, opset: np.asarray(inputs[0].size, np.int64),
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": lambda node, inputs, opset: inputs[0].squeeze(axes(node, inputs)),
    "Unsqueeze": _unsqueeze,
    "Transpose": lambda node, inputs, opset: inputs[0].transpose(node.attributes.get("perm")),
    "Concat": lambda node, inputs, opset: np.concatenate(list(inputs), node.attributes["axis"]),
    "Split": _split,
    "SplitToSequence": lambda node, inputs, opset: tuple(_split(node, _split_sizes(node, inputs), opset)),
    "SequenceAt": two(lambda sequence, index: sequence[int(index)]),
    "Slice": _slice,
    "Gather": lambda node, inputs, opset: np.asarray(inputs[0].take(inputs[1], node.attributes.get("axis", 0))),
    "GatherND": _gather_nd,
    "GatherElements": lambda node, inputs, opset: np.take_along_axis(
        inputs[0], inputs[1], node.attributes.get("axis", 0)
    ),
    "ScatterND": _scatter_nd,
    "Expand": _expand,
    "Tile": two(lambda x, repeats: np.tile(x, _ints(repeats))),
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "EyeLike": _eye_like,
    "Trilu": _trilu,
    "NonZero": one(lambda x: np.array(np.nonzero(x), np.int64)),
    "CumSum": _cumsum,
    # arithmetic
    "Add": two(np.add),
    "Sub": two(np.subtract),
    "Mul": two(np.multiply),
    "Div": two(_divide),
    "Mod": lambda node, inputs, opset: (np.fmod if node.attributes.get("fmod", 0) else np.mod)(*inputs),
    "Pow": two(lambda x, y: np.power(x, y).astype(x.dtype)),
    "Neg": one(np.negative),
    "Abs": one(np.abs),
    "Sign": one(np.sign),
    "Floor": one(np.floor),
    "Ceil": one(np.ceil),
    "Round": one(np.rint),
    "Sqrt": one(np.sqrt),
    "Reciprocal": one(lambda x: 1 / x),
    "Exp": one(np.exp),
    "Log": one(np.log),
    "Min": _fold(np.minimum),
    "Max": _fold(np.maximum),
    "Sum": _fold(np.add),
    "Mean": lambda node, inputs, opset: sum(inputs) / len(inputs),
    "Clip": _clip,
    "MatMul": two(np.matmul),
    "Einsum": lambda node, inputs, opset: np.einsum(node.attributes["equation"], *inputs),
    "Gemm": gemm,
    "DequantizeLinear": _dequantize,
    "com.microsoft.DequantizeLinear": _dequantize,
    UNPACK: unpack_bits,
    MASKED: _masked_scores,
    "ReduceMean": reduced(np.mean),
    "ReduceSum": reduced(np.sum),
    "ReduceProd": reduced(np.prod),
    "ReduceMax": reduced(np.max),
    "ReduceMin": reduced(np.min),
    "ReduceSumSquare": reduced(lambda x, **how: np.sum(x * x, **how)),
    "ReduceL2": reduced(lambda x, **how: np.sqrt(np.sum(x * x, **how))),
    # logic
    "Equal": two(np.equal),
    "Less": two(np.less),
    "LessOrEqual": two(np.less_equal),
    "Greater": two(np.greater),
    "GreaterOrEqual": two(np.greater_equal),
    "Not": one(np.logical_not),
    "And": two(np.logical_and),
    "Or": two(np.logical_or),
    "Xor": two(np.logical_xor),
    "BitwiseAnd": two(np.bitwise_and),
    "BitwiseOr": two(np.bitwise_or),
    "BitwiseNot": one(np.bitwise_not),
    "IsNaN": one(np.isnan),
    "IsInf": one(np.isinf),
    "Where": lambda node, inputs, opset: np.where(*inputs),
    # activations and normalisations
    "Tanh": one(np.tanh),
    "Erf": one(erf),
    "Sigmoid": one(sigmoid),
    "Relu": one(lambda x: np.maximum(x, 0)),
    "Softmax": softmax(_plain_softmax),
    "LogSoftmax": softmax(_log_softmax),
    "TopK": _top_k,
    "Gelu": _gelu,
    "com.microsoft.Gelu": one(_gelu_erf),
    "com.microsoft.BiasGelu": biased(_gelu_erf),
    "com.microsoft.FastGelu": biased(_gelu_tanh),
    "com.microsoft.QuickGelu": _quick_gelu,
    "LayerNormalization": _layer_normalization,
    "SimplifiedLayerNormalization": _rms_normalization,
    "RMSNormalization": _rms_normalization,
}

# What gives the scales of quantised numbers in the place of the numbers.
DEQUANTIZE = ("DequantizeLinear", "com.microsoft.DequantizeLinear", UNPACK)
STEPS = {**OPERATORS, **dict.fromkeys(DEQUANTIZE, steps)}
