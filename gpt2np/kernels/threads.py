"""Work dealt out to threads: how many there are, who may use them, and how each gets its next chunk."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic
from numba.np.ufunc.parallel import threading_layer

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
    if not 1 <= n <= config.NUMBA_NUM_THREADS:
        raise InputError(f"the number of threads must be in 1..{config.NUMBA_NUM_THREADS}, got {n}")
    _threads = int(n)


def get_num_threads() -> int:
    """The number of threads that the kernels may use."""
    return _threads


@contextmanager
def pool() -> Iterator[int]:
    """How many threads a call may use: all of them for one caller at a time, its own thread for any other.

    numba's thread pools cannot all be used by two Python threads at once ("workqueue" aborts), and a GNU
    OpenMP pool does not survive a fork. Since results do not depend on the number of threads, whoever finds the
    pool taken, or lost in a fork, goes on alone.
    """
    # compiled code never warns of an overflow; the same code under NUMBA_DISABLE_JIT=1 should not either
    with np.errstate(all="ignore") if config.DISABLE_JIT else nullcontext():
        if _forked or not _lock.acquire(blocking=False):
            yield 1
            return
        try:
            yield _threads
        finally:
            _lock.release()


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
        parallel(np.zeros(1, np.int64), workers, pieces, max(1, pieces * GRAIN // work), scratch, *arguments)


@intrinsic
def _take(_, ticket):
    def generate(context, builder, _, values):
        data = context.make_array(ticket)(context, builder, values[0]).data
        return builder.atomic_rmw("add", data, data.type.pointee(1), "monotonic")

    return types.int64(ticket), generate


def _take_in_python(ticket: Any) -> Any:
    number = int(ticket[0])
    ticket[0] += 1
    return number


# take(ticket): the number in the int64 array `ticket`, which is 1 higher for whoever asks next, from whatever thread
take: Callable[..., Any] = _take_in_python if config.DISABLE_JIT else _take


@jit()
def next_chunk(ticket, workers, pieces, smallest):
    """The next chunk of all pieces, first..last-1, for whichever thread asks; first = pieces: nothing is left.

    A chunk is a fraction of what is left, and no smaller than `smallest`: long runs of pieces first, which read
    memory as one stream, and short ones at the end, so that all threads finish together even if one was held up.
    """
    first, last = 0, 0
    for _ in range(take(ticket) + 1):
        first, last = last, min(pieces, last + max(smallest, -(-(pieces - last) // (2 * workers))))
    return first, last
