"""Protobuf's wire format (https://protobuf.dev/programming-guides/encoding), walked once.

What is small is copied into a skeleton that protobuf parses; of a large tensor's payload only the place is noted.
"""

from __future__ import annotations

from io import FileIO
from typing import NoReturn

from ...errors import ModelFileError
from ...files import File

SMALL = 1024  # bytes; messages up to this size stay in the skeleton whole
MAX_SKELETON = 128 << 20  # bytes; the graph of a 48-layer export takes 5 MB
MAX_FIELDS = 1 << 20
MAX_DEPTH = 96  # protobuf itself stops at 100 nested messages

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
PAYLOADS: dict[int, tuple[str, int]] = {
    4: ("float_data", FIXED32),
    5: ("int32_data", VARINT),
    6: ("string_data", BYTES),
    7: ("int64_data", VARINT),
    9: ("raw_data", BYTES),
    10: ("double_data", FIXED64),
    11: ("uint64_data", VARINT),
}


class Walker:
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
            if message == "tensor" and number in PAYLOADS and wire in (BYTES, PAYLOADS[number][1]):
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
