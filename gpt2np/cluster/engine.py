"""Shards computed by this process, by several processes, or by a Dask cluster: `open_engine`, then `compute`.

Dask carries names alone: a shard's description, the name of the function that computes it, and the results' folder.
What is computed stands in that folder, so nothing is lost with a worker or with the scheduler: what is missing
afterwards is computed in another round.
"""

# mypy: allow-untyped-calls
# (Dask's functions have no types)

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

from .. import __version__
from ..arguments import whole_number
from ..errors import InputError
from ..optional import needs
from .store import Shard, Store

AHEAD = 1000  # messages that the scheduler knows of at once: enough for every worker, and few for it
GROUP = 16  # shards of a message, at most: each message costs some 10 ms of Dask's processor time
SECONDS = 3.0  # after which a worker sends back what it has not begun of a message
WAIT = 60.0  # seconds to wait for a scheduler that does not answer
QUIET = {  # settings of Dask, which takes more than 2% of two processors to look at itself otherwise
    "distributed.worker.profile.enabled": False,  # looks at all stacks every 10 ms
    "distributed.admin.tick.interval": "1s",  # 20 ms
    "distributed.admin.system-monitor.interval": "5s",  # 500 ms
}
HOST = "127.0.0.1"  # of local workers: who reaches one can have it compute anything
METHOD = "fork" if sys.platform == "linux" else "spawn"  # elsewhere systems have threads that no fork survives
ROUNDS = 10  # in a row in which nothing was computed, before the run is given up


class Engine(NamedTuple):
    """Who computes shards; as made without arguments, this process does."""

    address: str | None = None  # of Dask's scheduler
    workers: int = 0  # that were there at the beginning
    dashboard: str = ""  # the address of Dask's pages


THIS_PROCESS = Engine()


class _Lost(InputError):
    """A worker or the scheduler is gone, and what it computed must be computed by others."""


@contextmanager
def open_engine(workers: int | None = None, address: str | None = None) -> Iterator[Engine]:
    """Start `workers` processes on this machine, or use the Dask scheduler at `address`; neither: this process.

    Raises
    ------
    InputError
        If both are given or one is none, no scheduler answers at the address, or it or a worker has another version
        of gpt2np.
    MissingPackageError
        If Dask is not installed.
    """
    if workers is None and address is None:
        yield THIS_PROCESS
        return
    if workers is not None and address is not None:
        raise InputError("give workers for this machine or the address of a scheduler, not both")
    if not isinstance(address, str | None):
        raise InputError(f"a scheduler's address is a text such as tcp://host:8786, got {address!r:.60}")
    workers = None if workers is None else whole_number("workers", workers, 1)
    with needs("distributed", "work by several processes", "or leave out --workers and --cluster"):
        import dask
        import distributed
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # what matters of it is told here
    with ExitStack() as stack:
        if workers is not None:
            begin = stack.enter_context(_workers(workers))
            stack.enter_context(dask.config.set(QUIET))
            failures = {"allowed_failures": 10}  # in a round: a worker that is killed is no fault of its shard's
            place = {"host": HOST, "dashboard_address": f"{HOST}:0"}
            cluster = distributed.LocalCluster(n_workers=0, **place, scheduler_kwargs=failures)
            begin(address := stack.enter_context(cluster).scheduler_address)
        assert address is not None
        client = stack.enter_context(_client(address))
        found = client.get_versions(packages=["gpt2np"])  # Dask ends a worker that cannot import what it is to do
        for place, its in {f"the scheduler at {address}": found["scheduler"], **found["workers"]}.items():
            if (version := its["packages"]["gpt2np"]) != __version__:
                raise InputError(f"{place} has gpt2np {version}, where this machine has {__version__}")
        count = workers or len(found["workers"])
        yield Engine(address, count, client.dashboard_link if find_spec("bokeh") else "")  # bokeh draws Dask's pages


@contextmanager
def _workers(count: int) -> Iterator[Callable[[str], None]]:
    """Worker processes, which begin when they are told the scheduler's address.

    Where processes can be forked they have what this one has loaded, and share its memory: a model, compiled
    kernels. A process without threads of its own forks them, for Dask's may hold locks at any moment.
    """
    processes: Any = multiprocessing.get_context(METHOD)
    ours, theirs = processes.Pipe()
    gc.freeze()  # what is there stays: no collector looks at it, so that forked memory is not copied for that
    nursery = processes.Process(target=_keep_alive, args=(processes, ours, theirs, count))
    with catch_warnings():
        # of forks beside threads: NumPy's and the kernels' are ready for it
        simplefilter("ignore", DeprecationWarning)
        nursery.start()
    theirs.close()
    try:
        yield ours.send
    finally:
        ours.close()
        nursery.join()


def _keep_alive(processes: Any, ours: Connection, theirs: Connection, count: int) -> None:
    """Workers, each of which is started anew when it ends, until the process that is on `ours` closes it or ends."""
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that works with the results
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    threads = max(1, (os.cpu_count() or 1) // count)  # for the kernels; Dask itself has one
    os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
    if kernels := sys.modules.get("gpt2np.kernels"):
        kernels.set_num_threads(min(threads, kernels.get_num_threads()))
    with suppress(EOFError):  # `theirs` is closed
        address = theirs.recv()
        with processes.Pool(count, _work, (address,)):  # Dask's nanny gives up where one is killed while it starts
            theirs.recv()


def _work(address: str) -> None:
    """Be a worker of Dask; ends this process."""
    import dask
    import distributed

    async def work() -> None:
        async with distributed.Worker(address, nthreads=1, host=HOST, memory_limit=0, dashboard=False) as worker:
            await worker.finished()

    with dask.config.set(QUIET):
        asyncio.run(work())
    sys.exit()


def compute(
    shards: Sequence[Shard],
    store: Store,
    engine: Engine = THIS_PROCESS,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Compute shards, each unless a sound result of it is there by then; advance(its size) is called when it is done.

    Raises
    ------
    Gpt2npError
        What a worker raised; or if workers or the scheduler are lost again and again.
    """
    left, lost = {shard.name: shard for shard in shards}, 0
    while left:
        try:
            for shard in _round(list(left.values()), store, engine):
                advance(left.pop(shard.name).size)
                lost = 0
        except _Lost as error:
            lost += 1
            if lost == ROUNDS:
                raise InputError(f"{len(left):,} of {len(shards):,} shards could not be computed: {error}") from None


def make(shards: Sequence[Shard], store: Store) -> int:
    """What a worker does: compute shards and keep each result, unless it has come meanwhile, for SECONDS.

    Returns how many are done, of those that come first; one at least.
    """
    until, done = time.monotonic() + SECONDS, 0
    while done < len(shards) and (not done or time.monotonic() < until):
        if store.read(shards[done].name) is None:
            store.write(shards[done].name, shards[done].work(shards[done], store))
        done += 1
    return done


def _round(shards: Sequence[Shard], store: Store, engine: Engine) -> Iterator[Shard]:
    """Compute shards in any order; yields each that is done."""
    if engine.address is None:
        for shard in shards:
            make([shard], store)
            yield shard
        return
    from distributed import KilledWorker, as_completed

    with _client(engine.address) as client:
        waiting, running = deque(shards), as_completed(loop=client.loop)
        sent: dict[Any, list[Shard]] = {}

        def submit(most: int) -> None:
            while waiting and len(sent) < AHEAD:
                count = min(most, 1 + len(waiting) // (2 * engine.workers or AHEAD))  # one at last: all end together
                some = [waiting.popleft() for _ in range(count)]
                running.add(future := client.submit(make, some, store, pure=False))
                sent[future] = some

        submit(GROUP)
        for future in running:
            error = future.exception() if future.status == "error" else None
            if error is not None and not isinstance(error, KilledWorker):
                raise error
            if future.status != "finished":
                raise _Lost(f"a worker or the scheduler was lost: {error or future.status}")
            some, done = sent.pop(future), future.result()
            waiting.extend(some[done:])
            submit(min(GROUP, 2 * done))  # where shards take long, few come back
            yield from some[:done]


@contextmanager
def _client(address: str) -> Iterator[Any]:
    """A connection to a scheduler.

    A Client waits for ever for what answers in another way than Dask, such as a scheduler's pages; and after what is
    no address Python does not end. So a connection is tried first.
    """
    from distributed import Client, Security
    from distributed.comm.core import connect

    async def tried() -> None:
        secured = Security().get_connection_args("client")
        await (await asyncio.wait_for(connect(address, WAIT, **secured), WAIT + 1)).close()

    try:
        asyncio.run(tried())
        client = Client(address, timeout=WAIT, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # ValueError: no address; TypeError: tls:// without a certificate
        why = str(error) or "it does not talk as Dask does"
        raise _Lost(f"no Dask scheduler answers at {address}: {why}") from None
    with client:
        yield client
