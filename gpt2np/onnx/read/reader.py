"""Read an ONNX file: its structure now, each tensor's bytes later, straight into one aligned array.

`onnx.load` copies every payload into protobuf messages first, and so needs twice the weights' memory. Here
the file is walked on the level of protobuf's wire format (https://protobuf.dev/programming-guides/encoding):
what is small is copied into a skeleton that protobuf parses; of a large tensor's payload only the place is
noted. Everything that a file claims (lengths, dims, types, offsets, other files) is checked before memory is
asked for, because model files come from strangers.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ...arguments import as_path
from ...errors import ModelFileError
from ...files import File
from ...optional import needs
from .tensors import Tensor
from .wire import PAYLOADS, VARINT, Walker

if TYPE_CHECKING:
    import onnx

Place = tuple[int, int]  # offset and length in a file
ONNX_DOMAINS = ("", "ai.onnx")
# Types of which several elements share a byte, lowest bits first.
_BITS = {"UINT2": 2, "INT2": 2, "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}


@dataclass
class ModelFile:
    """An ONNX file whose structure has been read and checked; its tensors are read on demand.

    `proto` is the model without the payloads of large tensors: a TensorProto in it may lack its data, so pass
    it to `tensor` instead of onnx.numpy_helper.
    """

    path: Path
    proto: onnx.ModelProto  # (or a TensorProto: see `open_tensor`)
    files: tuple[Path, ...]  # the file itself, then those with external data
    nbytes: int  # of all files together
    _file: File
    _marker: str
    _payloads: list[dict[int, list[tuple[int, int]]]]
    _external: dict[str, File]
    # Every initializer by name, then large values of Constant nodes under the name of their output. Bodies of
    # If and Loop come after the main graph; where two of them use one name, `tensor` tells them apart.
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of model.onnx itself, in hexadecimal."""
        return self._file.sha256()

    def with_graph(self, graph: onnx.GraphProto) -> ModelFile:
        """This file with a graph that is made of its own parts in the place of its graph."""
        import onnx

        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        proto.graph.CopyFrom(graph)
        made = replace(self, proto=proto, tensors={})
        _collect(made, proto.graph, made.tensors)
        return made

    def tensor(self, proto: onnx.TensorProto, name: str = "") -> Tensor:
        """The tensor of any TensorProto of `proto`, checked: initializer, node attribute, or inside a body.

        Raises
        ------
        ModelFileError
            If its type, dims, payload or external file contradict each other.
        """
        fields: dict[int, Any] = {}  # those that are set
        for descriptor, value in proto.ListFields():
            fields[descriptor.number] = value
        name = name or proto.name
        try:
            kind = _element_type(proto.data_type)
        except (KeyError, ValueError):
            raise ModelFileError(f"tensor {name!r} has the unknown element type {proto.data_type}") from None
        shape = tuple(fields.get(1, ()))
        if len(shape) > 32 or min(shape, default=0) < 0 or math.prod(filter(None, shape)) > 1 << 58:
            what = "impossible shape" if len(shape) <= 32 else f"{len(shape)} dims"
            raise ModelFileError(f"tensor {name!r} has the {what} {shape}")
        count = math.prod(shape)
        dtype, bits = kind.dtype, kind.bits
        nbytes = (count * (bits or 8 * dtype.itemsize) + 7) // 8
        if dtype.kind == "O":
            return Tensor(name, dtype, shape, 0, "string_data")

        wrong: Callable[[str], NoReturn] = partial(_raise_wrong, self.path, name, kind.name, shape)
        stripped = self._stripped(fields[13], wrong) if 13 in fields else {}  # 13: external_data
        if not fields.get(9, True):  # raw_data may be there and empty; of repeated fields ListFields lists no empty one
            del fields[9]
        inline = list(fields.keys() & PAYLOADS.keys())
        external = proto.data_location == proto.EXTERNAL
        if len(stripped) + len(inline) + external > 1 or 3 in fields:  # 3: segment
            wrong("its values are given in more than one place")
        if external:
            file, offset, origin = self._locate(proto, nbytes, wrong)
            return Tensor(name, dtype, shape, nbytes, origin, bits, False, file, ((offset, nbytes),))
        given = inline or list(stripped)
        if not given and not count:
            return Tensor(name, dtype, shape, 0, "raw_data")

        number = given[0] if given else wrong("it has no values")
        origin, wire = PAYLOADS[number]
        if origin not in ("raw_data", kind.field):
            wrong(f"its values are in {origin}, not in {kind.field}")
        entries = nbytes if bits in (2, 4) else count * (2 if dtype.kind == "c" else 1)
        needed = nbytes if origin == "raw_data" else entries
        if inline:
            values = np.frombuffer(fields[9], np.uint8) if origin == "raw_data" else np.array(fields[number])
            if len(values) != needed:
                wrong(f"its {origin} holds {len(values)} values, not {needed}")
            return Tensor(name, dtype, shape, nbytes, origin, bits, _inline=values)
        # of a field that is not repeated, the last one counts
        pieces = stripped[number][-1:] if origin == "raw_data" else stripped[number]
        _check_size(origin, wire, _size(pieces), entries if wire == VARINT else nbytes, wrong)
        return Tensor(name, dtype, shape, nbytes, origin, bits, wire == VARINT, self._file, pieces)

    def _stripped(self, entries: Iterable[Any], wrong: Callable[[str], NoReturn]) -> dict[int, tuple[Place, ...]]:
        """The places of a payload that the skeleton does not hold, by its field."""
        marks = [entry.value for entry in entries if entry.key == self._marker]
        if len(marks) > 1:
            wrong("it is given twice")
        payload = self._payloads[int(marks[0])] if marks else {}
        return {n: tuple(p) for n, p in payload.items() if _size(p)}

    def _locate(self, proto: onnx.TensorProto, nbytes: int, wrong: Callable[[str], NoReturn]) -> tuple[File, int, str]:
        """The file with a tensor's external data, and the offset, both checked."""
        entries = {entry.key: entry.value for entry in proto.external_data}
        _check_text(self.path, *entries.values())
        location = entries.get("location", "")
        if not location:
            wrong("its external data has no location")
        numbers = {}
        for key in ("offset", "length"):
            text = entries.get(key, "")
            if text and not (text.isascii() and text.isdecimal() and len(text) < 19):
                wrong(f"its external data's {key} {text[:40]!r} is not a size")
            numbers[key] = int(text) if text else None
        offset, length = numbers["offset"] or 0, numbers["length"]
        if length not in (None, nbytes):
            wrong(f"its external data's length is {length} bytes, not {nbytes}")
        if location not in self._external:
            for parts in (PurePosixPath(location), PureWindowsPath(location)):
                if parts.anchor or ".." in parts.parts:
                    wrong(f"its external data {location!r} lies outside of the model's folder")
            try:
                real = (self.path.parent / location).resolve(strict=True)
            except (OSError, RuntimeError, ValueError) as error:
                wrong(f"its external data {location!r} cannot be read: {getattr(error, 'strerror', '') or error}")
            # Download caches hold a folder of links to files in one other folder: then that is the model's too.
            homes = {self.path.parent.resolve(), self.path.resolve().parent}
            if not any(real.is_relative_to(home) for home in homes):
                wrong(f"its external data {location!r} is a link to outside of the model's folder")
            self._external[location] = File(real)
        file = self._external[location]
        if offset + nbytes > file.size:
            wrong(f"{location!r} has only {file.size} of the {nbytes} bytes from byte {offset} that it needs")
        return file, offset, f"external {location}@{offset}"


def _raise_wrong(path: Path, name: str, kind: str, shape: tuple[int, ...], what: str) -> NoReturn:
    raise ModelFileError(f"{path}: tensor {name!r}, {kind} {list(shape)}: {what}")


def _size(pieces: Iterable[Place]) -> int:
    return sum([length for _, length in pieces])


def _check_size(origin: str, wire: int, given: int, needed: int, wrong: Callable[[str], NoReturn]) -> None:
    """Raise if a payload outside of the skeleton is too short or too long for its elements."""
    # a varint takes 1 to 10 bytes; `Tensor.load` counts them
    if not (needed <= given <= 10 * needed if wire == VARINT else given == needed):
        wrong(f"its {origin} holds {given} bytes, not {needed}")


class _ElementType(NamedTuple):
    """One of onnx.TensorProto.DataType."""

    name: str
    dtype: np.dtype[Any]
    bits: int  # of an element in a packed stream, or 0
    field: str  # of TensorProto, that holds values of this type when raw_data does not


@cache
def _element_type(data_type: int) -> _ElementType:
    from onnx import TensorProto, helper

    name = TensorProto.DataType.Name(data_type)
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    return _ElementType(name, dtype, _BITS.get(name, 0), helper.tensor_dtype_to_field(data_type))


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read and check the structure of an ONNX file; payloads stay in the file until `Tensor.load`.

    Parameters
    ----------
    path : str or path
        An ONNX file, or a folder that holds model.onnx or just one other *.onnx file.

    Raises
    ------
    ModelFileError
        If there is no such file; if it is truncated, malformed or no ONNX at all; if a tensor's type, dims
        and payload contradict each other; if external data is missing, too short, or outside of the model's
        folder.
    """
    path = _find(as_path(path))
    file = File(path)
    marker = "gpt2np." + secrets.token_hex(8)  # so that no file can hold it
    with file.open() as opened:
        _check_magic(path, opened.read(256))
        walker = Walker(file, opened, marker)
        skeleton = walker.strip(0, file.size, "model", "model")
    proto = _parsed(path, "ModelProto", skeleton)
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelFileError(f"{path} is not an ONNX model: no graph with nodes was found in it")
    model = ModelFile(path, proto, (), 0, file, marker, walker.payloads, {})
    _check_text(path, proto.producer_name, proto.producer_version)
    _check_opsets(path, proto.opset_import)
    _collect(model, proto.graph, model.tensors)
    for function in proto.functions:
        _check_text(path, function.name, function.domain, *function.input, *function.output, *function.attribute)
        _check_opsets(path, function.opset_import)
        _check_nodes(path, function.node)
    model.files = (path, *dict.fromkeys(f.path for f in model._external.values()))
    model.nbytes = file.size + sum({f.path: f.size for f in model._external.values()}.values())
    return model


def open_tensor(path: Path) -> Tensor:
    """The one tensor that a .pb file of sample data holds, checked but not yet read.

    Raises
    ------
    ModelFileError
        As `open_model` does.
    """
    file = File(path)
    marker = "gpt2np." + secrets.token_hex(8)
    with file.open() as opened:
        walker = Walker(file, opened, marker)
        skeleton = walker.strip(0, file.size, "tensor", "tensor")
    proto = _parsed(path, "TensorProto", skeleton)
    _check_text(path, proto.name)
    return ModelFile(path, proto, (path,), file.size, file, marker, walker.payloads, {}).tensor(proto)


def _find(path: Path) -> Path:
    """The ONNX file that a path means."""
    try:
        if not path.is_dir():
            return path
        if (path / "model.onnx").exists():
            return path / "model.onnx"
        found = sorted(path.glob("*.onnx"))
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise ModelFileError(f"cannot read {str(path)!r}: {error}") from None
    if len(found) != 1:
        if not found:
            raise ModelFileError(f"there is no model in the folder {path}: no file in it ends in .onnx")
        names = ", ".join(f.name for f in found)
        raise ModelFileError(f"{path} has no model.onnx, but {names}; name the file that is meant")
    return found[0]


def _check_magic(path: Path, head: bytes) -> None:
    """Give files that often end up under the name model.onnx an answer of their own."""
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if not head:
        what = "is empty"
    elif text.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not the model: run `git lfs pull`, or download the file behind it"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "is a web page, not a model: the download went to a page about the file or an error page"
    elif head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh")):
        what = "is an archive (or a PyTorch checkpoint): unpack it, and give the model.onnx inside"
    elif head[8:10] == b'{"':
        what = "is a safetensors file: `gpt2np convert` makes a model.onnx of it"
    elif head[4:8] == b"ORTM":
        what = "is in ONNX Runtime's own format (.ort): give the model.onnx that it was made of"
    elif text.startswith((b'{"', b"{\n", b"{ ")):
        what = "is JSON, not ONNX"
    else:
        return
    raise ModelFileError(f"{path} {what}")


def _parsed(path: Path, message: str, skeleton: bytes) -> Any:
    """The protobuf message of that name in the onnx package."""
    with needs("onnx", "reading a model.onnx"):
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return getattr(onnx, message).FromString(skeleton)
    except DecodeError as error:
        raise ModelFileError(f"{path} is not a sound ONNX file: {error}") from None


def _collect(model: ModelFile, graph: onnx.GraphProto, tensors: dict[str, Tensor]) -> None:
    """Check the tensors and names of a graph and the graphs inside it, and list the tensors by name."""
    own: set[str] = set()
    for proto in graph.initializer:
        _check_text(model.path, proto.name)
        if not proto.name or proto.name in own:
            raise ModelFileError(f"{model.path}: initializer {proto.name!r} is nameless or given twice")
        own.add(proto.name)
        tensors.setdefault(proto.name, model.tensor(proto))
    for value in (*graph.input, *graph.output, *graph.value_info):
        _check_text(model.path, value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim))
    for sparse in graph.sparse_initializer:
        _check_text(model.path, sparse.values.name)
    _check_nodes(model.path, graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            large = any(entry.key == model._marker for entry in attribute.t.external_data)
            if large and attribute.name == "value" and node.op_type == "Constant" and node.output:
                tensors.setdefault(node.output[0], model.tensor(attribute.t, node.output[0]))
            if attribute.HasField("g"):
                _collect(model, attribute.g, tensors)
            for body in attribute.graphs:
                _collect(model, body, tensors)


def _check_nodes(path: Path, nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        _check_text(path, node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            _check_text(path, attribute.name, attribute.ref_attr_name)


def _check_opsets(path: Path, opsets: Iterable[onnx.OperatorSetIdProto]) -> None:
    """Raise for versions of operators that cannot be, or that the onnx package does not know yet."""
    from onnx import defs

    for opset in opsets:
        _check_text(path, opset.domain)
        newest = defs.onnx_opset_version() if opset.domain in ONNX_DOMAINS else 1 << 31
        if not 0 < opset.version <= newest:
            raise ModelFileError(
                f"{path} asks for opset {opset.version} of the domain {opset.domain or 'ai.onnx'!r}; "
                f"known are 1 to {newest}"
            )


def _check_text(path: Path, *names: object) -> None:
    """Raise unless all names are strings: protobuf hands out bytes for what is not UTF-8."""
    for name in names:
        if not isinstance(name, str):
            raise ModelFileError(f"{path} is not a sound ONNX file: the name {name!r} in it is not UTF-8")
