"""Kill what computes shards at random moments, again and again; the result must be the one of a single process.

    python tests/support/kill_campaign.py [--kills 100] [--seed 0] [--spawn] [--scheduler] [--text FILE]

A tiny model scores a text by workers on this machine; with --text the embedded one does, by compiled kernels.
Workers are killed (SIGKILL) until enough were; whenever the run ends before, some results are damaged or removed and it
goes on with another number of workers. --spawn starts workers as on systems without fork. --scheduler kills a scheduler
of its own instead, with its workers, and starts them anew. Each begun computation is logged, so that it is seen whether
anything was computed twice that was not in flight when something was killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil

from gpt2np.cluster import engine, text
from gpt2np.cluster.models import describe
from gpt2np.cluster.store import Shard, Store
from gpt2np.model import load
from gpt2np.score import Score, TextScoring
from toy_model import write_toy

TEXT = "Once upon a time there was a king, and the king had a daughter. " * 30
WINDOW, STRIDE = 40, 10


def slowly(shard: Shard, store: Store) -> bytes:
    """What a worker computes, slowly enough to be killed, and logged."""
    with (store.folder.parent / "begun.log").open("a") as log:
        log.write(f"{shard.name}\n")
    time.sleep(0.2)
    return text.score_windows(shard, store)


def work(folder: Path, given: Path | None) -> tuple[Shard, list[Shard], Store, Score]:
    """A tokenized text, its shards, where results are kept, and what one process says of the text."""
    text.WINDOWS = 4
    model = load() if given else load(write_toy(folder / "toy") / "model.onnx", "numpy")
    scored = given.read_text() if given else TEXT
    cut = (model.config.n_ctx, model.config.n_ctx // 2) if given else (WINDOW, STRIDE)
    (folder / "text.txt").write_text(scored)
    store = Store(folder / "results")
    store.folder.mkdir()
    tokens = text.token_shard(folder / "text.txt", describe(model, None, 1))
    engine.compute([tokens], store)
    scoring = TextScoring(model, scored, *cut, batch_size=1)
    for _ in scoring:
        pass
    shards = [replace(shard, work=slowly) for shard in text.window_shards(tokens, store, *cut)]
    return tokens, shards, store, scoring.result


def begun_in(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def workers_of_this_process() -> list[psutil.Process]:
    """One child starts them: all that it has started, but for itself."""
    return [worker for child in psutil.Process().children() for worker in child.children()]


def kill_workers(stop: threading.Event, kills: int, done: list[int], rng: random.Random, log: Path) -> None:
    """Kill one of the processes that this one started for work: now at any moment, now while shards are computed."""
    while len(done) < kills:
        size, until = begun_in(log), time.monotonic() + (0 if rng.random() < 0.3 else 30)
        while begun_in(log) < size + 3 and time.monotonic() < until and not stop.is_set():
            time.sleep(0.02)
        if stop.wait(rng.uniform(0, 0.4)):
            return
        if workers := workers_of_this_process():
            victim = rng.choice(workers)
            victim.send_signal(signal.SIGKILL)
            done.append(victim.pid)


def by_workers(folder: Path, given: Path | None, kills: int, rng: random.Random) -> None:
    """The campaign against workers."""
    tokens, shards, store, expected = work(folder, given)
    done: list[int] = []
    runs = damaged = 0
    while True:
        workers, stop = rng.randint(1, 3), threading.Event()
        killer = threading.Thread(target=kill_workers, args=(stop, kills, done, rng, folder / "begun.log"))
        with engine.open_engine(workers) as local:
            killer.start()
            try:
                engine.compute(shards, store, local)
            finally:
                stop.set()
                killer.join()
        runs += 1
        found = text.text_score(tokens, shards, store)
        assert found == expected, (found, expected)
        print(f"run {runs}: {workers} workers, {len(done)} kills so far, {found.log_likelihood!r}", flush=True)
        if len(done) >= kills:
            break
        for shard in rng.sample(shards, len(shards) * 2 // 3):
            damaged += 1
            path = store.folder / shard.name
            path.write_bytes(b"damaged" + path.read_bytes()) if rng.random() < 0.5 else path.unlink()
    check_log(folder, shards, damaged, len(done))


def by_scheduler(folder: Path, given: Path | None, kills: int, rng: random.Random) -> None:
    """The campaign against a scheduler, whose workers end with it."""
    tokens, shards, store, expected = work(folder, given)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address, processes = f"tcp://127.0.0.1:{port}", []

    def start() -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        dask = [sys.executable, "-m", "distributed.cli"]
        scheduler = ["dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
        worker = ["dask_worker", address, "--nthreads", "1", "--no-dashboard", "--death-timeout", "60"]
        for what in (scheduler, worker):
            command = [*dask[:2], f"{dask[2]}.{what[0]}", *what[1:]]
            processes.append(subprocess.Popen(command, **quiet))

    def end() -> None:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        processes.clear()

    done: list[int] = []

    def restart(stop: threading.Event) -> None:
        while len(done) < kills and not stop.wait(0.1):
            begun = begun_in(log)
            if begun > (len(done) + 1) * len(shards) // (kills + 2):
                end()
                done.append(begun)
                start()

    log, stop = folder / "begun.log", threading.Event()
    start()
    try:
        with engine.open_engine(address=address) as remote:
            killer = threading.Thread(target=restart, args=(stop,))
            killer.start()
            engine.compute(shards, store, remote)
        stop.set()
        killer.join()
    finally:
        end()
    found = text.text_score(tokens, shards, store)
    assert found == expected, (found, expected)
    assert len(done) == kills, done
    check_log(folder, shards, 0, kills)


def check_log(folder: Path, shards: list[Shard], damaged: int, kills: int) -> None:
    """Every shard was begun, and none once more than there was a reason for."""
    begun = Counter((folder / "begun.log").read_text().split())
    assert set(begun) == {shard.name for shard in shards}
    again = begun.total() - len(shards) - damaged
    assert 0 <= again <= kills, (again, kills)
    print(f"ok: {len(shards)} shards, {damaged} damaged, {kills} kills, {again} computed again because of them")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spawn", action="store_true")
    parser.add_argument("--scheduler", action="store_true")
    parser.add_argument("--text", type=Path, metavar="FILE")
    given = parser.parse_args()
    engine.METHOD = "spawn" if given.spawn else engine.METHOD
    with tempfile.TemporaryDirectory() as scratch:
        campaign = by_scheduler if given.scheduler else by_workers
        campaign(Path(scratch), given.text, given.kills, random.Random(given.seed))
