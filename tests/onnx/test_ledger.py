"""The ledger: what is no part of a GPT-2 is refused wherever it stands, and each node that is has one role."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import forms
from gpt2np import InferenceSession
from gpt2np.cli import app
from gpt2np.errors import UnsupportedModelError
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import Recognised, recognise
from runtime import DATA, assert_close, feeds_for

BASE = DATA / "optimum_past.onnx"
FLOAT = TensorProto.FLOAT


def read(path: Path) -> Recognised:
    return recognise(open_model(path))


@pytest.fixture(scope="module")
def sound() -> Recognised:
    return read(BASE)


# Values in every part of the first layer, by their taps.
TAPS = (
    "embed", "h.0.ln_1", "h.0.attn.q", "h.0.attn.k", "h.0.attn.v", "h.0.attn.scores", "h.0.attn.probs",
    "h.0.attn.heads", "h.0.attn.out", "h.0.resid_mid", "h.0.ln_2", "h.0.mlp.c_fc", "h.0.mlp.gelu", "h.0.mlp.out",
    "h.0.resid_post", "ln_f", "logits",
)  # fmt: skip

ONE = {
    "Relu": [], "Abs": [], "Floor": [], "Ceil": [], "Round": [], "Sign": [], "Sqrt": [], "Tanh": [], "Neg": [],
}  # fmt: skip
TWO = {"Max": 0.3, "Min": 0.3, "Mul": 1.1, "Add": 0.1, "Mod": 2.0, "Pow": 2.0}
CASTS = {"int32": TensorProto.INT32, "int64": TensorProto.INT64, "bool": TensorProto.BOOL, "half": TensorProto.FLOAT16}
CHANGES = [*ONE, *TWO, *CASTS, "Clip", "backwards", "rolled"]


def behind(value: str, change: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Nodes that take `value` raw, and give it changed."""
    raw, out = f"{value} raw", value
    constants: list[onnx.TensorProto] = []

    def constant(name: str, number: object, dtype: object = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(number, dtype), f"{value} {name}"))
        return constants[-1].name

    if change in ONE:
        return [helper.make_node(change, [raw], [out])], constants
    if change in TWO:
        more = {"fmod": 1} if change == "Mod" else {}
        return [helper.make_node(change, [raw, constant("c", TWO[change])], [out], **more)], constants
    if change in CASTS:
        there = helper.make_node("Cast", [raw], [f"{raw} cast"], to=CASTS[change])
        return [there, helper.make_node("Cast", [f"{raw} cast"], [out], to=FLOAT)], constants
    if change == "Clip":
        return [helper.make_node("Clip", [raw, constant("low", -0.2), constant("high", 0.2)], [out])], constants
    low, high = constant("low", [-1], np.int64), constant("high", [-(2**62)], np.int64)
    axis, step = constant("axis", [1], np.int64), constant("step", [-1], np.int64)
    if change == "backwards":
        return [helper.make_node("Slice", [raw, low, high, axis, step], [out])], constants
    first, far = constant("first", [1], np.int64), constant("far", [2**62], np.int64)
    zero = constant("zero", [0], np.int64)
    nodes = [
        helper.make_node("Slice", [raw, first, far, axis], [f"{raw} rest"]),
        helper.make_node("Slice", [raw, zero, first, axis], [f"{raw} start"]),
        helper.make_node("Concat", [f"{raw} rest", f"{raw} start"], [out], axis=1),
    ]
    return nodes, constants


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_numbers_is_refused_or_computed_in_every_part(sound, tmp_path, change):
    refused = []
    for tap in TAPS:
        if (tap, change) in {("h.0.mlp.c_fc", "Relu"), ("h.0.mlp.gelu", "Relu")}:
            continue  # an activation of another kind, which may be one that GPT-2s have
        value = sound.taps[tap].tensor
        model = onnx.load(BASE)
        at, node = next((i, n) for i, n in enumerate(model.graph.node) if value in n.output)
        node.output[list(node.output).index(value)] = f"{value} raw"
        nodes, constants = behind(value, change)
        for offset, extra in enumerate(nodes, at + 1):
            model.graph.node.insert(offset, extra)
        model.graph.initializer.extend(constants)
        onnx.save(model, tmp_path / "model.onnx")
        try:
            found = read(tmp_path / "model.onnx")
        except UnsupportedModelError:
            refused.append(tap)
            continue
        # a factor of q, a bias of k, or queries' heads in another order, which is read from the file
        session = InferenceSession(tmp_path / "model.onnx", engine="numpy")
        runtime = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        for sizes in ((2, 9, 0), (1, 3, 5)):
            feeds = feeds_for(found, *sizes)
            for got, expected in zip(session.run(None, feeds), runtime.run(None, feeds), strict=True):
                assert_close(got, expected, f"{change} behind {tap}")
    assert len(refused) >= len(TAPS) - 4


def test_every_node_has_one_role(sound):
    nodes = [id(entry.node) for entry in sound.ledger]
    assert len(set(nodes)) == len(nodes)
    roles = {entry.role for entry in sound.ledger}
    assert {"tokens", "lookup", "residual", "layer norm", "linear map", "softmax", "mask"} <= roles
    softmax = [entry.tap for entry in sound.ledger if entry.node.op == "Softmax"]
    assert softmax == [f"h.{i}.attn.probs" for i in range(sound.config.n_layer)]


def test_info_prints_the_ledger(sound):
    def printed(*options: str) -> str:
        result = CliRunner().invoke(app, ["info", str(BASE), "--nodes", *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    rows = json.loads(printed("--json"))["nodes"]
    assert len(rows) == len(sound.ledger)
    code = (Path(__file__).parents[2] / "gpt2np" / "reference.py").read_text().splitlines()
    lines = {row["role"]: code[row["line"] - 1] for row in rows if row["line"]}
    assert "probs = softmax(" in lines["softmax"]
    assert "q @ keys" in lines["product with keys"]
    assert "reference.py:" in printed()


def test_casts_to_16_bits_are_entered_as_rounding(tmp_path):
    """A file that holds float16 may round to it; one that holds float32 alone may not."""
    for half in (True, False):
        form = forms.Form()
        x = form.embed(form.input("ids", np.int64, "B", "T"))
        x = form.op("Cast", form.op("Cast", x, out="rounded", to=TensorProto.FLOAT16), to=FLOAT)
        form.head(form.blocks(x, forms.written_out(forms.causal)))
        if half:
            last = next(t for t in form.initializers if t.name == "ln_f.bias")
            last.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(last).astype(np.float16), "half"))
            form.nodes.insert(0, helper.make_node("Cast", ["half"], ["ln_f.bias"], to=FLOAT))
        path = form.save(tmp_path / "model.onnx")
        if half:
            found = read(path)
            assert [e.node.outputs for e in found.ledger if e.role == "rounding"] == [("rounded",)]
            assert "rounds values to 16 bits, by 1 Cast nodes (at embed)" in " ".join(found.notes)
        else:
            with pytest.raises(UnsupportedModelError, match="rounds to 16 bits in a file whose weights have more"):
                read(path)


@pytest.mark.parametrize("value", ["h.0.mlp.c_fc.weight", "mask"])
def test_dropout_in_training_is_refused_on_constants_and_sizes_too(tmp_path, value):
    for training in (False, True):
        form = forms.Form()

        def drop(x, form=form, training=training):
            ratio, switch = form.constant(0.5, np.float32), form.constant(training, np.bool_)
            return form.op("Dropout", x, ratio, switch)

        def masked(form, scores):
            T, S = form.size(scores, 2), form.size(scores, 3)
            rows = form.op(
                "Slice", form.constant(np.triu(np.full((24, 24), -1e4, np.float32), 1)), form.op("Sub", S, T), S
            )
            added = form.op("Slice", rows, form.ints(0), S, form.ints(1))
            return form.op("Add", scores, drop(added) if value == "mask" else added)

        form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), forms.written_out(masked)))
        if value != "mask":
            reader = next(n for n in form.nodes if value in n.input)
            at = form.nodes.index(reader)
            dropped = drop(value)
            form.nodes.insert(at, form.nodes.pop())
            reader.input[1] = dropped
        path = form.save(tmp_path / "model.onnx")
        if training:
            with pytest.raises(UnsupportedModelError, match="drops values by chance"):
                read(path)
        else:
            read(path)


@pytest.mark.parametrize("hidden", [-1e4, -np.inf])
def test_keys_that_show_only_behind_a_longer_past_are_noticed(tmp_path, hidden):
    """The position of a key is 8 at most: later keys are visible from there on, with a past and several new ones."""

    def capped(form, scores):
        T, S = form.size(scores, 2), form.size(scores, 3)
        zero, one = form.constant(0, np.int64), form.constant(1, np.int64)
        first, end = form.op("Squeeze", form.op("Sub", S, T)), form.op("Squeeze", S)
        query = form.op("Unsqueeze", form.op("Range", first, end, one), form.ints(1))
        most = form.op("Max", form.op("Expand", first, S), form.constant(8, np.int64))
        key = form.op("Min", form.op("Range", zero, end, one), most)
        keep = form.op("LessOrEqual", form.op("Max", key, zero), query)
        whole = form.op("Range", zero, end, one)
        alone = form.op("Equal", form.op("Expand", first, S), zero)
        keep = form.op("Where", alone, form.op("LessOrEqual", whole, query), keep)
        return form.op("Where", keep, scores, form.constant(hidden, np.float32))

    form = forms.Form()
    ids = form.input("ids", np.int64, "B", "T")
    form.head(form.blocks(form.embed(ids, "past_key_0", 2), forms.written_out(capped, past=True)))
    with pytest.raises(UnsupportedModelError, match="the mask of layer 0"):
        read(form.save(tmp_path / "model.onnx"))


@pytest.mark.parametrize("change", ["", "bool", "int8", "Mod", "reversed"])
def test_token_types_must_be_those_that_are_given(tmp_path, change):
    form = forms.Form()
    ids, types = (form.input(name, np.int64, "B", "T") for name in ("ids", "token_type_ids"))
    if change in ("bool", "int8"):
        there = form.op("Cast", types, to=TensorProto.BOOL if change == "bool" else TensorProto.INT8)
        types = form.op("Cast", there, to=TensorProto.INT64)
    elif change == "Mod":
        types = form.op("Mod", types, form.constant(2, np.int64))
    elif change == "reversed":
        types = form.op("Slice", types, form.ints(-1), form.ints(-(2**62)), form.ints(1), form.ints(-1))
    x = form.op("Add", form.embed(ids), form.op("Gather", "wte.weight", types))
    form.head(form.blocks(x, forms.written_out(forms.causal)))
    path = form.save(tmp_path / "model.onnx")
    if change in ("", "int8"):  # its vocabulary is small
        assert [p.role for p in read(path).inputs] == ["input_ids", "token_type_ids"]
    else:
        with pytest.raises(UnsupportedModelError):
            read(path)


@pytest.mark.parametrize("where", ["before", "behind", "not at all"])
def test_an_activation_that_changes_with_the_length_is_refused(tmp_path, where):
    class Form(forms.Form):
        def op(self, op, *inputs, **how):
            if op != "Gelu" or where == "not at all":
                return super().op(op, *inputs, **how)
            share = super().op(
                "Div", super().op("Cast", self.size(inputs[0], 1), to=FLOAT), self.constant(4.0, np.float32)
            )
            x = super().op("Mul", inputs[0], share) if where == "before" else inputs[0]
            x = super().op("Gelu", x, **how)
            return super().op("Mul", x, share) if where == "behind" else x

    form = Form()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), forms.written_out(forms.causal)))
    path = form.save(tmp_path / "model.onnx")
    if where == "not at all":
        read(path)
    else:
        with pytest.raises(UnsupportedModelError, match="changes with the number of positions"):
            read(path)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("change", ["", "weight", "bias", "norm"])
def test_keys_that_are_handed_out_come_from_the_weights_that_are_used(tmp_path, layer, change):
    """A second copy of c_attn may make the presents, as optimisers leave it; another map may not."""

    def attention(form, i, x):
        q, k, v = (forms.split_heads(form, part) for part in forms.qkv(form, i, x))
        names = {part: f"h.{i}.attn.c_attn.{part}" for part in ("weight", "bias")}
        if change in names and i == layer:
            held = numpy_helper.to_array(next(t for t in form.initializers if t.name == names[change])).copy()
            held.flat[-1] += 0.5
            names[change] = form.constant(held)
        source = form.op("Mul", x, form.constant(1.5, np.float32)) if change == "norm" and i == layer else x
        again = form.op("Add", form.op("MatMul", source, names["weight"]), names["bias"])
        parts = [f"again_{what}_{i}" for what in "qkv"]
        form.op("Split", again, out=parts, axis=2, num_outputs=3)
        for what, part in zip(("key", "value"), parts[1:], strict=True):
            form.op(
                "Identity",
                forms.split_heads(form, part),
                out=form.output(f"present_{what}_{i}", "B", forms.H, "S", forms.D),
            )
        scores = form.op("MatMul", q, form.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = forms.causal(form, form.op("Mul", scores, form.constant(forms.D**-0.5, np.float32)))
        heads = form.op("MatMul", form.op("Softmax", scores, axis=-1), v)
        return form.op("Reshape", form.op("Transpose", heads, perm=[0, 2, 1, 3]), form.ints(0, 0, forms.C))

    form = forms.Form()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), attention))
    path = form.save(tmp_path / "model.onnx")
    if not change:
        assert {p.role for p in read(path).outputs} == {"logits", "present_key", "present_value"}
    else:
        with pytest.raises(UnsupportedModelError, match=f"_{layer}'"):
            read(path)
