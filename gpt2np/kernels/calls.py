"""How Python calls a kernel: its arguments written down where compiled code finds them, see `entries`."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy as np

from ..arrays import Array
from . import code
from .machine import DISABLE_JIT


def kind_of(argument: Any) -> Any:
    """What compiled code depends on: dtype and dimensions of an array, int, float or bool, and those of a tuple."""
    if isinstance(argument, np.ndarray):
        return argument.dtype.char, argument.ndim
    if isinstance(argument, tuple):
        return (type(argument), *map(kind_of, argument))
    return bool if isinstance(argument, bool) else int if isinstance(argument, (int, np.integer)) else float


def _address(array: Array) -> int:
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    except (TypeError, ValueError):  # read-only, or empty: the other way takes five times as long
        address: int = array.__array_interface__["data"][0]
        return address


def _write(argument: Any, record: list[int]) -> None:
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise ValueError(f"an array for a kernel must be contiguous, got strides {argument.strides}")
        record.append(_address(argument))
        record.extend(argument.shape)
    elif isinstance(argument, tuple):
        for part in argument:
            _write(part, record)
    elif isinstance(argument, (int, np.integer)):
        record.append(int(argument))
    else:
        record.extend(struct.unpack("q", struct.pack("d", argument)))


class Call:
    """A kernel, by its file's name and its own, with its arguments: ready to run, again and again."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self.arguments = arguments  # whose memory compiled code uses
        if DISABLE_JIT:
            from .entries import entry

            self.entry = entry(name, lambda arguments: arguments)
            return
        numbers: list[int] = []
        _write(arguments, numbers)
        self.record = np.array(numbers, np.int64)
        self.record_address = _address(self.record)
        self.code = code.find(name, tuple(map(kind_of, arguments)))

    def run(self, *first: int) -> None:
        """Run it on this thread; first: what the first of its arguments are this time, if these are integers."""
        if DISABLE_JIT:
            with np.errstate(all="ignore"):  # compiled code never warns; the same code in Python should not either
                self.entry(0, (*first, *self.arguments[len(first) :]))
            return
        self.record[: len(first)] = first
        check(self.code.run(_RESULTS, _RESULTS, 0, self.record_address))


_results = ctypes.create_string_buffer(16)
_RESULTS = ctypes.addressof(_results)


def check(status: int) -> None:
    """Kernels raise nothing, unless the environment asks numba to check their indices."""
    if status:
        raise RuntimeError("a kernel found an index that is out of bounds")


def run(name: str, *arguments: Any) -> None:
    """Run a kernel once, on this thread."""
    Call(name, *arguments).run()
