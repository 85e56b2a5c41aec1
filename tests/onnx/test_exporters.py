"""The forms in which further exporters write GPT-2, built node by node: recognised, and run like ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from forms import C, D, F, Form, H, L, N, V, causal, qkv, written_out
from gpt2np.errors import UnsupportedModelError
from gpt2np.session import InferenceSession
from runtime import assert_close, feeds_for, runtime


def agree(path: Path, sizes: tuple[tuple[int, int], ...] = ((1, 1), (2, 5), (1, 24))) -> InferenceSession:
    """Both engines give what ONNX Runtime gives, for (B, T)."""
    theirs = runtime(path)
    for engine in ("numpy", "numba"):
        ours = InferenceSession(path, engine=engine)
        for B, T in sizes:
            feeds = feeds_for(ours.model.recognised, B, T)
            for port, got, expected in zip(
                ours.get_outputs(), ours.run(None, feeds), theirs.run(None, feeds), strict=True
            ):
                assert_close(got, expected, f"{engine} {port.name} B={B} T={T}")
    return ours


def new_gelu(form: Form, x: str) -> str:
    """0.5 * x * (1 + tanh(...)), as minGPT and nanoGPT write it: x is read three times."""
    half = form.op("Mul", x, form.constant(0.5, np.float32))
    cubed = form.op("Mul", form.op("Pow", x, form.constant(3, np.float32)), form.constant(0.044715, np.float32))
    inner = form.op("Mul", form.op("Add", x, cubed), form.constant((2 / np.pi) ** 0.5, np.float32))
    return form.op("Mul", half, form.op("Add", form.op("Tanh", inner), form.constant(1, np.float32)))


def without_biases(form: Form, x: str) -> str:
    """Blocks whose maps and layer norms have no bias."""

    def plain(value: str, name: str, *shape: int) -> str:
        return form.op("MatMul", value, form.weight(f"{name}.weight", *shape))

    def norm(value: str, name: str) -> str:
        return form.op("LayerNormalization", value, form.weight(f"{name}.weight", C))

    form.linear = plain  # type: ignore[method-assign]
    form.norm = lambda f, value, name: norm(value, name)
    for i in range(L):
        heads = written_out(causal)(form, i, norm(x, f"h.{i}.ln_1"))
        x = form.op("Add", x, plain(heads, f"h.{i}.attn.c_proj", C, C))
        fc = plain(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc", C, F)
        x = form.op("Add", x, plain(new_gelu(form, fc), f"h.{i}.mlp.c_proj", F, C))
    return norm(x, "ln_f")


def test_maps_without_bias_before_gelu_written_out(tmp_path):
    form = Form()
    form.head(without_biases(form, form.embed(form.input("ids", np.int64, "B", "T"))))
    ours = agree(form.save(tmp_path / "model.onnx"))
    assert ours.model.config.activation == "gelu_tanh"
    assert not ours.model.recognised.sources["h.0.mlp.c_fc.bias"].load().any()


def last_by_gather_nd(form: Form, x: str) -> str:
    """x[:, [-1], :] as torch.export writes it."""
    first = form.op("Transpose", x, perm=[1, 0, 2])
    return form.op("Transpose", form.op("GatherND", first, form.constant([[-1]], np.int64)), perm=[1, 0, 2])


def last_by_slice(form: Form, x: str) -> str:
    return form.op("Slice", x, form.ints(-1), form.ints(2**63 - 1), form.ints(1))


@pytest.mark.parametrize("last", [last_by_gather_nd, last_by_slice])
@pytest.mark.parametrize("declared", [True, False])
def test_logits_of_the_last_position(tmp_path, last: Callable[[Form, str], str], declared: bool):
    form = Form()
    x = form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal))
    head = form.op("Transpose", form.weight("wte.weight", V, C))
    form.op("MatMul", last(form, x), head, out=form.output("logits", "B", 1, V))
    path = form.save(tmp_path / "model.onnx")
    if not declared:
        proto = onnx.load(path)
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        onnx.save(proto, path)
    ours = agree(path)
    assert [p.role for p in ours.model.recognised.outputs] == ["last_logits"]


def test_negative_ids_and_positions_are_counted_from_the_end(tmp_path):
    """As ONNX's Gather does; beyond that they are errors."""
    from gpt2np.errors import ContextOverflowError, TokenRangeError

    path = Path(__file__).parents[1] / "data" / "optimum_past.onnx"
    ours, theirs = InferenceSession(path, engine="numpy"), runtime(path)
    feeds = feeds_for(ours.model.recognised, 2, 4, 3)
    feeds["input_ids"][0, 1], feeds["input_ids"][1, 3] = -1, -64
    feeds["position_ids"][1, :2] = -16, -1
    for port, got, expected in zip(ours.get_outputs(), ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        assert_close(got, expected, port.name)
    feeds["input_ids"][0, 1] = -65
    with pytest.raises(TokenRangeError, match="-65"):
        ours.run(None, feeds)
    feeds["input_ids"][0, 1], feeds["position_ids"][0, 0] = 0, -17
    with pytest.raises(ContextOverflowError, match="-17"):
        ours.run(None, feeds)
    with pytest.raises(TokenRangeError, match="-1"):  # the Python model takes ids as they are
        ours.model([[-1]])


# ----------------------------------------------------------------------------------------------- TensorFlow by tf2onnx
def pooled_norm(form: Form, x: str, name: str) -> str:
    """Moments by GlobalAveragePool, then x * (gain / root) + (bias - mean * (gain / root))."""
    gain, bias = form.weight(f"{name}.weight", C), form.weight(f"{name}.bias", C)
    mean = form.op("GlobalAveragePool", x)
    off = form.op("Sub", x, mean)
    variance = form.op("GlobalAveragePool", form.op("Mul", off, off))
    root = form.op("Reciprocal", form.op("Sqrt", form.op("Add", variance, form.constant(1e-5, np.float32))))
    factor = form.op("Mul", root, gain)
    return form.op("Add", form.op("Mul", x, factor), form.op("Sub", bias, form.op("Mul", mean, factor)))


def tensorflow_mask(form: Form, scores: str) -> str:
    """scores * seen - 1e4 * (1 - seen) + (1e-9 + (1 - attention_mask) * -1e4)"""
    one, low = form.constant(1, np.float32), form.constant(1e4, np.float32)
    T, S = (form.op("Squeeze", form.size(scores, axis)) for axis in (2, 3))
    zero, step = form.constant(0, np.int64), form.constant(1, np.int64)
    query = form.op("Unsqueeze", form.op("Range", zero, T, step), form.ints(1))
    key = form.op("Add", form.op("Sub", form.op("Range", zero, S, step), S), T)
    seen = form.op("Cast", form.op("GreaterOrEqual", query, key), to=1)
    scores = form.op("Sub", form.op("Mul", scores, seen), form.op("Mul", low, form.op("Sub", one, seen)))
    keep = form.op("Cast", form.op("Unsqueeze", "attention_mask", form.ints(1, 2)), to=1)
    hidden = form.op("Mul", form.op("Sub", one, keep), form.constant(-1e4, np.float32))
    return form.op("Add", scores, form.op("Add", form.constant(1e-9, np.float32), hidden))


def test_tensorflow_by_tf2onnx(tmp_path):
    form = Form()
    form.norm = pooled_norm
    ids = form.input("input_ids", np.int32, "B", "T")
    form.input("attention_mask", np.int32, "B", "T")
    x = form.blocks(form.embed(ids), written_out(tensorflow_mask))
    head = form.op("Unsqueeze", form.op("Transpose", form.weight("wte.weight", V, C)), form.ints(0))  # (1, C, V)
    form.op("MatMul", x, head, out=form.output("logits", "B", "T", V))
    path = form.save(tmp_path / "model.onnx")
    ours, theirs = agree(path), runtime(path)
    keep = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]])
    feeds = feeds_for(ours.model.recognised, 2, 6, 0, keep)
    assert_close(ours.run(None, feeds)[0], theirs.run(None, feeds)[0], "padding on the left")


# ------------------------------------------------------------------------------------------------- JAX by jax2onnx
B, T = 2, 8  # such a file has fixed sizes


def repeated(form: Form, name: str, *shape: int) -> str:
    """A constant (1, 1, n) repeated along the batch."""
    value = form.op("Reshape", form.weight(name, *shape), form.ints(1, 1, shape[-1]))
    return form.op("Expand", value, form.ints(B, 1, shape[-1]))


def summed_norm(form: Form, x: str, name: str) -> str:
    """Means as sums without their axis, which Reshape and Expand bring back; gain and bias repeated."""

    def mean(op: str, value: str, divisor: float = C) -> str:
        shape = form.ints(B, T, 1)
        total = form.op("Reshape", form.op(op, value, form.ints(2), keepdims=0), shape)
        return form.op("Div", form.op("Expand", total, shape), form.constant(divisor, np.float32))

    off = form.op("Sub", x, mean("ReduceSum", x, form.divisor))
    root = form.op("Sqrt", form.op("Add", mean("ReduceSumSquare", off), form.constant(1e-5, np.float32)))
    normed = form.op("Div", off, root)
    gained = form.op("Mul", normed, repeated(form, f"{name}.weight", C))
    return form.op("Add", gained, repeated(form, f"{name}.bias", C))


def triangle(form: Form, scores: str) -> str:
    ones = form.op("ConstantOfShape", form.ints(T, T), value=numpy_helper.from_array(np.array([True])))
    return form.op("Where", form.op("Trilu", ones, upper=0), scores, form.constant(-1e10, np.float32))


def fixed_attention(form: Form, i: int, x: str) -> str:
    heads = [
        form.op("Transpose", form.op("Reshape", part, form.ints(B, T, H, D)), perm=[0, 2, 1, 3])
        for part in qkv(form, i, x)
    ]
    scores = form.op("MatMul", heads[0], form.op("Transpose", heads[1], perm=[0, 1, 3, 2]))
    scores = form.op("Div", scores, form.constant(D**0.5, np.float32))
    probs = form.op("Softmax", triangle(form, scores), axis=-1)
    merged = form.op("Transpose", form.op("MatMul", probs, heads[2]), perm=[0, 2, 1, 3])
    return form.op("Reshape", merged, form.ints(B, T, C))


def jax_file(path: Path, divisor: float = C) -> Path:
    form = Form()
    form.norm, form.divisor = summed_norm, divisor  # type: ignore[attr-defined]

    def wrapped(rows: str, size: int) -> str:
        """Indices below zero counted from the end, as JAX does before it looks up."""
        below = form.op("Less", rows, form.constant(0, np.int32))
        return form.op("Where", below, form.op("Add", rows, form.constant(size, np.int32)), rows)

    ids = form.input("in_0", np.int32, B, T)
    words = form.op("Gather", form.weight("wte.weight", V, C), wrapped(ids, V))
    rows = form.op("Range", *(form.constant(n, np.int32) for n in (0, T, 1)))
    places = form.op("Gather", form.weight("wpe.weight", N, C), wrapped(rows, N))
    places = form.op("Expand", form.op("Reshape", places, form.ints(1, T, C)), form.ints(1, T, C))
    x = form.blocks(form.op("Add", words, places), fixed_attention)
    head = form.op("Transpose", form.weight("wte.weight", V, C), perm=[1, 0])
    form.op("Einsum", x, head, out=form.output("logits", B, T, V), equation="abc,cd->abd")
    return form.save(path)


def test_jax_by_jax2onnx(tmp_path):
    agree(jax_file(tmp_path / "model.onnx"), ((B, T),))


def test_a_sum_divided_by_another_number_is_no_mean(tmp_path):
    with pytest.raises(UnsupportedModelError):
        InferenceSession(jax_file(tmp_path / "model.onnx", C + 1), engine="numpy")
