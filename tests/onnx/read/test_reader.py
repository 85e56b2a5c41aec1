"""The reader gives what onnx gives, in one copy; and says what is wrong with a file that is wrong."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gpt2np.errors import InputError, ModelFileError
from gpt2np.onnx.read.reader import ModelFile, open_model
from gpt2np.onnx.read.wire import bytes_field, encode_varint

INTEGERS = ["UINT2", "INT2", "UINT4", "INT4", "UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64"]
FLOATS = ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"]
SMALL_FLOATS = ["FLOAT4E2M1", "FLOAT8E8M0", "FLOAT6E2M3", "FLOAT6E3M2"]
KINDS = [k for k in (*INTEGERS, *FLOATS, *SMALL_FLOATS, "BOOL") if k in TensorProto.DataType.keys()]  # noqa: SIM118


def model_of(*tensors: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    nodes = nodes or [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "g", [], [], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def save(folder: Path, model: onnx.ModelProto | bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def values(kind: str, count: int) -> np.ndarray:
    """Values of a type that cover its range, and survive a round trip."""
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind))
    rng = np.random.default_rng(1)
    if kind == "BOOL":
        return rng.integers(0, 2, count).astype(bool)
    if dtype.kind in "iu" and dtype.itemsize > 1:
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, count, dtype, endpoint=True)
    if kind in INTEGERS:
        bits = int(kind.lstrip("UINT"))
        low = 0 if kind.startswith("U") else -(2 ** (bits - 1))
        return rng.integers(low, low + 2**bits, count).astype(dtype)
    return np.abs(rng.standard_normal(count) * 3).astype(np.float32).astype(dtype)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal type, shape and values, NaN included."""
    if a.dtype.kind == "V" or a.dtype.itemsize == 1:  # ml_dtypes' types; compare what they mean
        wide = np.int64 if "int" in a.dtype.name else np.float32
        return a.dtype == b.dtype and np.array_equal(a.astype(wide), b.astype(wide), equal_nan=wide is np.float32)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("count", [0, 7, 4099])  # in the skeleton, and stripped from it; odd: packed types have a rest
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_every_type(tmp_path: Path, kind: str, raw: bool, count: int) -> None:
    array = values(kind, count)
    tensor = numpy_helper.from_array(array, "t")
    if not raw:
        packed = kind in ("UINT2", "INT2", "UINT4", "INT4", "FLOAT4E2M1")
        data = np.frombuffer(tensor.raw_data, np.uint8) if packed else array
        if not packed and array.dtype.itemsize <= 2 and array.dtype.kind not in "iu":
            data = array.view(f"u{array.dtype.itemsize}")  # int32_data holds the bits
        tensor.ClearField("raw_data")
        field = helper.tensor_dtype_to_field(tensor.data_type)
        getattr(tensor, field).extend(data.tolist())
    expected = numpy_helper.to_array(tensor) if count else array
    assert same(expected, array)  # onnx reads what this test wrote

    found = open_model(save(tmp_path, model_of(tensor))).tensors["t"]
    loaded = found.load()
    assert (found.dtype, found.shape) == (array.dtype, (count,))
    assert same(np.concatenate([block.copy() for block in found.blocks(100)]), array)
    assert same(loaded, array)
    if count:
        assert found.origin == ("raw_data" if raw else field)
        if raw:
            assert found.nbytes == len(tensor.raw_data)


def test_arrays_are_aligned_writable_and_the_callers_own(tmp_path: Path) -> None:
    array = np.arange(1500, dtype=np.float32).reshape(3, 500)
    small = np.arange(6, dtype=np.float32).reshape(2, 3)
    file = open_model(
        save(tmp_path, model_of(numpy_helper.from_array(array, "t"), numpy_helper.from_array(small, "s")))
    )
    for name, expected in (("t", array), ("s", small)):
        first, second = file.tensors[name].load(), file.tensors[name].load()
        assert first.ctypes.data % 64 == 0
        assert first.flags.c_contiguous
        assert first.flags.writeable
        first[:] = 0
        assert np.array_equal(second, expected)
        assert np.array_equal(file.tensors[name].load(), expected)


def test_skeleton_keeps_structure_and_small_tensors_only(tmp_path: Path) -> None:
    big, small = np.zeros((1000, 100), np.float32), np.array([2, -1], np.int64)
    model = model_of(numpy_helper.from_array(big, "big"), numpy_helper.from_array(small, "small"))
    file = open_model(save(tmp_path, model))
    assert file.proto.ByteSize() < 1000
    by_name = {t.name: t for t in file.proto.graph.initializer}
    assert not by_name["big"].raw_data
    assert list(by_name["big"].dims) == [1000, 100]
    assert np.array_equal(numpy_helper.to_array(by_name["small"]), small)
    assert file.proto.graph.node == model.graph.node
    assert file.nbytes == file.path.stat().st_size
    assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()


def test_finds_constants_and_tensors_inside_bodies(tmp_path: Path) -> None:
    big = [np.full(1000, i, np.float32) for i in range(4)]

    def body(i: int) -> onnx.GraphProto:
        constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(big[i]))
        other = helper.make_node("Add", ["c", "w"], ["out"])
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1000])
        return helper.make_graph([constant, other], "body", [], [out], [numpy_helper.from_array(big[i + 1], "w")])

    nodes = [
        helper.make_node("Constant", [], ["top"], value=numpy_helper.from_array(big[3])),
        helper.make_node("If", ["condition"], ["y"], then_branch=body(0), else_branch=body(2)),
    ]
    file = open_model(save(tmp_path, model_of(nodes=nodes)))
    assert file.proto.ByteSize() < 1000
    assert set(file.tensors) == {"top", "c", "w"}
    assert np.array_equal(file.tensors["top"].load(), big[3])
    assert np.array_equal(file.tensors["c"].load(), big[2])  # of two with one name, the first: else_branch
    for attribute in file.proto.graph.node[1].attribute:
        i = 0 if attribute.name == "then_branch" else 2
        assert np.array_equal(file.tensor(attribute.g.node[0].attribute[0].t).load(), big[i])
        assert np.array_equal(file.tensor(attribute.g.initializer[0]).load(), big[i + 1])


def wire(number: int, kind: int, content: bytes) -> bytes:
    return encode_varint(number << 3 | kind) + content


def test_reads_unusual_but_lawful_encodings(tmp_path: Path) -> None:
    """Protobuf lets a writer leave numbers unpacked, cut packed ones in two, and repeat a field."""
    floats = np.arange(600, dtype=np.float32)
    head = TensorProto(name="f", dims=[600], data_type=TensorProto.FLOAT).SerializeToString()
    unpacked = b"".join(wire(4, 5, v.tobytes()) for v in floats[:300]) + bytes_field(4, floats[300:].tobytes())
    ints = np.arange(-300, 300)
    head2 = TensorProto(name="i", dims=[600], data_type=TensorProto.INT64).SerializeToString()
    varints = [encode_varint(int(v) % 2**64) for v in ints]
    split = bytes_field(7, b"".join(varints[:7])) + b"".join(wire(7, 0, v) for v in varints[7:])
    head3 = TensorProto(name="r", dims=[600], data_type=TensorProto.FLOAT).SerializeToString()
    twice = bytes_field(9, b"\xff" * 2400) + bytes_field(9, floats.tobytes())  # the last one counts
    tensors = b"".join(bytes_field(5, t) for t in (head + unpacked, head2 + split, head3 + twice))
    graph = helper.make_graph([helper.make_node("Identity", ["f"], ["y"])], "g", [], []).SerializeToString()
    data = bytes_field(7, graph) + bytes_field(7, tensors) + wire(1, 0, b"\x08") + bytes_field(999, b"unknown")
    reference = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(data).graph.initializer}
    file = open_model(save(tmp_path, data))
    assert set(file.tensors) == set(reference) == {"f", "i", "r"}
    for name, expected in reference.items():
        assert same(file.tensors[name].load(), expected)


def test_int32_data_keeps_negative_numbers(tmp_path: Path) -> None:
    array = np.tile(np.array([-128, -1, 0, 1, 127], np.int8), 300)
    tensor = helper.make_tensor("t", TensorProto.INT8, [1500], array.tolist())
    assert np.array_equal(open_model(save(tmp_path, model_of(tensor))).tensors["t"].load(), array)


# --- external data -------------------------------------------------------------------------------------------


def external(name: str, array: np.ndarray, **entries: str | None) -> TensorProto:
    tensor = numpy_helper.from_array(array, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = np.arange(5, dtype=np.int64)


def test_external_data_in_several_files(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "one.bin").write_bytes(b"\0" * 16 + A.tobytes() + B.tobytes())
    (tmp_path / "part" / "two.bin").write_bytes(B.tobytes())
    tensors = (
        external("a", A, location="one.bin", offset="16", length="48"),
        external("b", B, location="one.bin", offset="64"),  # no length: as much as it needs
        external("c", B, location="part/two.bin", length="40"),
        external("d", A, location="./one.bin", offset="16"),
    )
    file = open_model(save(tmp_path, model_of(*tensors)))
    for name, expected in {"a": A, "b": B, "c": B, "d": A}.items():
        assert same(file.tensors[name].load(), expected)
    assert file.tensors["a"].origin == "external one.bin@16"
    assert [p.name for p in file.files] == ["model.onnx", "one.bin", "two.bin"]
    assert file.nbytes == sum(p.stat().st_size for p in file.files)


OUTSIDE = ["../outside.bin", "sub/../../outside.bin", "/etc/hostname", "C:\\outside.bin", "..\\outside.bin", "link.bin"]


@pytest.mark.parametrize("location", OUTSIDE)
def test_external_data_stays_in_the_models_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside.bin").write_bytes(A.tobytes())
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    path = save(folder, model_of(external("weight", A, location=location)))
    with pytest.raises(ModelFileError, match="'weight'.*outside of the model's folder"):
        open_model(path)


def test_a_linked_folder_does_not_lead_outside_either(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(A.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelFileError, match="outside of the model's folder"):
        open_model(save(folder, model_of(external("weight", A, location="sub/w.bin"))))


def test_reads_a_download_cache_of_links(tmp_path: Path) -> None:
    """Hugging Face's cache: snapshots/x/model.onnx and its data are both links into blobs/."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "x"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save(blobs, model_of(external("weight", A, location="model.onnx_data"))).rename(blobs / "1234")
    (blobs / "5678").write_bytes(A.tobytes())
    (snapshot / "model.onnx").symlink_to(blobs / "1234")
    (snapshot / "model.onnx_data").symlink_to(blobs / "5678")
    assert same(open_model(snapshot).tensors["weight"].load(), A)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "w.bin", "offset": "8"}, "only 48 of the 48 bytes from byte 8"),
        ({"location": "w.bin", "offset": "99999999999"}, "from byte 99999999999"),
        ({"location": "w.bin", "offset": "-4"}, "offset '-4' is not a size"),
        ({"location": "w.bin", "offset": "9" * 5000}, "is not a size"),
        ({"location": "w.bin", "length": "47"}, "length is 47 bytes, not 48"),
        ({"location": "w.bin", "length": "1e3"}, "length '1e3' is not a size"),
        ({"location": "missing.bin"}, "'missing.bin' cannot be read"),
        ({"location": "a\0b"}, "cannot be read"),
        ({"location": "x" * 5000}, "cannot be read"),
        ({"location": "loop"}, "cannot be read"),
        ({"location": "pipe"}, "not a regular file"),
        ({"location": "folder"}, "not a regular file"),
        ({}, "no location"),
    ],
)
def test_external_data_is_checked(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    (tmp_path / "w.bin").write_bytes(A.tobytes())
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match=message):
        open_model(save(tmp_path, model_of(external("weight", A, **entries))))


# --- files that are wrong ----------------------------------------------------------------------------------------


def changed(change: Callable[[TensorProto], object], count: int) -> TensorProto:
    tensor = numpy_helper.from_array(np.arange(count, dtype=np.float32), "weight")
    change(tensor)
    return tensor


def typed_as_well(tensor: TensorProto) -> None:
    tensor.float_data.extend(np.frombuffer(tensor.raw_data, np.float32).tolist())


def in_wrong_field(tensor: TensorProto) -> None:
    tensor.int64_data.extend(range(tensor.dims[0]))
    tensor.ClearField("raw_data")


@pytest.mark.parametrize("count", [8, 800])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.dims.append(2), "raw_data holds"),
        (lambda t: t.dims.__setitem__(0, -1), "impossible shape"),
        (lambda t: t.dims.__setitem__(0, 2**40), "raw_data holds"),
        (lambda t: t.dims.extend([2**62, 2**62]), "impossible shape"),
        (lambda t: t.dims.extend([0, 2**62]), "impossible shape"),
        (lambda t: t.dims.extend([1] * 60), "61 dims"),
        (lambda t: setattr(t, "data_type", 0), "unknown element type 0"),
        (lambda t: setattr(t, "data_type", 4711), "unknown element type 4711"),
        (lambda t: setattr(t, "data_type", TensorProto.DOUBLE), "raw_data holds"),
        (lambda t: setattr(t, "raw_data", t.raw_data[:-1]), "raw_data holds"),
        (lambda t: t.ClearField("raw_data"), "no values"),
        (typed_as_well, "more than one place"),
        (in_wrong_field, "in int64_data, not in float_data"),
        (lambda t: setattr(t, "data_location", TensorProto.EXTERNAL), "in more than one place"),
        (lambda t: setattr(t, "name", ""), "nameless"),
    ],
)
def test_contradictions_are_named(
    tmp_path: Path, change: Callable[[TensorProto], object], message: str, count: int
) -> None:
    with pytest.raises(ModelFileError, match=message):
        open_model(save(tmp_path, model_of(changed(change, count))))


def test_two_initializers_of_one_name(tmp_path: Path) -> None:
    tensor = numpy_helper.from_array(A, "weight")
    with pytest.raises(ModelFileError, match="'weight' is nameless or given twice"):
        open_model(save(tmp_path, model_of(tensor, tensor)))


@pytest.mark.parametrize("count", [3, 3000])
def test_strings_and_complex_numbers_cannot_be_loaded(tmp_path: Path, count: int) -> None:
    text = helper.make_tensor("text", TensorProto.STRING, [count], [b"word"] * count)
    number = numpy_helper.from_array(np.ones(count, np.complex64), "number")
    file = open_model(save(tmp_path, model_of(text, number)))
    with pytest.raises(ModelFileError, match="'text' holds strings"):
        file.tensors["text"].load()
    with pytest.raises(ModelFileError, match="'number' holds complex"):
        file.tensors["number"].load()


def test_a_bool_is_0_or_1(tmp_path: Path) -> None:
    tensor = TensorProto(name="t", dims=[2000], data_type=TensorProto.BOOL, raw_data=b"\1" * 1999 + b"\2")
    with pytest.raises(ModelFileError, match="neither 0 nor 1"):
        open_model(save(tmp_path, model_of(tensor))).tensors["t"].load()


@pytest.mark.parametrize("payload", [b"\x80" * 4000, b"\x01" * 3999, b"\x01" * 4001, b"\x01" * 3999 + b"\x80"])
def test_varints_must_fill_the_shape(tmp_path: Path, payload: bytes) -> None:
    head = TensorProto(name="t", dims=[4000], data_type=TensorProto.INT64).SerializeToString()
    graph = bytes_field(5, head + bytes_field(7, payload)) + bytes_field(
        1, helper.make_node("Identity", ["t"], ["y"]).SerializeToString()
    )
    path = save(tmp_path, bytes_field(7, graph))
    with pytest.raises(ModelFileError, match="'t'"):
        open_model(path).tensors["t"].load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html>not found</html>", "is a web page"),
        (b"\n <HTML><body>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"\x1f\x8b\x08" + b"\0" * 50, "archive"),
        (b"PK\x03\x04" + b"\0" * 50, "archive"),
        (b'{"error": "gone"}', "JSON"),
        ((64).to_bytes(8, "little") + b'{"__metadata__":{}}', "safetensors"),
        (b"just a text file\n" * 100, "not a sound ONNX file: at byte"),
        (b"\x93NUMPY\x01\0" + b"\0" * 100, "not a sound ONNX file: at byte"),
        (bytes_field(7, bytes_field(2, b"name")), "no graph with nodes"),
        (bytes_field(2, b"producer"), "no graph with nodes"),
        (wire(1, 0, b"\x08") + wire(7, 3, b""), "at byte 2, in model: wire type 3"),
        (wire(1, 0, b"\xff" * 11), "at byte 1, in model: a varint that does not end"),
        (bytes_field(7, b"ab")[:1] + b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "takes 9223372036854775807 bytes"),
        (wire(0, 0, b"\1"), "field number 0"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        open_model(save(tmp_path, content))


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    node = bytes_field(1, b"\xff\xfe") + bytes_field(2, b"y") + bytes_field(4, b"Identity")
    with pytest.raises(ModelFileError, match="not UTF-8"):
        open_model(save(tmp_path, bytes_field(7, bytes_field(1, node))))


def test_deep_nesting_and_endless_fields(tmp_path: Path) -> None:
    graph = b""
    for _ in range(60):  # a graph in an attribute of a node of a graph ...
        graph = bytes_field(1, bytes_field(5, bytes_field(6, graph + bytes_field(10, b"x" * 1100))))
    with pytest.raises(ModelFileError, match="nested more than"):
        open_model(save(tmp_path, bytes_field(7, graph)))
    with pytest.raises(ModelFileError, match="more than 1048576 fields"):
        open_model(save(tmp_path, b"\x08\x01" * 1_100_000))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        open_model(tmp_path / "none.onnx")
    with pytest.raises(ModelFileError, match="no model in the folder"):
        open_model(tmp_path)
    with pytest.raises(InputError, match="expected a path"):
        open_model("a\0b")
    model = model_of(numpy_helper.from_array(A, "w")).SerializeToString()
    (tmp_path / "decoder.onnx").write_bytes(model)
    assert open_model(tmp_path).path.name == "decoder.onnx"
    (tmp_path / "other.onnx").write_bytes(model)
    with pytest.raises(ModelFileError, match=r"decoder.onnx, other.onnx; name the file"):
        open_model(tmp_path)
    save(tmp_path, model)
    assert open_model(str(tmp_path)).path.name == "model.onnx"


def test_a_file_that_changes_after_it_was_opened(tmp_path: Path) -> None:
    array = np.zeros(2000, np.float32)
    path = save(tmp_path, model_of(numpy_helper.from_array(array, "t")))
    file = open_model(path)
    os.truncate(path, 1500)
    with pytest.raises(ModelFileError, match="changed or replaced"):
        file.tensors["t"].load()
    path.unlink()
    with pytest.raises(ModelFileError, match="No such file"):
        file.tensors["t"].load()


def test_loading_takes_one_copy(tmp_path: Path) -> None:
    """Every allocation of NumPy's is counted, and the largest tensor is half of the model."""
    arrays = [np.ones((1 << 20, 4), np.float32), *(np.ones((1 << 16, 8), np.float32) for _ in range(8))]
    path = save(tmp_path, model_of(*(numpy_helper.from_array(a, f"t{i}") for i, a in enumerate(arrays))))
    total = sum(a.nbytes for a in arrays)
    del arrays
    open_model(path)  # imports
    tracemalloc.start()
    try:
        file = open_model(path)
        _, opening = tracemalloc.get_traced_memory()
        loaded = [tensor.load() for tensor in file.tensors.values()]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(a.nbytes for a in loaded) == total
    assert opening < 0.01 * total
    assert peak < 1.01 * total


@pytest.mark.parametrize(
    "name",
    ["zoo_base", "zoo_lm_head", "optimum_past", "dynamo", "ort_fused", "fp16", "int8_dynamic", "q4", "external_data"],
)
def test_agrees_with_onnx_on_every_exporters_file(fixtures: Path, name: str) -> None:
    check_against_onnx(open_model(fixtures / name))


def check_against_onnx(file: ModelFile) -> None:
    model = onnx.load(file.path)
    assert len(model.graph.initializer) == len(file.proto.graph.initializer)
    for tensor in model.graph.initializer:
        assert same(file.tensors[tensor.name].load(), numpy_helper.to_array(tensor))
    for ours, theirs in zip(file.proto.graph.node, model.graph.node, strict=True):
        assert (ours.op_type, ours.input, ours.output) == (theirs.op_type, theirs.input, theirs.output)
        for a, b in zip(ours.attribute, theirs.attribute, strict=True):
            if a.type == onnx.AttributeProto.TENSOR:
                assert same(file.tensor(a.t).load(), numpy_helper.to_array(b.t))
