"""How threads share out the work of one compiled call: who takes what, and who waits for whom."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .jit import jit
from .layout import CALL, CLOSED, CODE, FAILED, LEFT, RECORD, WORKERS
from .machine import DISABLE_JIT


@intrinsic
def _count(_, counter, n):
    def generate(context, builder, _, values):
        data = context.make_array(counter)(context, builder, values[0]).data
        return builder.atomic_rmw("add", data, values[1], "acq_rel")

    return types.int64(counter, types.int64), generate


def _count_in_python(counter: Any, n: int) -> Any:
    number = int(counter[0])
    counter[0] += n
    return number


# count(counter, n): the number in the int64 array `counter`, which is n higher for whoever asks next, on any thread
count: Callable[..., Any] = _count_in_python if DISABLE_JIT else _count


@intrinsic
def _counted(_, counter):
    def generate(context, builder, _, values):
        data = context.make_array(counter)(context, builder, values[0]).data
        return builder.load_atomic(data, "acquire", align=8)

    return types.int64(counter), generate


# counted(counter): that number, and all that was written before it was counted up to there
counted: Callable[..., Any] = (lambda counter: int(counter[0])) if DISABLE_JIT else _counted

# offer_processor(): lets the system run another thread, if one waits for this processor
_system = types.ExternalFunction("sched_yield" if os.name == "posix" else "SwitchToThread", types.int32())
offer_processor: Callable[[], Any] = (lambda: time.sleep(0)) if DISABLE_JIT else _system
SPINS = 1 << 12  # looks at a counter, some microseconds, before the processor is offered to others


@jit()
def wait_for(counter, goal):
    """Wait until other threads have counted up to the goal."""
    looks = 0
    while counted(counter) < goal:
        looks += 1
        if looks > SPINS:
            offer_processor()


@jit()
def next_chunk(ticket, workers, pieces, smallest):
    """The next chunk of all pieces, first..last-1, for whichever thread asks; first = pieces: nothing is left.

    A chunk is a fraction of what is left, and no smaller than `smallest`: long runs of pieces first, which read
    memory as one stream, and short ones at the end, so that all threads finish together even if one was held up.
    """
    first, last = 0, 0
    for _ in range(count(ticket, 1) + 1):
        first, last = last, min(pieces, last + max(smallest, -(-(pieces - last) // (2 * workers))))
    return first, last


# What follows is for compiled code alone: plain Python has no other threads.


@intrinsic
def _replace(_, array, old, new):
    def generate(context, builder, _, values):
        data = context.make_array(array)(context, builder, values[0]).data
        return builder.extract_value(builder.cmpxchg(data, values[1], values[2], "acq_rel", "acquire"), 1)

    return types.boolean(array, types.int64, types.int64), generate


@intrinsic
def _run_code(_, address, worker, record):
    def generate(context, builder, _, values):
        word, place = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(word, [place.as_pointer(), place.as_pointer(), values[1].type, place])
        results = [cgutils.alloca_once(builder, place) for _ in range(2)]  # once: a thread serves many calls
        code = builder.inttoptr(values[0], kind.as_pointer())
        return builder.call(code, [*results, values[1], builder.inttoptr(values[2], place)])

    return types.int32(types.int64, types.int64, types.int64), generate


# replace(array, old, new): whether the first number was `old`, and is `new` now, without another thread in between
# run_code(address, worker, record): see `entries`
replace: Callable[..., Any] = _replace
run_code: Callable[..., Any] = _run_code


@jit()
def share(code, record, workers, offer):
    """Offer a call to other threads, do worker 0's part of it, and wait for those who came in time."""
    offer[CODE], offer[RECORD], offer[WORKERS], offer[FAILED], offer[LEFT] = code, record, workers, 0, 0
    before = counted(offer)
    count(offer, (before // CALL + 1) * CALL - before)
    failed = run_code(code, 0, record) != 0
    came = count(offer, CLOSED) % CALL
    wait_for(offer[LEFT:], came)
    if failed:
        offer[FAILED] = 1


@jit()
def serve(looks, offer):
    """Take part in calls that are offered, until none is for so many looks."""
    look = 0
    while look < looks:
        number = counted(offer)
        came = number % CALL
        if came < offer[WORKERS] - 1 and replace(offer, number, number + 1):
            if run_code(offer[CODE], came + 1, offer[RECORD]) != 0:
                offer[FAILED] = 1
            count(offer[LEFT:], 1)
            look = 0
        look += 1
        if look > SPINS:
            offer_processor()
