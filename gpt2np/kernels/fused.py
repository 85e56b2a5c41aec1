"""All of a model in one call: the kernels of `loops.py` one after another, by threads that wait for each other.

After a kernel has streamed its weights through the caches, what Python does until the next one takes 20 microseconds,
and waking threads takes about as long again. At seven calls a block that is a tenth of the time of a single token.

So a model is a table of steps (`programs.py` writes it): one row a step, with the addresses and shapes of what it
reads and writes. All arrays of a kind have one type.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from ..arrays import Array
from .entries import array_value
from .jit import jit
from .layout import (
    ACTIVATION,
    ADDED,
    APPEND,
    ATTEND,
    BIAS,
    CACHE,
    FLAT,
    GAIN,
    INPUT,
    KIND,
    LINEAR,
    NORM,
    OUTPUT,
    PIECES,
    SCALES,
    SMALLEST,
    TERMS,
    WEIGHT,
)
from .loops import append_range, attend_range, embed_range, layer_norm_range, linear_range
from .machine import DISABLE_JIT
from .sharing import count, next_chunk, wait_for


@intrinsic
def _array_at(_, like, step, column):
    def generate(context, builder, _, values):
        row = context.make_array(step)(context, builder, values[1]).data
        numbers = [
            builder.load(builder.gep(row, [builder.add(values[2], values[2].type(i))])) for i in range(1 + like.ndim)
        ]
        return array_value(context, builder, like, numbers)

    return like(like, step, types.intp), generate


def _array_in_python(like: Array, step: Array, column: int) -> Array:
    address, shape = int(step[column]), tuple(step[column + 1 : column + 1 + like.ndim])
    memory = (ctypes.c_char * (int(np.prod(shape)) * like.itemsize)).from_address(address)
    return np.frombuffer(memoryview(memory), like.dtype).reshape(shape)


# array_at(like, step, column): the array that a step has there, of the type of `like`; someone else keeps it alive
array_at: Callable[..., Array] = _array_in_python if DISABLE_JIT else _array_at


@jit()
def run_steps(
    worker, first, last, start, workers, counters, all_scratch, steps, factors, group, stream, weight, scales, cache,
    ids, visible, no_probs,
):  # fmt: skip
    """One thread's part of steps first..last-1 of a program.

    worker: which thread this is, of so many workers. counters: (steps, 2, 8) zeros, of each step the tickets given out
    and the pieces that are done, on cache lines of their own. all_scratch: (threads, numbers). steps: (steps, COLUMNS)
    int64. factors: (steps,), of scores, or the epsilon of a layer norm. group: see `linear_range`. stream, weight,
    scales, cache: arrays that those of the steps are like; ids: (2, R), of tokens and positions; start, visible,
    no_probs: see `attend_range`.

    A step begins when all pieces of the last one are done, whoever did them: a thread that comes late, or never, is
    not waited for.
    """
    scratch = all_scratch[worker]
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
                append_range(begin, end, scratch, x, array_at(cache, step, CACHE), start)
            elif kind == ATTEND:
                held, flat = array_at(cache, step, CACHE), array_at(scratch, step, FLAT)
                attend_range(begin, end, scratch, x, held, flat, factors[i], visible, out, no_probs)
            else:
                table = array_at(weight, step, WEIGHT), array_at(scales, step, SCALES)
                embed_range(begin, end, scratch, ids[0], ids[1], table[0], table[1], x, out)
            count(done, end - begin)
            begin, end = next_chunk(ticket, workers, pieces, smallest)
        wait_for(done, pieces)
