"""Layers that are written alike are looked at once; one that differs in anything at all is looked at for itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from gpt2np import InferenceSession
from gpt2np.convert.writer import write_model
from gpt2np.errors import Gpt2npError, UnsupportedModelError
from gpt2np.masks import MaskRule
from gpt2np.onnx.normalise.build import build_graph
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import Recognised, recognise
from gpt2np.onnx.recognise.blocks import find_borders
from gpt2np.onnx.recognise.forms import Likeness, cache_outputs, find_alike
from gpt2np.onnx.recognise.inputs import find_inputs
from runtime import DATA, assert_close, feeds_for
from tiny import tiny_config, tiny_sources


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the zoo's exporter writes it: each layer has a mask buffer and constants of its own."""
    path = tmp_path_factory.mktemp("alike") / "model.onnx"
    config = tiny_config(n_layer=3, mask=MaskRule(value=-1e4))
    write_model(path, config, tiny_sources(config), opset=10, lm_head=False, with_past=False)
    return path


def alike(path: Path) -> list[Likeness | None]:
    graph = build_graph(open_model(path))
    borders = find_borders(graph)
    return find_alike(graph, borders, find_inputs(graph, borders).roles, cache_outputs(graph, borders))


def firsts(path: Path) -> list[int]:
    return [i if like is None else like.first for i, like in enumerate(alike(path))]


@pytest.mark.parametrize("name", ["own", "optimum_past", "old_past", "dynamo_20", "dynamo_23", "q4", "int8"])
def test_what_is_found_of_one_layer_is_what_each_says_itself(sound, monkeypatch, name):
    path = sound if name == "own" else DATA / f"{name}.onnx"
    assert set(firsts(path)) == {0}

    def words(found: Recognised) -> list[object]:
        weights = {n: (s.shape, s.origin, s.through) for n, s in found.sources.items()}
        taps = {n: tap.tensor for n, tap in found.taps.items()}
        ledger = [(id_of.node.outputs[0], id_of.role, id_of.tap) for id_of in found.ledger]
        more = found.inputs, found.outputs, sorted(found.ignored), sorted(found.notes), found.positions
        return [found.config, weights, taps, sorted(ledger), *more]

    once = words(recognise(open_model(path)))
    monkeypatch.setitem(recognise.__globals__, "find_alike", lambda graph, borders, *_: [None] * len(borders.layers))
    assert once == words(recognise(open_model(path)))


Change = Callable[[onnx.GraphProto], None]


def node(graph: onnx.GraphProto, output: str) -> onnx.NodeProto:
    return next(n for n in graph.node if output in n.output)


def constant(output: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A Constant node or an initializer with other numbers."""

    def edit(graph: onnx.GraphProto) -> None:
        held = [t for t in graph.initializer if t.name == output] or [node(graph, output).attribute[0].t]
        tensor = numpy_helper.to_array(held[0])
        held[0].CopyFrom(numpy_helper.from_array(change(tensor.copy()).astype(tensor.dtype), held[0].name))

    return edit


def one_bit(buffer: np.ndarray) -> np.ndarray:
    buffer[..., 9, 4] = 0
    return buffer


def reads(output: str, index: int, name: str) -> Change:
    def edit(graph: onnx.GraphProto) -> None:
        node(graph, output).input[index] = name

    return edit


def attribute(output: str, name: str, value: object) -> Change:
    def edit(graph: onnx.GraphProto) -> None:
        changed = node(graph, output)
        kept = [a for a in changed.attribute if a.name != name]
        del changed.attribute[:]
        changed.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def behind(output: str, op: str) -> Change:
    """One more node behind a value."""

    def edit(graph: onnx.GraphProto) -> None:
        at = next(k for k, n in enumerate(graph.node) if output in n.output)
        maker = graph.node[at]
        maker.output[:] = [f"{o} raw" if o == output else o for o in maker.output]
        graph.node.insert(at + 1, helper.make_node(op, [f"{output} raw"], [output]))

    return edit


A, M = "/h.1/attn/", "/h.1/mlp/"
REFUSED: dict[str, Change] = {
    "a bit of the mask": constant("h.1.attn.bias", one_bit),
    "Relu on the heads": behind(f"{A}Transpose_4_output_0", "Relu"),
    "Abs on q": behind(f"{A}Transpose_output_0", "Abs"),
    "Floor on the stream": behind("/h.1/Add_output_0", "Floor"),
    "the axis of softmax": attribute(f"{A}Softmax_output_0", "axis", 2),
    "heads' axes exchanged": attribute(f"{A}Transpose_4_output_0", "perm", [0, 1, 2, 3]),
    "keys' axes exchanged": attribute(f"{A}Transpose_1_output_0", "perm", [0, 2, 1, 3]),
    "the axis of a mean": attribute("/h.1/ln_1/ReduceMean_output_0", "axes", [1]),
    "half of the exponent": constant(f"{M}Constant_1_output_0", lambda c: c * 0.5),
    "another GELU": constant(f"{M}Constant_2_output_0", lambda c: c * 1.2),
    "the MLP of layer 0": reads(f"{M}c_proj/Reshape_output_0", 0, "/h.0/mlp/Mul_3_output_0"),
    "the tanh of layer 0": reads(f"{M}Add_1_output_0", 0, "/h.0/mlp/Tanh_output_0"),
    "the keys of layer 0": reads(f"{A}MatMul_output_0", 1, "/h.0/attn/Transpose_1_output_0"),
    "the scores of layer 0": reads(f"{A}Div_3_output_0", 0, "/h.0/attn/MatMul_output_0"),
    "the norm of layer 0": reads(f"{M}c_fc/Reshape_output_0", 0, "/h.0/ln_2/Add_1_output_0"),
    "the stream before layer 0": reads("/h.1/Add_output_0", 0, "/h.0/Add_output_0"),
    "masked by itself": reads(f"{A}Mul_output_0", 1, f"{A}Div_3_output_0"),
    "a bias in the place of a factor": reads(f"{A}Mul_1_output_0", 1, f"{A}Constant_23_output_0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_change_in_the_second_layer_alone_is_refused(sound, tmp_path, name):
    model = onnx.load(sound)
    REFUSED[name](model.graph)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError) as error:
        recognise(open_model(tmp_path / "model.onnx"))
    assert "h.1" in str(error.value) or "layer 1" in str(error.value) or "layer norm" in str(error.value)


NOTED: dict[str, tuple[Change, str]] = {
    "epsilon": (constant("/h.1/ln_1/Constant_1_output_0", lambda c: c * 100), "h.1.ln_1.epsilon is 0.00"),
    "scale": (constant(f"{A}Constant_15_output_0", lambda c: c * 2), "h.1.attn.scale is 0.25"),
    "activation": (constant(f"{M}Constant_4_output_0", lambda c: c * 0 + 1), ""),
}


@pytest.mark.parametrize("name", NOTED)
def test_a_number_of_the_second_layer_alone_is_read(sound, tmp_path, name):
    change, note = NOTED[name]
    model = onnx.load(sound)
    change(model.graph)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert firsts(path) == ([0, 1, 0] if note else [0, 0, 0])
    found = recognise(open_model(path))
    assert not note or any(note in n for n in found.notes)
    ours = InferenceSession(path, engine="numpy")
    theirs = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = feeds_for(found, 2, 11)
    for got, expected in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        assert_close(got, expected, name)


def test_a_weight_that_has_another_part_is_compared_like_any_constant(sound, tmp_path):
    """Scores are multiplied by a number that c_proj's product is multiplied by, too: another one in each layer."""
    model = onnx.load(sound)
    graph = model.graph
    for i, number in enumerate((2.0, 2.0, 4.0)):
        graph.initializer.append(numpy_helper.from_array(np.float32(number), f"number {i}"))
        node(graph, f"/h.{i}/attn/Div_3_output_0").input[1] = f"number {i}"
        gemm = node(graph, f"/h.{i}/attn/c_proj/Gemm_output_0")
        at = list(graph.node).index(gemm)
        x, weight, bias = gemm.input
        graph.node[at].CopyFrom(helper.make_node("MatMul", [x, weight], [f"product {i}"]))
        graph.node.insert(at + 1, helper.make_node("Mul", [f"product {i}", f"number {i}"], [f"scaled {i}"]))
        graph.node.insert(at + 2, helper.make_node("Add", [f"scaled {i}", bias], [f"/h.{i}/attn/c_proj/Gemm_output_0"]))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert firsts(path) == [0, 0, 2]
    assert dict(recognise(open_model(path)).config.overrides) == {"h.2.attn.scale": 0.25}


def test_caches_are_not_shared(tmp_path):
    """The second layer reads the first one's cache, by nodes that are the first one's."""
    model = onnx.load(DATA / "optimum_past.onnx")
    names = [i.name for i in model.graph.input if i.name.startswith("past_key_values.1.")]
    for n in model.graph.node:
        n.input[:] = [i.replace("values.1.", "values.0.") if i in names else i for i in n.input]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(Gpt2npError):
        recognise(open_model(tmp_path / "model.onnx"))
