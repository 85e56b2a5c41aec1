"""Which operators each role of the ledger admits, and what their attributes and inputs must be.

A check answers why a node is refused, "" if it is admitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..graph import MASKED, Node
from ..normalise.fold import small

if TYPE_CHECKING:
    from .ledger import Ledger

NodeCheck = Callable[["Ledger", Node], str]

FLOAT32, FLOAT16, DOUBLE, BFLOAT16 = 1, 10, 11, 16  # onnx.TensorProto's numbers


def any_(ledger: Ledger, node: Node) -> str:
    """Where what a node computes is found by running it on everything that it can meet."""
    return ""


def _moves_first(ledger: Ledger, node: Node) -> str:
    """The first input is moved; how, only sizes and constants may say."""
    return _only(ledger, node, 0)


def _only(ledger: Ledger, node: Node, index: int) -> str:
    for i, name in enumerate(node.inputs):
        if i != index and ledger.is_data(name):
            if ledger.enter_length(name):
                continue
            return f"its input {name!r} depends on values, not on sizes alone"
    return ""


def _cast(ledger: Ledger, node: Node) -> str:
    to = node.attributes.get("to")
    if to in (FLOAT32, DOUBLE):
        return ""
    if to in (FLOAT16, BFLOAT16):
        return "" if ledger.half else "it rounds to 16 bits in a file whose weights have more"
    return "it makes whole numbers or truth values of floating-point numbers, or rounds them to 8 bits"


def _cast_like(ledger: Ledger, node: Node) -> str:
    like = node.inputs[1]
    dtype = ledger.graph.constants[like].dtype if like in ledger.graph.constants else None
    if dtype is not None and dtype.kind in "iub":
        return f"it makes {dtype} of floating-point numbers"
    return ""


def _dropout(ledger: Ledger, node: Node) -> str:
    """Outside training, or with a ratio of 0, it hands its input on."""
    ratio, training = (small(ledger.graph, node.input(i)) for i in (1, 2))
    if not node.input(2) or (training is not None and not training.any()):
        return ""
    return "" if ratio is not None and not ratio.any() else "it drops values by chance: training_mode is on"


def _by_constant(ledger: Ledger, node: Node) -> str:
    """Arithmetic with one value of data; of a quotient, the dividend."""
    data = [i for i, name in enumerate(node.inputs) if ledger.is_data(name)]
    if len(data) != 1:
        return "both of its inputs depend on values"
    if node.op == "Div" and data != [0]:
        return "it divides by what the model computes"
    return ledger.fixed_operand(node, node.inputs[1 - data[0]])


def _fixed(ledger: Ledger, node: Node) -> str:
    """Arithmetic of a function that is found by running it: nothing in it may change with the sizes of a call."""
    changing = [i for i in node.inputs if i and not ledger.is_data(i) and not ledger.is_fixed(i)]
    return f"its input {changing[0]!r} changes with the number of positions or sequences" if changing else ""


def _guard(ledger: Ledger, node: Node) -> str:
    """Where(IsNaN(x), 0, x), as exporters write it for rows that may see no key."""
    graph = ledger.graph
    asked = graph.producers.get(graph.strip(node.inputs[0], frozenset({"Identity"})))
    same = asked is not None and asked.op == "IsNaN" and graph.strip(asked.inputs[0]) == graph.strip(node.inputs[2])
    zero = small(graph, node.inputs[1])
    return "" if same and zero is not None and zero.size == 1 and not zero.any() else "it is no guard against NaN"


def _zeroes(ledger: Ledger, node: Node) -> str:
    """A guard, or zeros in the place of some probabilities: of which ones, is found by running it."""
    asked = ledger.graph.producers.get(ledger.graph.strip(node.inputs[0]))
    if asked is not None and asked.op == "IsNaN":
        return _guard(ledger, node)
    zeros = [small(ledger.graph, name) for name in node.inputs[1:]]
    some = any(z is not None and z.size == 1 and not z.any() for z in zeros)
    return "" if some else "it puts other numbers than zeros in the place of probabilities"


ROUNDS = frozenset({"Cast", "Identity"})  # operators that `rounds` tells apart


def rounds(node: Node) -> bool:
    """Whether a node is there to round activations: to 16 bits, or once to 8 (what it was is then undone)."""
    undone = node.op == "Identity" and "Quantize" in node.attributes.get("written_as", "")
    return undone or (node.op == "Cast" and node.attributes.get("to") in (FLOAT16, BFLOAT16))


def adds_nothing(ledger: Ledger, node: Node) -> str:
    """Zeros that are added to a value, or ones that it is multiplied by, change nothing in any part."""
    neutral = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}.get(node.op)
    data = [i for i, name in enumerate(node.inputs) if ledger.is_data(name)]
    if neutral is None or len(data) != 1 or (node.op in ("Sub", "Div") and data != [0]):
        return f"{node.op} has no part there in GPT-2"
    value, other = (node.inputs[i] for i in (data[0], 1 - data[0]))
    probe = ledger.probes[0]
    if other not in ledger.graph.fixed or not (probe.evaluate(other) == neutral).all():
        return f"{node.op} has no part there in GPT-2"
    same = probe.evaluate(node.outputs[0]).shape == probe.evaluate(value).shape
    return "" if same else f"it makes {probe.evaluate(value).shape} {probe.evaluate(node.outputs[0]).shape}"


def _identity(ledger: Ledger, node: Node) -> str:
    """Its input as it is; where the file adds a vector of zeros to that, the result is no wider."""
    beside: tuple[int, ...] = node.attributes.get("beside", ())
    value = ledger.probes[0].evaluate(node.inputs[0]).shape if beside else ()
    return "" if value[len(value) - len(beside) :] == beside else f"it makes more of {value} by a vector {beside}"


VIEW: Mapping[str, NodeCheck] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _moves_first),
    "Identity": _identity,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Dropout": _dropout,
}
# What only moves elements.
CARRIER: Mapping[str, NodeCheck] = {
    **VIEW,
    **dict.fromkeys(
        (
            "Transpose", "Split", "Slice", "Expand", "Tile", "Gather", "GatherND", "GatherElements",
            "SplitToSequence", "SequenceAt",
        ),
        _moves_first,
    ),
    "Concat": any_,
}  # fmt: skip
# Beside it a number that all elements are multiplied by, and a bias that is added; both are read.
SCALED_CARRIER: Mapping[str, NodeCheck] = {**CARRIER, **dict.fromkeys(("Mul", "Div", "Add", "Sub"), _by_constant)}
LINEAR: Mapping[str, NodeCheck] = {
    **VIEW,
    **dict.fromkeys(
        (
            "MatMul", "Gemm", "Einsum", "com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul",
            "com.microsoft.FusedGemm",
        ),
        any_,
    ),
    **dict.fromkeys(("Mul", "Add"), _by_constant),
}  # fmt: skip
LOOKUP: Mapping[str, NodeCheck] = {
    **VIEW,
    **dict.fromkeys(("Gather", "Slice", "DequantizeLinear", "com.microsoft.DequantizeLinear"), any_),
    "Expand": _moves_first,
}
RESIDUAL: Mapping[str, NodeCheck] = {**VIEW, "Add": any_, "Sum": any_}


def _last_axis(ledger: Ledger, node: Node) -> str:
    axis = node.attributes.get("axis", -1)
    rank = ledger.rank(node.inputs[0])
    return "" if axis in (-1, rank - 1) else f"it normalises from axis {axis} of {rank} on, not over the last one"


def _reduces_last(ledger: Ledger, node: Node) -> str:
    axes = node.attributes.get("axes")
    if node.input(1):
        given = small(ledger.graph, node.input(1))
        axes = None if given is None else given.reshape(-1).tolist()
    rank = ledger.rank(node.inputs[0])
    if axes is None or len(axes) != 1 or axes[0] not in (-1, rank - 1):
        return f"it takes a mean over the axes {axes} of {rank}, not over the last one"
    return ""


_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg")
LAYER_NORM: Mapping[str, NodeCheck] = {
    **VIEW,
    **dict.fromkeys(("LayerNormalization", "com.microsoft.LayerNormalization"), _last_axis),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"), _reduces_last),
    **dict.fromkeys(_ARITHMETIC, _fixed),
}


def _softmax(ledger: Ledger, node: Node) -> str:
    rank = ledger.rank(node.inputs[0])
    axis = node.attributes.get("axis", 1 if ledger.graph.opset() < 13 else -1)
    return "" if axis in (-1, rank - 1) else f"it sums over axis {axis} of {rank}, not over the last one"


SOFTMAX: Mapping[str, NodeCheck] = {"Softmax": _softmax}
PROBS: Mapping[str, NodeCheck] = {**VIEW, "Where": _zeroes, "IsNaN": any_}
PRODUCT: Mapping[str, NodeCheck] = dict.fromkeys(
    ("MatMul", "com.microsoft.FusedMatMul", "com.microsoft.TransposeMatMul"), any_
)

_INTEGERS: Mapping[str, NodeCheck] = {
    "Identity": _identity,
    **dict.fromkeys(
        (
            "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Min", "Max", "Clip", "Relu", "Sign", "Floor", "Ceil",
            "Round", "Cast", "CastLike", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And",
            "Or", "Xor", "Where", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Split", "Slice", "Expand",
            "Tile", "Concat", "Gather", "GatherND", "GatherElements", "ScatterND", "ReduceSum", "ReduceMax",
            "ReduceMin", "BitwiseAnd", "BitwiseOr", "BitwiseNot", "IsNaN", "IsInf",
        ),
        any_,
    ),
}  # fmt: skip
# Token ids and position ids are tried one and all: whatever is done to them.
IDS: Mapping[str, NodeCheck] = _INTEGERS
# Positions may be counted in a mask.
POSITIONS: Mapping[str, NodeCheck] = {**_INTEGERS, "CumSum": any_}
# Lengths of a past are computed by the file's own nodes, each time.
LENGTH = _INTEGERS
# What hides scores, apart from the scores themselves.
MASK: Mapping[str, NodeCheck] = {
    **POSITIONS,
    MASKED: any_,
    "Trilu": any_,
    "Reciprocal": any_,
    "Log": any_,
    "Dropout": _dropout,
}


def _masks_scores(ledger: Ledger, node: Node) -> str:
    return ""


def _scales(ledger: Ledger, node: Node) -> str:
    """Scores are multiplied by a number, or by a mask of zeros and ones that is read whole."""
    data = [i for i, name in enumerate(node.inputs) if ledger.is_data(name)]
    if node.op == "Div" and 1 in data:
        return "it divides by what the model computes"
    return "" if len(data) > 1 else ledger.fixed_operand(node, node.inputs[1 - data[0]], numbers_only=False)


# What may happen to scores on their way to the softmax.
SCORES: Mapping[str, NodeCheck] = {
    **VIEW,
    **dict.fromkeys(("Mul", "Div"), _scales),
    **dict.fromkeys(("Add", "Sub", "Sum", "Where", MASKED), _masks_scores),
}
ACTIVATION: Mapping[str, NodeCheck] = {
    **VIEW,
    **dict.fromkeys(
        (
            *_ARITHMETIC, "Sum", "Tanh", "Erf", "Sigmoid", "Exp", "Relu", "Gelu", "Swish", "Max", "Clip",
            "com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.BiasGelu", "com.microsoft.QuickGelu",
        ),
        _fixed,
    ),
}  # fmt: skip

# Arithmetic of sizes, and masks and positions that follow from sizes alone.
SIZES: Mapping[str, NodeCheck] = {
    **MASK,
    **dict.fromkeys(
        (
            "Shape", "Size", "Range", "ConstantOfShape", "EyeLike", "NonZero", "Sqrt", "Pow", "ReduceProd", "Exp",
            "SplitToSequence", "SequenceAt",
            "DequantizeLinear",  # rows of a quantised wpe, which lengths choose
        ),
        any_,
    ),
}  # fmt: skip

# Operators of sizes that give sums and products of them, or move them: what holds at the ends of what sizes can be
# holds between.
STRAIGHT = frozenset(
    {
        "Add", "Sub", "Mul", "Neg", "Sum", "ReduceSum", "ReduceProd", "CumSum", "Shape", "Size", "Range",
        "ConstantOfShape", "NonZero", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Split", "Expand",
        "Tile", "Concat", "Identity", "SplitToSequence", "SequenceAt",
    }
)  # fmt: skip
_COMPARING = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_TAKING = frozenset({"Gather", "GatherND", "GatherElements", "Slice"})
_CHOOSING = frozenset({"Max", "Min", "Clip", "Mod", "Abs", "Relu", "Cast", "CastLike"})
FEW = 8  # elements of a value that is arithmetic of sizes rather than one element for each position


def bends(ledger: Ledger, node: Node) -> str:
    """Why a node may make of sizes at some length what it makes at none that is tried; "" if it cannot.

    A comparison must come out alike at all ends of what sizes can be, and Max, Clip, Mod and their like hand on the
    same operand there: of sums of sizes they then do so everywhere between. What a size takes from a table of the
    file must be an element of an arithmetic progression.
    """
    taken = node.op in _TAKING
    if taken and all(i in ledger.graph.fixed for i in node.inputs[1:] if i):
        return ""
    shapes = {probe.evaluate(node.outputs[0]).shape for probe in ledger.probes[:2]}
    if len(shapes) > 1 or math.prod(min(shapes)) > FEW:
        return ""  # an element for each position: every one of them is tried
    every = [[probe.evaluate(i) for i in node.inputs if i] for probe in ledger.probes]
    if len({tuple(a.tobytes() for a in some) for some in every}) == 1:
        return ""
    if node.op == "Where":
        held = len({some[0].tobytes() for some in every}) == 1
    elif taken:
        table = every[0][0].ravel().astype(np.float64)
        held = node.inputs[0] not in ledger.graph.fixed or len(set(np.diff(table).tolist())) < 2
    elif node.op in _COMPARING:
        held = len({np.sign(np.subtract(*some, dtype=np.float64)).tobytes() for some in every}) == 1
    elif node.op in _CHOOSING:
        results = [probe.evaluate(node.outputs[0]) for probe in ledger.probes]
        kept = [
            np.all([r == some[k] for r, some in zip(results, every, strict=True)], axis=0) for k in range(len(every[0]))
        ]
        held = bool(np.any(np.broadcast_arrays(*kept), axis=0).all())
    else:
        held = False
    return (
        "" if held else "what it makes of sizes need not be the same at every length, or for every number of sequences"
    )


# What is left of its first input may be the same where that is not.
SELECTING = frozenset({"Gather", "Slice", "Split", "Squeeze", "Unsqueeze", "Reshape", "Identity"})
# How many elements these have depends on values: of all inputs, or of those from one on.
SHAPED_BY_VALUE = frozenset({"NonZero", "Compress", "Unique", "Loop", "If", "Scan", "NonMaxSuppression"})
SHAPED_BY_INPUTS: Mapping[str, int] = {
    **dict.fromkeys(("Range", "ConstantOfShape"), 0),
    **dict.fromkeys(
        (
            "Reshape", "Slice", "Expand", "Tile", "Pad", "TopK", "Split", "SplitToSequence", "OneHot", "Resize",
            "Squeeze", "Unsqueeze",
        ),
        1,
    ),
}  # fmt: skip
