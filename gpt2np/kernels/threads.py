"""Work dealt out to threads: how many there are, who may use them, and how each gets its next chunk."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import typeof
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic
from numba.np.ufunc.parallel import threading_layer

from ..arguments import whole_number
from ..arrays import Array
from ..errors import InputError
from .jit import config, jit

GRAIN = 1 << 17  # multiply-adds below which it is not worth waking another thread

_lock = threading.Lock()
_threads = int(config.NUMBA_NUM_THREADS)
_forked = False


def set_num_threads(n: int) -> None:
    """Let the kernels use `n` threads, at most NUMBA_NUM_THREADS (default: the cores of this machine).

    Results do not depend on it.

    Raises
    ------
    InputError
        If n is not in 1..NUMBA_NUM_THREADS.
    """
    global _threads
    n = whole_number("the number of threads", n, 1)
    if n > config.NUMBA_NUM_THREADS:
        raise InputError(f"the number of threads must be in 1..{config.NUMBA_NUM_THREADS}, got {n}")
    _threads = n


def get_num_threads() -> int:
    """The number of threads that the kernels may use."""
    return _threads


class pool:
    """How many threads a call may use: all of them for one caller at a time, its own thread for any other.

    numba's thread pools cannot all be used by two Python threads at once ("workqueue" aborts), and a GNU
    OpenMP pool does not survive a fork. Since results do not depend on the number of threads, whoever finds the
    pool taken, or lost in a fork, goes on alone.
    """

    def __enter__(self) -> int:
        if config.DISABLE_JIT:  # compiled code never warns of an overflow; the same code in Python should not either
            self._silence = np.errstate(all="ignore")
            self._silence.__enter__()
        self._taken = _lock if not _forked and _lock.acquire(blocking=False) else None
        return _threads if self._taken else 1

    def __exit__(self, *error: Any) -> None:
        if self._taken:
            self._taken.release()
        if config.DISABLE_JIT:
            self._silence.__exit__(*error)


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.Lock()
    try:
        _forked = threading_layer() != "workqueue"  # that pool starts anew by itself
    except ValueError:  # no pool was ever started
        _forked = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
    # A thread that compiles while another forks would leave the child numba's lock, which nobody there can release.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


def run_pieces(pieces: int, work: int, serial: Any, parallel: Any, scratch: Array, *arguments: Any) -> None:
    """Run a kernel on its pieces, `work` multiply-adds in all, by as many threads as that is worth.

    scratch: (threads, numbers), memory for each thread that there is.
    serial(first, last, scratch of one thread, *arguments) does pieces first..last-1 on the caller's own thread;
    parallel(ticket, workers, pieces, smallest, scratch, *arguments) has `workers` threads take chunks of `smallest`
    pieces or more until none is left; ticket is [0].

    Arrays are made and reshaped here, in Python: numba's own code for it would take longer to load than all kernels.
    """
    workers = min(len(scratch), pieces, work // GRAIN)
    if workers <= 1:
        serial(0, pieces, scratch[0], *arguments)
    else:
        parallel(np.zeros(1, np.int64), workers, pieces, smallest_chunk(pieces, work), scratch, *arguments)


def run_steps(
    serial: Any, parallel: Any, kinds: Any, counters: Array, workers: int, scratch: Array, *arguments: Any
) -> None:
    """Run a kernel of several steps, each of which needs all of the one before, by so many threads.

    Called as serial(counters, workers, scratch of one thread, *arguments) by each thread, which
    parallel(address of serial, ...) does with the scratch of all; kinds: see `address_of`.
    """
    if workers <= 1:
        serial(counters, 1, scratch[0], *arguments)
    else:
        address = address_of(serial, kinds, lambda: (counters, workers, scratch[0], *arguments))
        parallel(address, counters, workers, scratch, *arguments)


_addresses: dict[Any, int] = {}


def address_of(kernel: Any, kinds: Any, arguments: Callable[[], Sequence[Any]]) -> Any:
    """Where the compiled code of a kernel is, for `call_at`; kinds: what the arguments' types depend on.

    A kernel that is called so is compiled once; one that another is compiled with is compiled in both.
    """
    if config.DISABLE_JIT:
        return kernel
    if (kernel, kinds) not in _addresses:
        signature = tuple(typeof(argument) for argument in arguments())
        kernel.compile(signature)
        compiled = kernel.overloads[signature]
        _addresses[kernel, kinds] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return _addresses[kernel, kinds]


@intrinsic
def _call_at(_, address, arguments):
    """Compiled code at an address, called with a tuple of arguments; it returns nothing."""

    def generate(context, builder, signature, values):
        convention, kinds = context.call_conv, arguments.types
        function = builder.inttoptr(values[0], convention.get_function_type(types.none, kinds).as_pointer())
        given = [builder.extract_value(values[1], i) for i in range(len(kinds))]
        convention.call_function(builder, function, types.none, kinds, given)
        return context.get_dummy_value()

    return types.none(address, arguments), generate


def _call_in_python(kernel: Any, arguments: Any) -> None:
    kernel(*arguments)


call_at: Callable[..., None] = _call_in_python if config.DISABLE_JIT else _call_at


def smallest_chunk(pieces: int, work: int) -> int:
    """How many of some pieces, `work` multiply-adds in all, are worth a thread's time."""
    return max(1, pieces * GRAIN // work)


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
count: Callable[..., Any] = _count_in_python if config.DISABLE_JIT else _count


@intrinsic
def _counted(_, counter):
    def generate(context, builder, _, values):
        data = context.make_array(counter)(context, builder, values[0]).data
        return builder.load_atomic(data, "acquire", align=8)

    return types.int64(counter), generate


# counted(counter): that number, and all that was written before it was counted up to there
counted: Callable[..., Any] = (lambda counter: int(counter[0])) if config.DISABLE_JIT else _counted

# offer_processor(): lets the system run another thread, if one waits for this processor
_system = types.ExternalFunction("sched_yield" if os.name == "posix" else "SwitchToThread", types.int32())
offer_processor: Callable[[], Any] = (lambda: time.sleep(0)) if config.DISABLE_JIT else _system
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
