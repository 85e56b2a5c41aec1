"""One random semantic change of an ONNX file that ONNX Runtime still runs: what a front end must refuse or compute.

`mutate` makes a change that usually gives another function; `rewrite` says the same in other words, and a front end
must go on loading it. Both draw from the generator that they are given, so that a seed names a change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

Array = np.ndarray
Rng = np.random.Generator


class Editor:
    """A copy of a model in which values can be replaced; `values` holds what each value was on one run."""

    def __init__(self, model: onnx.ModelProto, values: Mapping[str, Array], rng: Rng) -> None:
        self.model = onnx.ModelProto.FromString(model.SerializeToString())
        self.graph, self.values, self.rng = self.model.graph, values, rng
        self.opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        self.new: list[NodeProto] = []
        self.count = 0

    def pick(self, items: Any) -> Any:
        items = list(items)
        return items[int(self.rng.integers(len(items)))]

    def constant(self, value: Any, dtype: Any = None) -> str:
        self.count += 1
        name = f"mutant_constant_{self.count}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        self.count += 1
        names = [f"mutant_{self.count}_{k}" for k in range(outputs)]
        self.new.append(helper.make_node(op, inputs, names, names[0], **attributes))
        return names[0]

    def initializers(self) -> dict[str, TensorProto]:
        return {t.name: t for t in self.graph.initializer}

    def consumers(self, name: str) -> list[NodeProto]:
        return [n for n in self.graph.node if name in n.input]

    def insert(self, name: str, build: Callable[[str], str | None], reader: NodeProto | None = None) -> bool:
        """`build` takes a value's name to that of the value which all readers, or one, get in its place."""
        self.new = []
        at = next((k + 1 for k, n in enumerate(self.graph.node) if name in n.output), 0)
        if reader is None and at:  # its name stays with what is read from now on, a graph output may be it
            raw = f"{name}_raw"
            made = build(raw)
            if made is None:
                return False
            maker = self.graph.node[at - 1]
            maker.output[:] = [raw if o == name else o for o in maker.output]
            last = next(n for n in self.new if made in n.output)
            last.output[:] = [name if o == made else o for o in last.output]
        else:
            made = build(name)
            if made is None:
                return False
            for node in [reader] if reader is not None else self.consumers(name):
                node.input[:] = [made if i == name else i for i in node.input]
        for k, node in enumerate(self.new):
            self.graph.node.insert(at + k, node)
        return True

    def cast(self, name: str, dtype: Any) -> str:
        return self.op("Cast", name, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def clip(self, x: str, low: float, high: float, dtype: Any) -> str:
        if self.opset < 11:
            return self.op("Clip", x, min=float(low), max=float(high))
        return self.op("Clip", x, self.constant(low, dtype), self.constant(high, dtype))

    def slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        return self.op("Slice", x, *(self.constant([n], np.int64) for n in (start, end, axis, step)))

    def length(self, x: str, axis: int) -> str:
        """One size of a value, as float32 of one element."""
        size = self.op("Gather", self.op("Shape", x), self.constant([axis], np.int64))
        return self.cast(size, np.float32)


# ------------------------------------------------------------------------------------------- functions put in between
Insertion = Callable[[Editor, str, Array], str | None]
BIG = 2**31 - 1


def _unary(op: str, **attributes: Any) -> Insertion:
    return lambda e, x, v: e.op(op, x, **attributes)


def _with_constant(op: str, numbers: tuple[float, ...], swapped: bool = False) -> Insertion:
    def build(e: Editor, x: str, v: Array) -> str | None:
        c = e.constant(e.pick(numbers), v.dtype)
        return e.op(op, *((c, x) if swapped else (x, c)))

    return build


def _there_and_back(dtype: Any) -> Insertion:
    return lambda e, x, v: e.cast(e.cast(x, dtype), v.dtype)


def _clip(e: Editor, x: str, v: Array) -> str:
    high = e.pick((0.1, 1.0, 3.0, 10.0, 100.0, 3e4))
    return e.clip(x, e.pick((0.0, -high, -1e-3)), high, v.dtype)


def _axis(e: Editor, v: Array) -> int | None:
    axes = [a for a in range(v.ndim) if v.shape[a] > 1]
    return e.pick(axes) if axes else None


def _flip(e: Editor, x: str, v: Array) -> str | None:
    axis = _axis(e, v)
    return None if axis is None else e.slice(x, -1, -BIG, axis, -1)


def _roll(e: Editor, x: str, v: Array) -> str | None:
    axis = _axis(e, v)
    if axis is None:
        return None
    return e.op("Concat", e.slice(x, -1, BIG, axis), e.slice(x, 0, -1, axis), axis=axis)


def _swapped_axes(e: Editor, x: str, v: Array) -> str | None:
    """Two axes exchanged and the shape put back, as a wrong perm between two reshapes does."""
    if v.ndim < 2:
        return None
    a, b = e.rng.choice(v.ndim, 2, replace=False)
    perm = list(range(v.ndim))
    perm[a], perm[b] = perm[b], perm[a]
    return e.op("Reshape", e.op("Transpose", x, perm=perm), e.op("Shape", x))


def _by_length(e: Editor, x: str, v: Array) -> str | None:
    """Times (size / 4), or times max(1, size / 8)."""
    axis = _axis(e, v)
    if axis is None:
        return None
    part = e.op("Div", e.length(x, axis), e.constant(e.pick((4, 8, 16)), np.float32))
    factor = part if e.rng.random() < 0.5 else e.op("Max", part, e.constant(1, np.float32))
    return e.op("Mul", x, e.cast(factor, v.dtype))


def _replaced(e: Editor, x: str, v: Array) -> str:
    """One value, or all beyond it, replaced by another."""
    at, other = e.constant(v.flat[e.rng.integers(v.size)], v.dtype), e.constant(e.pick((0, 1, 3)), v.dtype)
    found = e.op(e.pick(("Equal", "Greater", "Less")), x, at)
    return e.op("Where", found, other, x)


def _window(e: Editor, x: str, v: Array) -> str | None:
    """Keys that lie too far back are hidden, or let in: a band over the last two axes, which are queries and keys."""
    if v.ndim < 2 or v.shape[-1] < v.shape[-2]:
        return None
    rows, columns = (e.op("Gather", e.op("Shape", x), e.constant(a, np.int64)) for a in (v.ndim - 2, v.ndim - 1))
    zero, one = e.constant(0, np.int64), e.constant(1, np.int64)
    q = e.op("Range", e.op("Sub", columns, rows), columns, one)
    q = e.op("Reshape", q, e.constant([-1, 1], np.int64))
    near = e.op("Less", e.op("Sub", q, e.op("Range", zero, columns, one)), e.constant(e.pick((2, 5, 9)), np.int64))
    if v.dtype.kind == "b":
        return e.op("And", x, near)
    return e.op("Where", near, x, e.constant(e.pick((-1e4, 0)), v.dtype))


def _mean_free(e: Editor, x: str, v: Array) -> str | None:
    axis = _axis(e, v)
    return None if axis is None else e.op("Softmax", x, axis=axis)


FLOAT_INSERTIONS: dict[str, Insertion] = {
    **{op: _unary(op) for op in ("Relu", "Abs", "Neg", "Floor", "Ceil", "Round", "Sign", "Tanh", "Sigmoid", "Erf")},
    "Max": _with_constant("Max", (0, -1, 0.5, -10)),
    "Min": _with_constant("Min", (0, 1, 3, 10)),
    "Mul": _with_constant("Mul", (1.1, 0.5, 2, -1, 0.99, 8)),
    "Div": _with_constant("Div", (1.1, 3, -1)),
    "Add": _with_constant("Add", (0.1, 1, -2, 1e-2)),
    "Sub": _with_constant("Sub", (0.1, 1), swapped=True),
    "Mod": lambda e, x, v: e.op("Mod", x, e.constant(e.pick((1, 2, 7)), v.dtype), fmod=1),
    "Pow": _with_constant("Pow", (2, 3)),
    "Clip": _clip,
    **{f"Cast {np.dtype(t)}": _there_and_back(t) for t in (np.int32, np.int64, np.bool_, np.float16, np.int8)},
    "flip": _flip,
    "roll": _roll,
    "swap axes": _swapped_axes,
    "length": _by_length,
    "replace": _replaced,
    "window": _window,
    "Softmax": _mean_free,
    "CumSum": lambda e, x, v: e.op("CumSum", x, e.constant(v.ndim - 1, np.int64)) if v.ndim else None,
    "Trilu": lambda e, x, v: e.op("Trilu", x, upper=int(e.rng.integers(2))) if v.ndim > 1 else None,
}
INT_INSERTIONS: dict[str, Insertion] = {
    "Add": _with_constant("Add", (1, -1, 2)),
    "Mul": _with_constant("Mul", (2, 3, -1)),
    "Div": _with_constant("Div", (2, 3)),
    "Max": _with_constant("Max", (0, 1, 2, 5)),
    "Min": _with_constant("Min", (0, 1, 5, 9, 12)),
    "Mod": _with_constant("Mod", (2, 4, 8, 13)),
    "Abs": _unary("Abs"),
    "Sub": _with_constant("Sub", (1, 9), swapped=True),
    "Cast int8": _there_and_back(np.int8),
    "Cast bool": _there_and_back(np.bool_),
    "Cast float16": _there_and_back(np.float16),
    "flip": _flip,
    "roll": _roll,
    "swap axes": _swapped_axes,
    "replace": _replaced,
    "window": lambda e, x, v: _window(e, x, v) if v.ndim > 2 else None,
    "CumSum": lambda e, x, v: e.op("CumSum", x, e.constant(v.ndim - 1, np.int64)) if v.ndim else None,
}
BOOL_INSERTIONS: dict[str, Insertion] = {
    "Not": _unary("Not"),
    "flip": _flip,
    "roll": _roll,
    "swap axes": _swapped_axes,
    "window": _window,
    "Or": lambda e, x, v: e.op("Or", x, e.constant(True)),
    "And roll": lambda e, x, v: e.op("And", x, y) if (y := _roll(e, x, v)) else None,
}
INSERTIONS = {"f": FLOAT_INSERTIONS, "i": INT_INSERTIONS, "u": INT_INSERTIONS, "b": BOOL_INSERTIONS}


def insert(e: Editor) -> str | None:
    """A function between a value and all its readers, or one of them."""
    names = [n for n, v in e.values.items() if v.dtype.kind in INSERTIONS and v.size]
    integers = [n for n in names if e.values[n].dtype.kind != "f"]
    name = e.pick(integers if integers and e.rng.random() < 0.35 else names)
    value = e.values[name]
    readers = e.consumers(name)
    reader = e.pick(readers) if readers and e.rng.random() < 0.4 else None
    what, build = e.pick(INSERTIONS[value.dtype.kind].items())
    if not e.insert(name, lambda x: build(e, x, value), reader):
        return None
    where = "" if reader is None else f" before {reader.op_type} {reader.output[0]}"
    return f"{what} on {name}{where}"


def change_output(e: Editor) -> str | None:
    """An output of another shape, or a part of it."""
    name = e.pick(o.name for o in e.graph.output)
    value = e.values.get(name)
    if value is None or not any(name in n.output for n in e.graph.node):
        return None
    axis = int(e.rng.integers(value.ndim))
    shape = [0] * value.ndim
    shape[axis] = -1
    merged = [0] * (value.ndim - 2) + [-1]
    builds: dict[str, Callable[[str], str]] = {
        "Flatten": lambda x: e.op("Flatten", x, axis=axis),
        "merged": lambda x: e.op("Reshape", x, e.constant(merged, np.int64)),
        "one axis more": lambda x: e.op("Reshape", x, e.constant([1, *shape[1:], -1][: value.ndim + 1], np.int64)),
        "Transpose": lambda x: e.op("Transpose", x, perm=[int(p) for p in e.rng.permutation(value.ndim)]),
        "last": lambda x: e.slice(x, -1, BIG, axis),
        "all but the last": lambda x: e.slice(x, 0, -1, axis),
        "twice": lambda x: e.op("Concat", x, x, axis=axis),
    }
    what, build = e.pick(builds.items())
    return f"output {name}: {what}, axis {axis}" if e.insert(name, build) else None


# -------------------------------------------------------------------------------------------------- what is there
SIBLINGS: dict[str, tuple[str, ...]] = {
    "Add": ("Sub", "Mul", "Max", "Min", "Div"),
    "Sub": ("Add", "Mul", "Max"),
    "Mul": ("Add", "Sub", "Div", "Max"),
    "Div": ("Mul", "Sub"),
    "Tanh": ("Sigmoid", "Erf", "Softsign"),
    "Erf": ("Tanh", "Sigmoid"),
    "Sqrt": ("Exp", "Abs", "Identity"),
    "Softmax": ("LogSoftmax", "Hardmax", "Sigmoid"),
    "Gelu": ("Relu", "Sigmoid", "HardSwish", "Mish", "Softplus", "Tanh"),
    "ReduceMean": ("ReduceMax", "ReduceSum", "ReduceL2", "ReduceMin", "ReduceSumSquare"),
    "ReduceSum": ("ReduceMean", "ReduceMax"),
    "Less": ("LessOrEqual", "Greater", "GreaterOrEqual"),
    "LessOrEqual": ("Less", "GreaterOrEqual"),
    "Greater": ("GreaterOrEqual", "Less"),
    "GreaterOrEqual": ("Greater", "LessOrEqual"),
    "Equal": ("Greater", "Less"),
    "And": ("Or", "Xor"),
    "Or": ("And", "Xor"),
    "Identity": ("Neg", "Relu", "Abs"),
    "Cast": ("Identity",),
    "Expand": ("Tile",),
    "FastGelu": ("Gelu", "QuickGelu"),
    "Max": ("Min", "Sum"),
    "Min": ("Max",),
    "Neg": ("Abs", "Identity"),
    "Not": ("Identity",),
    "Trilu": ("Identity",),
    "LayerNormalization": ("RMSNormalization", "SimplifiedLayerNormalization"),
    "Reciprocal": ("Identity", "Sqrt"),
}


def replace_operator(e: Editor) -> str | None:
    nodes = [n for n in e.graph.node if n.op_type in SIBLINGS]
    if not nodes:
        return None
    node = e.pick(nodes)
    old, node.op_type = node.op_type, e.pick(SIBLINGS[node.op_type])
    if old in ("Softmax", "Gelu", "FastGelu", "Cast", "Trilu") and node.op_type not in ("LogSoftmax", "Hardmax"):
        del node.attribute[:]
    if node.op_type in ("RMSNormalization", "SimplifiedLayerNormalization"):
        del node.input[2:]
    if len(node.input) == 2 and node.op_type in ("Identity", "Sigmoid"):
        del node.input[1:]
    return f"{old} {node.output[0]} becomes {node.op_type}"


def exchange_inputs(e: Editor) -> str | None:
    nodes = [n for n in e.graph.node if len(n.input) > 1 and n.op_type not in ("Add", "Mul", "Max", "Min", "And", "Or")]
    if not nodes:
        return None
    node = e.pick(nodes)
    a, b = (int(k) for k in e.rng.choice(len(node.input), 2, replace=False))
    node.input[a], node.input[b] = node.input[b], node.input[a]
    return f"{node.op_type} {node.output[0]}: inputs {a} and {b} exchanged"


def rewire(e: Editor) -> str | None:
    """A node reads another value of the same shape and type, made before it."""
    node = e.pick(e.graph.node)
    at = list(e.graph.node).index(node)
    slots = [k for k, i in enumerate(node.input) if i in e.values]
    if not slots:
        return None
    slot = e.pick(slots)
    before = {o for n in list(e.graph.node)[:at] for o in n.output} | set(e.initializers())
    before |= {i.name for i in e.graph.input}
    old = e.values[node.input[slot]]
    same = [n for n, v in e.values.items() if n in before and n != node.input[slot]]
    same = [n for n in same if e.values[n].shape == old.shape and e.values[n].dtype == old.dtype]
    if not same:
        return None
    was, node.input[slot] = node.input[slot], e.pick(same)
    return f"{node.op_type} {node.output[0]}: reads {node.input[slot]} for {was}"


def _other_attribute(e: Editor, a: AttributeProto) -> str | None:
    if a.type == AttributeProto.INT:
        a.i = e.pick((a.i + 1, a.i - 1, -a.i, 1 - a.i))
    elif a.type == AttributeProto.FLOAT:
        a.f = e.pick((a.f * 1.1, a.f * 100, -a.f, a.f + 0.1, 0.0))
    elif a.type == AttributeProto.INTS and a.ints:
        if a.name == "perm" or e.rng.random() < 0.5:
            p, q = e.rng.integers(len(a.ints), size=2)
            a.ints[p], a.ints[q] = a.ints[q], a.ints[p]
        else:
            a.ints[int(e.rng.integers(len(a.ints)))] += e.pick((1, -1))
    elif a.type == AttributeProto.STRING:
        a.s = e.pick((b"none", b"tanh", b"mul", b"add", b"bdi,ijk->bdk"))
    elif a.type == AttributeProto.TENSOR:
        return _other_element(e, a.t)
    else:
        return None
    return str(helper.get_attribute_value(a))


# What an operator may be given that exporters leave at its default.
FURTHER: dict[str, tuple[tuple[str, Any], ...]] = {
    "Gemm": (("alpha", 0.5), ("beta", 0.0), ("beta", 2.0), ("transB", 1), ("transA", 1)),
    "Softmax": (("axis", 1), ("axis", 2), ("axis", -2)),
    "LayerNormalization": (("axis", 1), ("axis", -2), ("epsilon", 0.1)),
    "ReduceMean": (("keepdims", 0), ("noop_with_empty_axes", 1)),
    "Gelu": (("approximate", "none"), ("approximate", "tanh")),
    "Gather": (("axis", 1),),
    "Transpose": (("perm", [0, 1, 3, 2]), ("perm", [0, 1, 2, 3]), ("perm", [1, 0, 2])),
    "CumSum": (("exclusive", 1), ("reverse", 1)),
    "Trilu": (("upper", 0), ("upper", 1)),
    "Attention": (("is_causal", 0), ("scale", 0.2), ("softcap", 2.0), ("unidirectional", 0)),
    "Shape": (("start", 1),),
    "Reshape": (("allowzero", 1),),
    "MultiHeadAttention": (("scale", 0.3), ("unidirectional", 0), ("mask_filter_value", -5.0)),
    "GroupQueryAttention": (("scale", 0.3), ("local_window_size", 2), ("softcap", 1.0), ("smooth_softmax", 1)),
    "SkipLayerNormalization": (("epsilon", 0.1),),
}


def change_attribute(e: Editor) -> str | None:
    nodes = [n for n in e.graph.node if n.attribute or n.op_type in FURTHER]
    node = e.pick(nodes)
    if node.op_type in FURTHER and (not node.attribute or e.rng.random() < 0.5):
        name, value = e.pick(FURTHER[node.op_type])
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
        return f"{node.op_type} {node.output[0]}: {name} = {value}"
    attribute = e.pick(node.attribute)
    changed = _other_attribute(e, attribute)
    return None if changed is None else f"{node.op_type} {node.output[0]}: {attribute.name} = {changed}"


def _other_element(e: Editor, tensor: TensorProto) -> str | None:
    value = numpy_helper.to_array(tensor).copy()
    if not value.size or value.dtype.kind not in "fiub":
        return None
    at = int(e.rng.integers(value.size))
    if value.dtype.kind == "b":
        value.flat[at] ^= True
    elif value.dtype.kind in "iu":
        value.flat[at] += value.dtype.type(e.pick((1, 1, 2)))
    else:
        x = value.flat[at]
        value.flat[at] = e.pick((-x, x * 1.1, x + 0.5, 1 - x, 0, x * 30))
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return f"element {at} of {tensor.name or 'a constant'} {value.shape} = {value.flat[at]}"


def change_constant(e: Editor) -> str | None:
    """One element of a constant; constants of the graph rather than weights."""
    inner = [a.t for n in e.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    every = [*e.graph.initializer, *inner]
    few = [t for t in every if t.data_type != TensorProto.FLOAT or not t.dims or np.prod(t.dims) == 1]
    return _other_element(e, e.pick(few if few and e.rng.random() < 0.8 else every))


def change_buffer(e: Editor) -> str | None:
    """A window, a hole or single bits in a square buffer, as masks are; or a whole tensor times a number."""
    square = [t for t in e.graph.initializer if len(t.dims) >= 2 and t.dims[-1] == t.dims[-2]]
    square += [
        a.t for n in e.graph.node if n.op_type == "Constant" for a in n.attribute
        if a.name == "value" and len(a.t.dims) >= 2 and a.t.dims[-1] == a.t.dims[-2]
    ]  # fmt: skip
    if square and e.rng.random() < 0.6:
        tensor = e.pick(square)
        value = numpy_helper.to_array(tensor).copy()
        n = value.shape[-1]
        window = e.pick((2, 3, n // 2, n - 1))
        far = np.subtract.outer(np.arange(n), np.arange(n)) >= window
        value[..., far] = value.flat[n - 1] if value[..., 0, -1].size else 0  # as a later key has it
        what = f"{tensor.name} {value.shape}: a window of {window}"
    else:
        tensor = e.pick(e.graph.initializer)
        value = numpy_helper.to_array(tensor)
        if value.dtype.kind != "f":
            return None
        factor = e.pick((1e4, -1, 30))
        value, what = value * value.dtype.type(factor), f"{tensor.name} times {factor}"
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return what


MUTATIONS: dict[Callable[[Editor], str | None], float] = {
    insert: 0.46,
    change_output: 0.05,
    replace_operator: 0.12,
    exchange_inputs: 0.03,
    rewire: 0.09,
    change_attribute: 0.11,
    change_constant: 0.09,
    change_buffer: 0.05,
}


def mutate(model: onnx.ModelProto, values: Mapping[str, Array], rng: Rng) -> tuple[str, onnx.ModelProto] | None:
    """A random change and what it is, or None where the draw was of none that this file can have."""
    e = Editor(model, values, rng)
    kind = list(MUTATIONS)[int(rng.choice(len(MUTATIONS), p=list(MUTATIONS.values())))]
    what = kind(e)
    return None if what is None else (what, e.model)
