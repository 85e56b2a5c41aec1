"""Hostile files: whatever the bytes, the reader answers with arrays or a ModelFileError, in bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from test_reader import external, model_of, same

from gpt2np.convert.huggingface import read_checkpoint
from gpt2np.convert.writer import write_model
from gpt2np.errors import Gpt2npError, ModelFileError
from gpt2np.onnx.read.reader import open_model
from tiny import tiny_config, tiny_sources

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
ROOM = 16 << 20  # bytes that opening and loading a small file may take, whatever it claims


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


class Seeds(list[bytes]):
    def __repr__(self) -> str:  # hypothesis prints arguments
        return "seeds"


@pytest.fixture(scope="module")
def seeds(folder: Path) -> Seeds:
    """Sound files of several makes."""
    (folder / "w.bin").write_bytes(bytes(range(256)) * 20)
    config = tiny_config(n_layer=1)
    small = np.arange(8, dtype=np.float32)
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(500)))],
        "body",
        [],
        [helper.make_tensor_value_info("c", TensorProto.DOUBLE, [500])],
        [numpy_helper.from_array(np.arange(400, dtype=np.int16), "w")],
    )
    nodes = [helper.make_node("If", ["b"], ["y"], then_branch=body, else_branch=body)]
    made = [
        model_of(
            helper.make_tensor("ints", TensorProto.INT32, [400], list(range(-200, 200))),
            helper.make_tensor("half", TensorProto.FLOAT16, [300], [0.5] * 300),
            helper.make_tensor("quarter", TensorProto.INT4, [301], [1, -2, 3] * 100 + [5]),
            helper.make_tensor("bits", TensorProto.UINT64, [300], [2**63 + i for i in range(300)]),
            helper.make_tensor("float", TensorProto.FLOAT, [300], [1.5] * 300),
            numpy_helper.from_array(small, "small"),
        ),
        model_of(external("e", small, location="w.bin", offset="64", length="32"), nodes=nodes),
    ]
    for options in ({}, {"opset": 18, "lm_head": True, "with_past": True}):
        write_model(folder / "seed.onnx", config, tiny_sources(config), **options)
        made.append((folder / "seed.onnx").read_bytes())
    return Seeds(m if isinstance(m, bytes) else m.SerializeToString() for m in made)


def check(path: Path, data: bytes) -> None:
    """Open and load everything in bounded memory; what onnx can read as well must be the same."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        loaded: dict[str, np.ndarray] = {}
        file = open_model(path)
        for name, tensor in file.tensors.items():
            try:
                loaded[name] = tensor.load()
            except ModelFileError:
                continue
            assert loaded[name].shape == tensor.shape
    except ModelFileError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < ROOM + 8 * len(data)
    try:
        initializers = onnx.load_model_from_string(data).graph.initializer if loaded else []
    except DecodeError:  # in the payload of a tensor that did not load here either
        assert len(loaded) < len(file.tensors)
        return
    for tensor in initializers:
        if tensor.name in loaded:
            try:
                expected = numpy_helper.to_array(tensor, str(path.parent))
            except Exception:  # onnx's own limits are not in question
                continue
            assert same(loaded[tensor.name], expected)


PLACES = st.integers(0, 1 << 20)
# Most of a file is payload: prefer the structure at both ends.
CHANGES = st.tuples(st.sampled_from([64, 600, 1 << 20]), PLACES, st.booleans(), st.integers(0, 255))


@FUZZ
@given(st.integers(0, 3), st.lists(CHANGES, min_size=1, max_size=8))
def test_changed_bytes(folder: Path, seeds: Seeds, seed: int, changes: list[tuple[int, int, bool, int]]) -> None:
    content = bytearray(seeds[seed])
    for region, place, from_end, byte in changes:
        place %= min(region, len(content))
        content[-1 - place if from_end else place] = byte
    check(folder / "model.onnx", bytes(content))


@FUZZ
@given(st.integers(0, 3), st.integers(0, 3), PLACES, PLACES, PLACES, PLACES, st.sampled_from([None, b"", b"\xff" * 20]))
def test_cut_and_spliced_bytes(
    folder: Path, seeds: Seeds, seed: int, other: int, a: int, b: int, c: int, d: int, middle: bytes | None
) -> None:
    content, foreign = seeds[seed], seeds[other]
    a, b = sorted(place % len(content) for place in (a, b))
    c, d = sorted(place % len(foreign) for place in (c, d))
    check(folder / "model.onnx", content[:a] + (foreign[c:d] if middle is None else middle) + content[b:])


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(folder: Path, content: bytes) -> None:
    check(folder / "model.onnx", content)


SIZES = st.one_of(st.integers(0, 6), st.sampled_from([-1, 400, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]))
NUMBERS = st.one_of(st.integers(0, 100), SIZES).map(str)
TEXTS = st.one_of(NUMBERS, st.text(max_size=5), st.just("9" * 5000))
LOCATIONS = st.sampled_from(["w.bin", "../w.bin", ".", "", "none", "/dev/zero", "/proc/self/environ", "model.onnx"])


@st.composite
def tensors(draw: Any) -> TensorProto:
    """A TensorProto whose fields need not fit one another."""
    tensor = TensorProto(name="t", data_type=draw(st.integers(0, 30)))
    tensor.dims.extend(draw(st.lists(SIZES, max_size=4)))
    count = draw(st.sampled_from([0, 1, 6, 24, 400]))
    if draw(st.booleans()):
        tensor.raw_data = bytes(count * draw(st.sampled_from([1, 2, 4, 8])))
    for field in draw(st.sets(st.sampled_from(["float_data", "int32_data", "int64_data", "double_data"]), max_size=1)):
        getattr(tensor, field).extend([1] * count)
    if draw(st.booleans()):
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=draw(LOCATIONS))
        for key in draw(st.sets(st.sampled_from(["offset", "length", "checksum", ""]))):
            tensor.external_data.add(key=key, value=draw(TEXTS))
    return tensor


@FUZZ
@given(tensors())
def test_fields_that_do_not_fit(folder: Path, seeds: Seeds, tensor: TensorProto) -> None:
    check(folder / "model.onnx", model_of(tensor).SerializeToString())


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), SIZES, st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)


@FUZZ
@given(st.data())
def test_safetensors(folder: Path, data: st.DataObject) -> None:
    entry = st.fixed_dictionaries(
        {"dtype": st.sampled_from(["F32", "BF16", "I64", "X"]), "shape": st.lists(SIZES, max_size=3)},
        optional={"data_offsets": st.one_of(st.lists(SIZES, max_size=3), JSON)},
    )
    names = st.sampled_from(["wte.weight", "transformer.wte.weight", "x", "__metadata__"])
    header = json.dumps(data.draw(st.one_of(JSON, st.dictionaries(names, st.one_of(entry, JSON))))).encode()
    length = data.draw(st.sampled_from([len(header), len(header) + 1, 0, 2**63, 2**40]))
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(24))
    config = {"n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 3, "vocab_size": 5}
    keys = st.sampled_from([*config, "model_type", "layer_norm_epsilon", "activation_function", "n_inner"])
    changes = data.draw(st.dictionaries(keys, JSON, max_size=2))
    (folder / "config.json").write_text(json.dumps(config | changes))
    tracemalloc.start()
    try:
        with pytest.raises(Gpt2npError):
            read_checkpoint(folder / "model.safetensors")
        assert tracemalloc.get_traced_memory()[1] < ROOM
    finally:
        tracemalloc.stop()
