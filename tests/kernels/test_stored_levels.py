"""Files that hold whole numbers with scales: kept so where the kernels can, with the bits of the floats."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner

import gpt2np
from gpt2np.cli import app
from gpt2np.convert.writer import write_model
from gpt2np.fingerprint import fingerprints
from gpt2np.quantised import Quantised, as_stored
from runtime import DATA
from tiny import random_ids, tiny_config, tiny_sources

K, N = 64, 96  # a linear map of the files below has such sizes or multiples of them


def scaled(x, low, high, axis):
    """Scales and whole zero points by which numbers fill low..high along an axis, and the levels."""
    top, bottom = x.max(axis, keepdims=True), x.min(axis, keepdims=True)
    scale = ((top - bottom) / (high - low)).astype(np.float32)
    zero = np.clip(np.rint(low - bottom / scale), low, high)
    return scale, zero, np.clip(np.rint(x / scale) + zero, low, high)


def dequantised(name, parts, **attributes):
    """DequantizeLinear of a tensor, a scale, and perhaps a zero point; initializers and node."""
    made = [numpy_helper.from_array(part, f"{name} {i}") for i, part in enumerate(parts)]
    return made, helper.make_node("DequantizeLinear", [m.name for m in made], [name], **attributes)


def per_column(name, x):
    scale, _, q = scaled(np.concatenate([x, -x]), -127, 127, 0)
    return dequantised(name, [q[: len(x)].astype(np.int8), scale[0]], axis=1)


def per_tensor_with_a_zero_point(name, x):
    scale, zero, q = scaled(x, 0, 255, None)
    return dequantised(name, [q.astype(np.uint8), scale.reshape(()), zero.reshape(()).astype(np.uint8)])


def per_row(name, x):
    scale, _, q = scaled(np.concatenate([x, -x], axis=1), -127, 127, 1)
    return dequantised(name, [q[:, : x.shape[1]].astype(np.int8), scale[:, 0]], axis=0)


def in_half(name, x):
    """Scales of float16: the numbers are rounded to float16, too."""
    scale, _, q = scaled(np.concatenate([x, -x]), -127, 127, 0)
    made, node = dequantised(name + " half", [q[: len(x)].astype(np.int8), scale[0].astype(np.float16)], axis=1)
    return made, node, helper.make_node("Cast", [name + " half"], [name], to=onnx.TensorProto.FLOAT)


def blocks(bits, block, zeros):
    """MatMulNBits: rows of N, blocks along K; without zero points the middle of the range is 0."""

    def packed(name, x):
        top, middle = 2**bits - 1, 2 ** (bits - 1)
        columns = x.T.reshape(x.shape[1], -1, block)
        if zeros:
            scale, zero, q = scaled(columns, 0, top, 2)
        else:
            scale = np.abs(columns).max(2, keepdims=True) / np.float32(middle - 1)
            zero, q = np.full(scale.shape, middle), np.clip(np.rint(columns / scale) + middle, 0, top)

        def bytes_of(numbers):
            numbers = numbers.astype(np.uint8)
            if bits == 8:
                return numbers
            numbers = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, numbers.shape[-1] % 2)])
            return numbers[..., ::2] | numbers[..., 1::2] << 4

        parts = [bytes_of(q), scale[:, :, 0], *([bytes_of(zero[:, :, 0])] if zeros else [])]
        made = [numpy_helper.from_array(part, f"{name} {i}") for i, part in enumerate(parts)]
        return made, {"K": x.shape[0], "N": x.shape[1], "bits": bits, "block_size": block}

    return packed


def write(folder, quantise):
    """A small GPT-2 whose linear maps are stored by `quantise`."""
    path = folder / "model.onnx"
    config = tiny_config(n_embd=64, n_head=2, head_size=32, n_inner=192)
    write_model(path, config, tiny_sources(config), opset=21, lm_head=True)
    model = onnx.load(path)
    matrices = {t.name: t for t in model.graph.initializer if t.name.endswith("weight") and "c_" in t.name}
    nodes, before = [], []
    for node in model.graph.node:
        if node.op_type != "MatMul" or node.input[1] not in matrices:
            nodes.append(node)
            continue
        tensor = matrices[node.input[1]]
        made, *how = quantise(tensor.name, numpy_helper.to_array(tensor))
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(made)
        if isinstance(how[0], dict):
            inputs = [node.input[0], *(m.name for m in made)]
            node = helper.make_node("MatMulNBits", inputs, node.output, domain="com.microsoft", **how[0])
        else:
            before += how
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend([*before, *nodes])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    return path


FORMS = {
    "int8, a scale a column": (per_column, ("int8", False)),
    "uint8, one scale and zero point": (per_tensor_with_a_zero_point, ("int8", True)),
    "4 bits, blocks of 32": (blocks(4, 32, False), ("int4", False)),
    "4 bits, blocks of 64": (blocks(4, 64, False), ("int4", False)),
    "4 bits, blocks of 32 with zero points": (blocks(4, 32, True), ("int4", True)),
    "8 bits, blocks of 32": (blocks(8, 32, False), ("int8", True)),
    "8 bits, blocks of 32 with zero points": (blocks(8, 32, True), ("int8", True)),
    "4 bits, blocks of 16": (blocks(4, 16, False), ("float32", False)),
    "int8, a scale a row": (per_row, ("float32", False)),
    "int8, scales of float16": (in_half, ("float16", False)),
}


@pytest.mark.parametrize("what", FORMS)
def test_a_quantised_file_is_kept_as_it_is_stored_with_the_same_bits(what, tmp_path):
    quantise, (form, offsets) = FORMS[what]
    path = write(tmp_path, quantise)
    model, plain = gpt2np.load(path), gpt2np.load(path, weights="float32")
    for block in model._weights.h:
        for panels in (
            block.attn.c_attn.weight,
            block.attn.c_proj.weight,
            block.mlp.c_fc.weight,
            block.mlp.c_proj.weight,
        ):
            assert (panels.form, panels.scales.ndim == 4) == (form, offsets)
    assert form == "float32" or f"8 of 9 matrices in {form}" in repr(model)
    caches = model.new_cache(2), plain.new_cache(2)
    for T in (9, 1, 2):
        ids = random_ids(model.config, 2, T)
        got, expected = (m(ids, cache=cache).logits for m, cache in zip((model, plain), caches, strict=True))
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    textbook = gpt2np.load(path, engine="numpy")
    np.testing.assert_allclose(model(ids).logits, textbook(ids).logits, rtol=1e-4, atol=1e-5)
    told = json.loads(CliRunner().invoke(app, ["info", str(path), "--json"]).stdout)
    assert set({**told["levels"], **told["sixteen_bits"]}.values()) == {form}
    name = "h.1.mlp.c_fc.weight"
    if form.startswith("int"):
        stored = as_stored(name, model._sources[name])
        np.testing.assert_array_equal(stored.floats(), textbook.weights.h[1].mlp.c_fc.weight)


def test_tables_are_kept_too_and_what_is_asked_for_comes_first():
    """Rows of integers with one scale and zero point, and the head beside them; the same file in other forms."""
    path = DATA / "int8.onnx"
    model = gpt2np.load(path)
    assert "weights in int8" in repr(model)
    same, plain, narrow = (gpt2np.load(path, weights=form) for form in ("int8", "float32", "int4"))
    ids = random_ids(model.config, 2, 7)
    for other in (same, plain):
        np.testing.assert_array_equal(model(ids).logits.view(np.uint32), other(ids).logits.view(np.uint32))
    assert (model(ids).logits != narrow(ids).logits).any()
    found = {f.way: f.sha256 for f in fingerprints(model)}
    assert "weights in float32" in found
    assert len(set(found.values())) == 1


class Source:
    """Numbers with a guess at their scales."""

    def __init__(self, numbers, steps):
        self.numbers, self.given, self.shape = numbers, steps, numbers.shape

    def load(self):
        return self.numbers.copy()

    def steps(self):
        return self.given


def test_a_wrong_guess_at_the_scales_is_found_out():
    levels = np.arange(-60, 68, dtype=np.int8).reshape(64, 2)
    steps = np.broadcast_to(np.array([[0.1, -3e-5]], np.float32), levels.shape)
    numbers = levels * steps
    stored = as_stored("h.0.mlp.c_fc.weight", Source(numbers, steps))
    assert isinstance(stored, Quantised)
    np.testing.assert_array_equal(stored.levels, levels)
    table = as_stored("wte.weight", Source(numbers.T.copy(), steps.T))
    np.testing.assert_array_equal(table.levels, levels)
    for wrong in (np.nextafter(steps, np.float32(1)), steps * 2, steps * 0, steps * np.float32(1e-38), steps + np.inf):
        assert as_stored("h.0.mlp.c_fc.weight", Source(numbers, wrong)) is None
    for wrong in (np.inf, np.nan, 0.05, 1e3, -0.0):
        odd = numbers.copy()
        odd[3, 0] = wrong
        assert as_stored("h.0.mlp.c_fc.weight", Source(odd, steps)) is None
    assert as_stored("h.0.mlp.c_fc.weight", Source(numbers.astype(np.float64), steps)) is None
