"""Read an ONNX file: its structure now, each tensor's bytes later, straight into one aligned array.

`onnx.load` copies every payload into protobuf messages first, and so needs twice the weights' memory. Here
the file is walked on the level of protobuf's wire format (https://protobuf.dev/programming-guides/encoding):
what is small is copied into a skeleton that protobuf parses; of a large tensor's payload only the place is
noted. Everything that a file claims (lengths, dims, types, offsets, other files) is checked before memory is
asked for, because model files come from strangers.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ..errors import ModelFileError

if TYPE_CHECKING:
    import onnx

ALIGNMENT = 64  # a cache line, and the widest SIMD register
SMALL = 1024  # bytes; messages up to this size stay in the skeleton whole
MAX_SKELETON = 128 << 20  # bytes; the graph of a 48-layer export takes 5 MB
MAX_FIELDS = 1 << 20
MAX_DEPTH = 96  # protobuf itself stops at 100 nested messages
PART = 1 << 21  # bytes that one thread reads at least; a large page, so that two threads never share one
BLOCK = 1 << 18  # bytes decoded at once, of payloads that are not the array's own bytes

# Where tensors hide: message -> {field number: (field name, message)}. The numbers are those of onnx.proto.
_CHILDREN: dict[str, dict[int, tuple[str, str]]] = {
    "model": {7: ("graph", "graph"), 20: ("training_info", "training"), 25: ("functions", "function")},
    "graph": {1: ("node", "node"), 5: ("initializer", "tensor"), 15: ("sparse_initializer", "sparse")},
    "node": {5: ("attribute", "attribute")},
    "attribute": {
        5: ("t", "tensor"),
        6: ("g", "graph"),
        10: ("tensors", "tensor"),
        11: ("graphs", "graph"),
        22: ("sparse_tensor", "sparse"),
        23: ("sparse_tensors", "sparse"),
    },
    "sparse": {1: ("values", "tensor"), 2: ("indices", "tensor")},
    "training": {1: ("initialization", "graph"), 2: ("algorithm", "graph")},
    "function": {7: ("node", "node"), 11: ("attribute_proto", "attribute")},
    "tensor": {},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
# TensorProto's payloads: field number -> (name, wire type of an element that is not packed).
_PAYLOADS: dict[int, tuple[str, int]] = {
    4: ("float_data", FIXED32),
    5: ("int32_data", VARINT),
    6: ("string_data", BYTES),
    7: ("int64_data", VARINT),
    9: ("raw_data", BYTES),
    10: ("double_data", FIXED64),
    11: ("uint64_data", VARINT),
}
# Types of which several elements share a byte, lowest bits first.
_BITS = {"UINT2": 2, "INT2": 2, "UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}

Pieces = tuple[tuple[int, int], ...]  # (offset, length) in the file, in order


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A new C-contiguous array whose first element lies on a 64-byte boundary; its content is arbitrary."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


class File:
    """A regular file that is opened for every read, and must not change in between.

    Raises
    ------
    ModelFileError
        If there is no such file, if it is no regular file, or if it changes after the first look.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = path.stat()
            if stat.S_ISREG(state.st_mode):
                with path.open("rb"):
                    pass
        except (OSError, ValueError) as error:
            raise ModelFileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        if not stat.S_ISREG(state.st_mode):  # a pipe would block for ever, a device never end
            raise ModelFileError(f"{path} is not a regular file")
        self.size = state.st_size
        self._state = self._identity(state)

    @staticmethod
    def _identity(state: os.stat_result) -> tuple[int, ...]:
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns

    def open(self) -> FileIO:
        """The open file, unbuffered; the caller closes it."""
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ModelFileError(f"cannot read {self.path}: {error.strerror}") from None
        if self._identity(os.fstat(file.fileno())) != self._state:
            file.close()
            raise ModelFileError(f"{self.path} was changed or replaced since it was opened")
        return file

    def read_into(self, target: np.ndarray, pieces: Iterable[tuple[int, int]]) -> None:
        """Fill the one-dimensional uint8 array `target` with the bytes of all (offset, length) pieces."""
        done = 0
        with self.open() as file:
            for offset, length in pieces:
                self._fill(target[done : done + length], file, offset)
                done += length

    def _fill(self, target: np.ndarray, file: FileIO, offset: int) -> None:
        view, done = target.data, 0
        file.seek(offset)
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise ModelFileError(f"{self.path} ends early, at byte {file.tell()}")
            done += got

    def read_in_turn(self, target: np.ndarray, offset: int, nbytes: int) -> Iterator[np.ndarray]:
        """Read `nbytes` bytes from `offset` on through `target`: filled again and again, the last time in part."""
        with self.open() as file:
            for start in range(0, nbytes, len(target)):
                part = target[: nbytes - start]
                self._fill(part, file, offset + start)
                yield part

    def read_in_parts(self, target: np.ndarray, offset: int) -> None:
        """Fill `target` with the bytes from `offset`, a large one in several threads.

        Half of the time goes to the system's clearing of new memory, which more cores do faster.
        """
        part = max(PART, -(-len(target) // (os.cpu_count() or 1) // PART) * PART)
        starts = range(0, len(target), part)
        if len(starts) == 1:
            self.read_into(target, [(offset, len(target))])
            return
        with ThreadPoolExecutor(len(starts)) as pool:
            parts = [target[start : start + part] for start in starts]
            list(pool.map(lambda start, view: self.read_into(view, [(offset + start, len(view))]), starts, parts))


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file, found and checked but not yet read."""

    name: str
    dtype: np.dtype[Any]  # ml_dtypes' types for bfloat16, float8, int4 ...; object for strings
    shape: tuple[int, ...]
    nbytes: int  # of its elements as stored: half a byte each for int4
    origin: str  # "raw_data", "float_data", ..., or "external weights.bin@4096"
    _bits: int = 0  # of one element in a packed stream; 0 where elements are whole bytes
    _varint: bool = False  # stored as protobuf varints, one for each element (or byte of packed elements)
    _file: File | None = field(default=None, repr=False)
    _pieces: Pieces = ()
    _inline: np.ndarray | None = field(default=None, repr=False)  # the payload, where it is in the skeleton

    def load(self) -> np.ndarray:
        """Read it: a new, 64-byte-aligned, C-contiguous, writable array, the caller's own.

        Raises
        ------
        ModelFileError
            If the file ends early, has changed, or holds strings or complex numbers, or values out of range.
        """
        if self.dtype.kind in "Oc":
            kind = "strings" if self.dtype.kind == "O" else "complex numbers"
            raise ModelFileError(f"tensor {self.name!r} holds {kind}, which no GPT-2 weight does")
        array = empty_aligned(self.shape, self.dtype)
        if array.size == 0:
            return array
        stored = array.reshape(-1).view(np.dtype(f"u{array.itemsize}"))
        # int32_data holds the bytes of packed 2- and 4-bit elements, but 6-bit elements one by one
        packed = self._bits in (2, 4) or (self._bits == 6 and self.origin != "int32_data")
        entries = np.empty(self.nbytes, np.uint8) if packed else stored
        if self._inline is not None and self.dtype.kind == "f" and self._inline.dtype.kind == "f":
            array.reshape(-1)[:] = self._inline  # float_data, double_data
        elif self._inline is not None:
            entries[:] = self._inline.view(entries.dtype) if self.origin == "raw_data" else self._inline
        elif self._varint:
            self._read_varints(entries)
        elif self._file is None:
            raise AssertionError("a tensor with elements has a payload")
        elif len(self._pieces) == 1:
            self._file.read_in_parts(entries.view(np.uint8), self._pieces[0][0])
        else:
            self._file.read_into(entries.view(np.uint8), self._pieces)
        if packed:
            _unpack(entries, self._bits, stored)
        if self.dtype.kind == "b" and stored.max() > 1:  # NumPy takes any other byte for a third truth value
            raise ModelFileError(f"tensor {self.name!r} is bool, but holds a byte that is neither 0 nor 1")
        return array

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Read it some rows at a time: arrays that follow each other along the first axis, each lost with the next.

        They have `rows` rows (the last one perhaps fewer) and share one array, where the file holds the elements as
        they are. Any other tensor comes as a whole. Raises as `load` does.
        """
        if self._file is None or self._varint or self.dtype.kind != "f" or len(self._pieces) != 1:
            yield self.load()
            return
        block = empty_aligned((min(rows, self.shape[0]), *self.shape[1:]), self.dtype)
        for part in self._file.read_in_turn(block.reshape(-1).view(np.uint8), *self._pieces[0]):
            yield block[: len(part) * len(block) // block.nbytes]

    def _read_varints(self, entries: np.ndarray) -> None:
        """Decode the payload's varints into `entries`, keeping the low bits of each as protobuf does."""
        assert self._file is not None
        done, rest = 0, np.zeros(0, np.uint8)
        for pieces in _blocks(self._pieces):
            block = np.empty(sum(length for _, length in pieces), np.uint8)
            self._file.read_into(block, pieces)
            values, rest = _varints(np.concatenate([rest, block]))
            if len(rest) > 9 or done + len(values) > len(entries):
                break
            entries[done : done + len(values)] = values.astype(entries.dtype)
            done += len(values)
        if done != len(entries) or len(rest):
            raise ModelFileError(
                f"tensor {self.name!r} of shape {self.shape}: its {self.origin} does not hold {len(entries)} values"
            )


def _blocks(pieces: Pieces) -> Iterator[list[tuple[int, int]]]:
    """Cut pieces into lists of at most BLOCK bytes."""
    block: list[tuple[int, int]] = []
    room = BLOCK
    for offset, length in pieces:
        while length:
            part = min(length, room)
            block.append((offset, part))
            offset, length, room = offset + part, length - part, room - part
            if not room:
                yield block
                block, room = [], BLOCK
    if block:
        yield block


def _varints(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decode base-128 varints: bytes -> (uint64 values, bytes of an unfinished last one)."""
    ends = np.flatnonzero(data < 0x80) + 1
    if not len(ends):
        return np.zeros(0, np.uint64), data
    starts = np.concatenate([[0], ends[:-1]])
    data, rest = data[: ends[-1]], data[ends[-1] :]
    lengths = ends - starts
    if lengths.max() > 10:
        return np.zeros(0, np.uint64), data  # as unfinished: more than any varint may have
    place = np.arange(len(data)) - np.repeat(starts, lengths)  # of each byte in its varint
    bits = (data & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.add.reduceat(bits, starts), rest


def _unpack(packed: np.ndarray, bits: int, out: np.ndarray) -> None:
    """Write one element per byte of `out` from a stream of `bits`-bit elements, lowest bits first."""
    period = math.lcm(bits, 8)  # after so many bits, elements and bytes are in step again
    every, step = period // bits, period // 8
    for i in range(every):
        target = out[i::every]
        byte, shift = divmod(i * bits, 8)
        value = packed[byte::step][: len(target)] >> shift
        if shift + bits > 8:
            value |= packed[byte + 1 :: step][: len(target)] << (8 - shift)
        target[:] = value & ((1 << bits) - 1)


class _Walker:
    """One pass over the file's wire format: the skeleton's bytes, and where the large payloads lie."""

    WINDOW = 1 << 16

    def __init__(self, file: File, opened: FileIO, marker: str) -> None:
        self.name = file.path
        self.size = file.size
        self.opened = opened
        self.marker = marker
        self.payloads: list[dict[int, list[tuple[int, int]]]] = []  # of each stripped tensor, by field number
        self.window, self.base = b"", 0
        self.kept = 0
        self.fields = 0

    def fail(self, at: int, where: str, what: str) -> NoReturn:
        raise ModelFileError(f"{self.name} is not a sound ONNX file: at byte {at}, in {where}: {what}")

    def read(self, start: int, end: int) -> bytes:
        """The file's bytes from `start` to `end`."""
        low, high = start - self.base, end - self.base
        if not 0 <= low <= high <= len(self.window):
            self.opened.seek(start)
            self.window, self.base = b"", start
            while len(self.window) < end - start:
                got = self.opened.read(max(self.WINDOW, end - start) - len(self.window))
                if not got:
                    raise ModelFileError(f"{self.name} ends early, at byte {self.opened.tell()}")
                self.window += got
            low, high = 0, end - start
        return self.window[low:high]

    def keep(self, start: int, end: int, where: str) -> bytes:
        """`read` for the skeleton, which must not grow without bounds."""
        self.kept += end - start
        if self.kept > MAX_SKELETON:
            self.fail(start, where, f"more than {MAX_SKELETON >> 20} MiB outside of tensors")
        return self.read(start, end)

    def varint(self, at: int, end: int, where: str) -> tuple[int, int]:
        """The varint at `at`, and the place after it."""
        data = self.read(at, min(at + 10, end))
        value = 0
        for i, byte in enumerate(data):
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                return value, at + i + 1
        return self.fail(at, where, "a varint that does not end")

    def strip(self, start: int, end: int, message: str, where: str, depth: int = 0) -> bytes:
        """The bytes of one message without large payloads; these are noted in `payloads`."""
        if depth > MAX_DEPTH:
            self.fail(start, where, f"messages nested more than {MAX_DEPTH} deep")
        skeleton = bytearray()
        payload: dict[int, list[tuple[int, int]]] = {}
        kept = at = start  # everything before `kept` is in the skeleton or in the payload
        while at < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                self.fail(at, where, f"more than {MAX_FIELDS} fields")
            tag, content = self.varint(at, end, where)
            number, wire = tag >> 3, tag & 7
            if wire == VARINT:
                stop = self.varint(content, end, where)[1]
            elif wire in (FIXED32, FIXED64):
                stop = content + (4 if wire == FIXED32 else 8)
            elif wire == BYTES:
                length, content = self.varint(content, end, where)
                stop = content + length
            else:
                self.fail(at, where, f"wire type {wire}, which ONNX does not use")
            if not 0 < number < 1 << 29:
                self.fail(at, where, f"field number {number}")
            if stop > end:
                self.fail(at, where, f"field {number} takes {stop - content} bytes of {end - content} that remain")
            if message == "tensor" and number in _PAYLOADS and wire in (BYTES, _PAYLOADS[number][1]):
                skeleton += self.keep(kept, at, where)
                payload.setdefault(number, []).append((content, stop - content))
                kept = stop
            elif wire == BYTES and stop - content > SMALL and number in _CHILDREN[message]:
                name, child = _CHILDREN[message][number]
                skeleton += self.keep(kept, at, where)
                body = self.strip(content, stop, child, f"{where}.{name}", depth + 1)
                skeleton += bytes_field(number, body)
                kept = stop
            at = stop
        skeleton += self.keep(kept, end, where)
        if payload:
            skeleton += self._mark(len(self.payloads))
            self.payloads.append(payload)
        return bytes(skeleton)

    def _mark(self, index: int) -> bytes:
        """An external_data entry that leads from the stripped TensorProto to its payload."""
        return bytes_field(13, bytes_field(1, self.marker.encode()) + bytes_field(2, b"%d" % index))


def bytes_field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return encode_varint(number << 3 | BYTES) + encode_varint(len(content)) + content


def encode_varint(value: int) -> bytes:
    """Protobuf's base-128 form of a number that is not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@dataclass
class ModelFile:
    """An ONNX file whose structure has been read and checked; its tensors are read on demand.

    `proto` is the model without the payloads of large tensors: a TensorProto in it may lack its data, so pass
    it to `tensor` instead of onnx.numpy_helper.
    """

    path: Path
    proto: onnx.ModelProto
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
        with self._file.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def tensor(self, proto: onnx.TensorProto, name: str = "") -> Tensor:
        """The tensor of any TensorProto of `proto`, checked: initializer, node attribute, or inside a body.

        Raises
        ------
        ModelFileError
            If its type, dims, payload or external file contradict each other.
        """
        fields = {descriptor.number: value for descriptor, value in proto.ListFields()}  # those that are set
        name = name or proto.name
        try:
            kind = _element_type(proto.data_type)
        except (KeyError, ValueError):
            raise ModelFileError(f"tensor {name!r} has the unknown element type {proto.data_type}") from None
        shape = _shape(fields.get(1, ()), name)
        count = math.prod(shape)
        dtype, bits = kind.dtype, kind.bits
        nbytes = (count * (bits or 8 * dtype.itemsize) + 7) // 8
        if dtype.kind == "O":
            return Tensor(name, dtype, shape, 0, "string_data")

        def wrong(what: str) -> NoReturn:
            raise ModelFileError(f"{self.path}: tensor {name!r}, {kind.name} {list(shape)}: {what}")

        marks = [entry.value for entry in fields.get(13, ()) if entry.key == self._marker]
        if len(marks) > 1:
            wrong("it is given twice")
        payload = self._payloads[int(marks[0])] if marks else {}
        stripped = {n: tuple(p) for n, p in payload.items() if sum(length for _, length in p)}
        inline = [n for n, value in fields.items() if n in _PAYLOADS and len(value)]
        if len(stripped) + len(inline) > 1 or 3 in fields:  # 3: segment
            wrong("its values are given in more than one place")

        if proto.data_location == proto.EXTERNAL:
            if stripped or inline:
                wrong("its values are given both here and in another file")
            file, offset, origin = self._locate(proto, nbytes, wrong)
            return Tensor(name, dtype, shape, nbytes, origin, bits, False, file, ((offset, nbytes),))
        if not stripped and not inline:
            if count:
                wrong("it has no values")
            return Tensor(name, dtype, shape, 0, "raw_data")

        number = inline[0] if inline else next(iter(stripped))
        origin, wire = _PAYLOADS[number]
        if origin not in ("raw_data", kind.field):
            wrong(f"its values are in {origin}, not in {kind.field}")
        entries = nbytes if bits in (2, 4) else count * (2 if dtype.kind == "c" else 1)
        if inline:
            values = np.frombuffer(fields[9], np.uint8) if origin == "raw_data" else np.array(fields[number])
            needed = nbytes if origin == "raw_data" else entries
            if len(values) != needed:
                wrong(f"its {origin} holds {len(values)} values, not {needed}")
            return Tensor(name, dtype, shape, nbytes, origin, bits, _inline=values)
        pieces = stripped[number]
        if origin == "raw_data":
            pieces = pieces[-1:]  # of a field that is not repeated, the last one counts
        given = sum(length for _, length in pieces)
        # a varint takes 1 to 10 bytes; `load` counts them
        if not (entries <= given <= 10 * entries if wire == VARINT else given == nbytes):
            wrong(f"its {origin} holds {given} bytes, not {entries if wire == VARINT else nbytes}")
        return Tensor(name, dtype, shape, nbytes, origin, bits, wire == VARINT, self._file, pieces)

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


def _shape(dims: Sequence[int], name: str) -> tuple[int, ...]:
    """Dims, if NumPy could have them."""
    shape = tuple(dims)
    if len(shape) > 32:
        raise ModelFileError(f"tensor {name!r} has {len(shape)} dims")
    if any(d < 0 for d in shape) or math.prod(max(d, 1) for d in shape) > 1 << 58:
        raise ModelFileError(f"tensor {name!r} has the impossible shape {shape}")
    return shape


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
    path = _find(Path(path))
    file = File(path)
    marker = "gpt2np." + secrets.token_hex(8)  # so that no file can hold it
    with file.open() as opened:
        _check_magic(path, opened.read(256))
        walker = _Walker(file, opened, marker)
        skeleton = walker.strip(0, file.size, "model", "model")
    proto = _parse(path, skeleton)
    model = ModelFile(path, proto, (), 0, file, marker, walker.payloads, {})
    _check_text(path, proto.producer_name, proto.producer_version, *(opset.domain for opset in proto.opset_import))
    _collect(model, proto.graph, model.tensors)
    model.files = (path, *dict.fromkeys(f.path for f in model._external.values()))
    model.nbytes = file.size + sum({f.path: f.size for f in model._external.values()}.values())
    return model


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
        names = ", ".join(f.name for f in found) or "nothing else that ends in .onnx"
        raise ModelFileError(f"{path} has no model.onnx (but {names}); name the file that is meant")
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


def _parse(path: Path, skeleton: bytes) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx import ModelProto

    try:
        proto: onnx.ModelProto = ModelProto.FromString(skeleton)
    except DecodeError as error:
        raise ModelFileError(f"{path} is not a sound ONNX file: {error}") from None
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelFileError(f"{path} is not an ONNX model: no graph with nodes was found in it")
    return proto


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
    for node in graph.node:
        _check_text(model.path, node.name, node.op_type, node.domain, *node.input, *node.output)
        _check_text(model.path, *(attribute.name for attribute in node.attribute))
        for attribute in node.attribute:
            large = any(entry.key == model._marker for entry in attribute.t.external_data)
            if large and attribute.name == "value" and node.op_type == "Constant" and node.output:
                tensors.setdefault(node.output[0], model.tensor(attribute.t, node.output[0]))
            if attribute.HasField("g"):
                _collect(model, attribute.g, tensors)
            for body in attribute.graphs:
                _collect(model, body, tensors)


def _check_text(path: Path, *names: object) -> None:
    """Raise unless all names are strings: protobuf hands out bytes for what is not UTF-8."""
    for name in names:
        if not isinstance(name, str):
            raise ModelFileError(f"{path} is not a sound ONNX file: the name {name!r} in it is not UTF-8")
