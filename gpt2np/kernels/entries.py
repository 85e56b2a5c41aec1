"""Where Python enters compiled code: every kernel that it calls, compiled as code(worker, record).

worker: which of a call's threads this is. record: the address of the call's arguments, one after another as 64-bit
numbers, an array being its address and its lengths; `calls` writes them.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from .jit import OPTIONS
from .sharing import next_chunk

ENTRY = types.void(types.intp, types.voidptr)


def compile_entry(name: str, kinds: Any) -> tuple[str, bytes]:
    """Compile a kernel, by its file's name and its own, for arguments of some kinds; its symbol, and an object file."""
    without_python: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    run: Any = numba.njit(**OPTIONS, **without_python)(entry(name, _arguments(kinds)))
    run.compile(ENTRY.args)
    compiled = run.overloads[ENTRY.args]
    machine_code: bytes = compiled.library.serialize_using_object_code()[2][0]
    return compiled.fndesc.llvm_func_name, machine_code


def entry(name: str, arguments: Any) -> Callable[..., None]:
    """run(worker, record) of a kernel; arguments: what makes them of a record."""
    file, function = name.split(".")
    kernel = getattr(import_module(f".{file}", __package__), function)
    way = _steps if function == "run_steps" else _chunks if function.endswith("_range") else _alone
    run: Callable[..., None] = way(kernel, arguments)
    return run


def _alone(kernel, arguments):
    """For one thread."""

    def run(worker, record):
        kernel(*arguments(record))

    return run


def _chunks(kernel, arguments):
    """For threads that take chunks of the pieces until none is left, see `threads.run_pieces`."""

    def run(worker, record):
        ticket, workers, pieces, smallest, scratch, rest = arguments(record)
        first, last = next_chunk(ticket, workers, pieces, smallest)
        while first < pieces:
            kernel(first, last, scratch[worker], *rest)
            first, last = next_chunk(ticket, workers, pieces, smallest)

    return run


def _steps(kernel, arguments):
    """For threads that go through the same steps."""

    def run(worker, record):
        kernel(worker, *arguments(record))

    return run


def type_of(kind: Any) -> Any:
    """numba's type of what `calls.kind_of` describes."""
    if kind in (bool, int, float):
        return {bool: types.boolean, int: types.int64, float: types.float64}[kind]
    if isinstance(kind[0], str):
        return types.Array(numba.from_dtype(np.dtype(kind[0])), kind[1], "C")
    parts = [type_of(part) for part in kind[1:]]
    return types.Tuple(parts) if kind[0] is tuple else types.NamedTuple(parts, kind[0])


def _arguments(kinds: Any) -> Any:
    """arguments(record): the arguments of a call, a tuple."""
    result = types.Tuple([type_of(kind) for kind in kinds])

    @intrinsic
    def arguments(_, record):
        def generate(context, builder, _, values):
            first, index = builder.bitcast(values[0], ir.IntType(64).as_pointer()), ir.IntType(64)
            numbers = (builder.load(builder.gep(first, [index(i)])) for i in range(1 << 30))
            return _value(context, builder, result, numbers)

        return result(types.voidptr), generate

    return arguments


def _value(context: Any, builder: ir.IRBuilder, kind: Any, numbers: Iterator[ir.Value]) -> ir.Value:
    """A value of one of numba's types from the next 64-bit numbers of a record."""
    if isinstance(kind, types.BaseTuple):
        parts: Any = kind
        return context.make_tuple(builder, kind, [_value(context, builder, part, numbers) for part in parts])
    if isinstance(kind, types.Array):
        return array_value(context, builder, kind, [next(numbers) for _ in range(1 + kind.ndim)])
    number = next(numbers)
    if kind == types.float64:
        return builder.bitcast(number, ir.DoubleType())
    return builder.icmp_unsigned("!=", number, number.type(0)) if kind == types.boolean else number


def array_value(context: Any, builder: ir.IRBuilder, kind: Any, numbers: list[ir.Value]) -> ir.Value:
    """An array of numba's from its address and its lengths; someone else keeps it alive."""
    array, (address, *lengths) = context.make_array(kind)(context, builder), numbers
    size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    strides = [size] if lengths else []
    for length in lengths[:0:-1]:
        strides.insert(0, builder.mul(strides[0], length))
    shape, steps = (cgutils.pack_array(builder, numbers) for numbers in (lengths, strides))
    data = builder.inttoptr(address, array.data.type)
    populate_array(array, data=data, shape=shape, strides=steps, itemsize=size, meminfo=None)
    return array._getvalue()
