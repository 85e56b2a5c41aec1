"""One tensor of a file: found and checked, its bytes read later, straight into one aligned array."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...arrays import empty_aligned
from ...errors import ModelFileError
from ...files import File

DECODED_BYTES = 1 << 18  # bytes decoded at once, of payloads that are not the array's own bytes

Pieces = tuple[tuple[int, int], ...]  # (offset, length) in the file, in order


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
    """Cut pieces into lists of at most DECODED_BYTES bytes."""
    block: list[tuple[int, int]] = []
    room = DECODED_BYTES
    for offset, length in pieces:
        while length:
            part = min(length, room)
            block.append((offset, part))
            offset, length, room = offset + part, length - part, room - part
            if not room:
                yield block
                block, room = [], DECODED_BYTES
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
