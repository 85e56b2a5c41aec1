"""All of a model in one call: the kernels of `loops.py` one after another, by threads that wait for each other.

After a kernel has streamed its weights through the caches, what Python does until the next one takes 20 microseconds,
and waking threads takes about as long again. At seven calls a block that is a tenth of the time of a single token.

So a model is a table of steps (`programs.py` writes it): one row a step, with the addresses and shapes of what it
reads and writes. All arrays of a kind have one type; numba takes microseconds to look at each one that it is given.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import prange
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..arrays import Array
from .jit import config, jit
from .loops import append_range, attend_range, embed_range, layer_norm_range, linear_range
from .products import TERMS
from .threads import call_at, count, next_chunk, wait_for

# Kinds of steps
EMBED, NORM, LINEAR, APPEND, ATTEND = range(5)

# Columns of a row: numbers, and where arrays begin, which are an address and as many lengths as they have dimensions.
KIND, PIECES, SMALLEST, ACTIVATION, ADDED = range(5)  # for pieces and smallest see `threads.run_pieces`
# of 2, 2, 3, 3 or 4, 1, 1, 5 and 1 dimensions; FLAT is the cache as one row of numbers
INPUT, OUTPUT, WEIGHT, SCALES, BIAS, GAIN, CACHE, FLAT = 5, 8, 11, 15, 20, 22, 24, 30
COLUMNS = 32


@intrinsic
def _array_at(_, like, step, column):
    def generate(context, builder, _, values):
        from numba.np.arrayobj import populate_array  # 35 ms, and needed where something is compiled only

        row = context.make_array(step)(context, builder, values[1]).data

        def number(i: int) -> ir.Value:
            return builder.load(builder.gep(row, [builder.add(values[2], values[2].type(i))]))

        array = context.make_array(like)(context, builder)
        lengths, size = (
            [number(i + 1) for i in range(like.ndim)],
            context.get_constant(types.intp, like.dtype.bitwidth // 8),
        )
        strides = [size]
        for length in lengths[:0:-1]:
            strides.insert(0, builder.mul(strides[0], length))
        shape, strides = (cgutils.pack_array(builder, numbers) for numbers in (lengths, strides))
        data = builder.inttoptr(number(0), array.data.type)
        populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
        return array._getvalue()

    return like(like, step, types.intp), generate


def _array_in_python(like: Array, step: Array, column: int) -> Array:
    address, shape = int(step[column]), tuple(step[column + 1 : column + 1 + like.ndim])
    memory = (ctypes.c_char * (int(np.prod(shape)) * like.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), like.dtype).reshape(shape)


# array_at(like, step, column): the array that a step has there, of the type of `like`; someone else keeps it alive
array_at: Callable[..., Array] = _array_in_python if config.DISABLE_JIT else _array_at


@jit()
def run_steps(
    counters, workers, scratch, steps, first, last, factors, group, stream, weight, scales, cache, ids, start, visible,
    no_probs,
):  # fmt: skip
    """One thread's part of steps first..last-1 of a program.

    counters: (steps, 2, 8) zeros, of each step the tickets given out and the pieces that are done, on cache lines of
    their own. steps: (steps, COLUMNS) int64. factors: (steps,), of scores, or the epsilon of a layer norm. group: see
    `linear_range`. stream, weight, scales, cache: arrays that those of the steps are like; ids: (2, R), of tokens and
    positions; start, visible, no_probs: see `attend_range`.

    A step begins when all pieces of the last one are done, whoever did them: a thread that comes late, or never, is
    not waited for.
    """
    for i in range(first, last):
        step, ticket, done = steps[i], counters[i, 0], counters[i, 1]
        kind, pieces, smallest = step[KIND], step[PIECES], step[SMALLEST]
        begin, end = next_chunk(ticket, workers, pieces, smallest)
        while begin < pieces:
            x, out = array_at(stream, step, INPUT), array_at(stream, step, OUTPUT)
            if kind == LINEAR:
                linear_range(
                    begin, end, scratch, x, array_at(weight, step, WEIGHT), array_at(scales, step, SCALES),
                    array_at(scratch, step, BIAS), step[ACTIVATION], step[ADDED] == 1, TERMS, group, out,
                )  # fmt: skip
            elif kind == NORM:
                gain, bias = array_at(scratch, step, GAIN), array_at(scratch, step, BIAS)
                layer_norm_range(begin, end, scratch, x, gain, bias, factors[i], out)
            elif kind == APPEND:
                append_range(begin, end, x, array_at(cache, step, CACHE), start)
            elif kind == ATTEND:
                held, flat = array_at(cache, step, CACHE), array_at(scratch, step, FLAT)
                attend_range(begin, end, scratch, x, held, flat, factors[i], visible, out, no_probs)
            else:
                table = array_at(weight, step, WEIGHT), array_at(scales, step, SCALES)
                embed_range(begin, end, scratch, ids[0], ids[1], table[0], table[1], x, out)
            count(done, end - begin)
            begin, end = next_chunk(ticket, workers, pieces, smallest)
        wait_for(done, pieces)


@jit(parallel=True)
def run_parallel(
    address, counters, workers, scratch, steps, first, last, factors, group, stream, weight, scales, cache, ids, start,
    visible, no_probs,
):  # fmt: skip
    for worker in prange(workers):
        call_at(
            address,
            (counters, workers, scratch[worker], steps, first, last, factors, group, stream, weight, scales, cache,
             ids, start, visible, no_probs),
        )  # fmt: skip
