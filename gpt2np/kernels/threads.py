"""The threads that run compiled code: how many there are, and how a call is offered to them.

Threads of Python look for offers in compiled code, without Python's lock, for a while, then sleep. The caller does its
part and waits only for those who came in time (`sharing`). One caller at a time may offer; any other works alone, since
results do not depend on the number of threads. A child of a fork, which has none, starts its own.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import Any

import numpy as np

from ..arguments import whole_number
from ..arrays import Array
from ..errors import InputError
from .calls import Call, check
from .layout import FAILED, OFFER
from .machine import DISABLE_JIT, MOST_THREADS

GRAIN = 1 << 17  # multiply-adds below which it is not worth waking another thread

LOOKS = 6 << 10  # for an offer before a thread sleeps, a millisecond or so: longer than Python takes between two tokens

_threads = MOST_THREADS


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
    if n > MOST_THREADS:
        raise InputError(f"the number of threads must be in 1..{MOST_THREADS}, got {n}")
    _threads = n


def get_num_threads() -> int:
    """The number of threads that the kernels may use."""
    return _threads


def smallest_chunk(pieces: int, work: int) -> int:
    """How many of some pieces, `work` multiply-adds in all, are worth the time of a thread that is awake."""
    return max(1, pieces * GRAIN // (2 * work))


class _Team:
    """Threads that share the calls of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # of who offers
        self.offer = np.zeros(OFFER, np.int64)
        self.size = 0  # threads
        self.asleep: list[queue.SimpleQueue[None]] = []  # each where it waits to be woken
        self.calling = False
        self.share, self.serve = Call("sharing.share", 0, 0, 0, self.offer), Call("sharing.serve", LOOKS, self.offer)

    def run(self, call: Call, workers: int) -> None:
        """Run a call by this thread, which holds the lock, and workers - 1 of the others."""
        with contextlib.suppress(RuntimeError):  # no more threads can be started; these will do
            while self.size < workers - 1:
                threading.Thread(target=self._serve, name="gpt2np", daemon=True).start()
                self.size += 1
        self.calling = True
        awake = self.size - len(self.asleep)
        for _ in range(min(len(self.asleep), workers - 1 - awake)):
            self.asleep.pop().put(None)
        self.share.run(call.code.address, call.record_address, workers)
        self.calling = False
        check(int(self.offer[FAILED]))

    def _serve(self) -> None:
        woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        while True:
            self.serve.run()
            self.asleep.append(woken)
            if self.calling:  # and the caller may not have seen that this thread is asleep
                self.serve.run()
            woken.get()


_team: _Team | None = None


def the_team() -> _Team:
    """The threads of this process, of which none was started before there was a call for them."""
    global _team
    if _team is None:
        _team = _Team()
    return _team


def run(call: Call, workers: int, *first: int) -> None:
    """Run a call by so many threads; first: see `Call.run`."""
    if workers == 1 or DISABLE_JIT:
        call.run(*first)
        return
    team = the_team()
    if team.lock.acquire(blocking=False):
        try:
            call.record[: len(first)] = first
            team.run(call, workers)
        finally:
            team.lock.release()
    else:
        call.run(*first)


def run_pieces(name: str, pieces: int, work: int, scratch: Array, *arguments: Any) -> None:
    """Run a kernel on its pieces, `work` multiply-adds in all, by as many threads as that is worth.

    scratch: (threads, numbers), memory for each thread that there is. The kernel is called as
    kernel(first, last, scratch of one thread, *arguments) for chunks of pieces, until none is left.
    """
    workers = max(1, min(len(scratch), pieces, work // GRAIN))
    smallest = smallest_chunk(pieces, work)
    run(Call(name, np.zeros(1, np.int64), workers, pieces, smallest, scratch, arguments), workers)


def _after_fork() -> None:
    global _team
    _team = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
